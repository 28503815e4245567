"""One proxy worker: a process that serves the listening socket it was handed, until it is told to stop.

It reads its configuration from standard input, which stays open: its end means that the parent is gone.
"""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn
import uvloop

from proxy import config, inbound
from proxy.app import Places, Worker, make_board
from proxy.metrics import Metrics
from proxy.orders import Orders

_GC_THRESHOLD = 20_000  # objects made and not freed; requests leave no cycles behind, so there is little to find


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which would end the process with the signal's exit code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main() -> int:
    """Serve until SIGTERM, then until the requests in flight are done."""
    given = Orders.read(sys.stdin.buffer)
    settings = config.decode(given.config)
    metrics = Metrics(settings, given.worker, given.metrics_fd)
    board = make_board(settings, given.worker, given.board_fd)
    places = Path(given.control_socket), Path(given.ledger), Path(given.capabilities)
    made = Worker(settings, Places(*places), metrics, board)
    server = _Server(_uvicorn_config(made, settings))
    listening = socket.socket(fileno=given.listen_fd)
    uvloop.run(_serve(server, listening, settings.server))
    return 0


def _uvicorn_config(worker: Worker, settings: config.Config) -> uvicorn.Config:
    return uvicorn.Config(
        worker.app(),
        interface="asgi3",
        http=inbound.protocol(settings.server),
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(settings.server.drain_timeout)),
    )


async def _serve(server: uvicorn.Server, listening: socket.socket, settings: config.Server) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.should_exit = True

    # A second SIGTERM changes nothing: whoever stops a whole process group sends one beside the parent's.
    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C reaches the whole group; the parent decides
    loop.add_reader(sys.stdin.fileno(), _end_with_parent)
    sweeping = asyncio.create_task(inbound.sweep_for_ever(server.server_state.connections, settings))
    _spare_the_collector()
    await server.serve(sockets=[listening])
    sweeping.cancel()


def _spare_the_collector() -> None:
    """Keep what the start has made out of every later collection: a full one took 50 ms, and stopped all streams."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 20, 50)


def _end_with_parent() -> None:
    """Stop at once when the parent's end of standard input closes, as it does however the parent ends."""
    if not os.read(sys.stdin.fileno(), 1):
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
