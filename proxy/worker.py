"""One proxy worker: a process that serves the listening socket it was handed, until it is told to stop.

Its standard input is a socket, by which it gets its configuration, and others later. Its end means that the parent is
gone.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, cast

import uvicorn
import uvloop

from proxy import config, inbound
from proxy.app import Places, Worker
from proxy.balancer import Board
from proxy.cache.bulletin import Bulletin
from proxy.metrics import Metrics
from proxy.orders import Followed, Orders
from proxy.shared import slots_of

log = logging.getLogger(__name__)

_GC_THRESHOLD = 20_000  # objects made and not freed; requests leave no cycles behind, so there is little to find


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which would end the process with the signal's exit code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def follow(self, settings: config.Server) -> None:
        """Go by other settings from now on."""
        inbound.follow(cast(type[inbound.Connection], self.config.http), settings)
        self.config.timeout_graceful_shutdown = _grace(settings)


def main() -> int:
    """Serve until SIGTERM, then until the requests in flight are done."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it may be sent to the whole group; the parent heeds it
    line = socket.socket(fileno=sys.stdin.fileno())
    given = Orders.take(line)
    settings = config.decode(given.config)
    slots = slots_of(settings, given.given)
    metrics = Metrics(settings, given.worker, given.metrics_fd, slots=slots)
    board = Board(slots, settings.server.workers, given.worker, given.board_fd)
    bulletin = Bulletin(settings.server.workers, given.worker, given.cache_fd)
    places = Path(given.control_socket), Path(given.ledger), Path(given.capabilities)
    made = Worker(settings, Places(*places), metrics, board, bulletin)
    server = _Server(_uvicorn_config(made, settings.server))
    listening = socket.socket(fileno=given.listen_fd)
    uvloop.run(_serve(server, listening, settings.server, _follow(line, made, server)))
    return 0


def _grace(settings: config.Server) -> int:
    return max(1, round(settings.drain_timeout))


def _uvicorn_config(worker: Worker, settings: config.Server) -> uvicorn.Config:
    return uvicorn.Config(
        worker.app(),
        interface="asgi3",
        http=inbound.protocol(settings),
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_grace(settings),
    )


async def _serve(
    server: uvicorn.Server, listening: socket.socket, settings: config.Server, following: Coroutine[Any, Any, None]
) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.should_exit = True

    # A second SIGTERM changes nothing: whoever stops a whole process group sends one beside the parent's.
    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # the parent decides
    beside = asyncio.create_task(following)
    sweeping = asyncio.create_task(inbound.sweep_for_ever(server.server_state.connections, settings))
    _spare_the_collector()
    await server.serve(sockets=[listening])
    sweeping.cancel()
    beside.cancel()


def _spare_the_collector() -> None:
    """Keep what the start has made out of every later collection: a full one took 50 ms, and stopped all streams."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 20, 50)


async def _follow(line: socket.socket, worker: Worker, server: _Server) -> None:
    """Follow each configuration that the parent has; end at once when its end of the line closes, however it ends."""
    reader, writer = await asyncio.open_unix_connection(sock=line)
    while True:
        try:
            orders = await Orders.read(reader)
        except (EOFError, OSError):
            os._exit(1)
        writer.write((await _done(orders, worker, server)).frame())


async def _done(orders: Orders, worker: Worker, server: _Server) -> Followed:
    """Follow another configuration, and say whether that was possible. The parent has checked it."""
    settings = config.decode(orders.config)
    try:
        await worker.follow(settings, slots_of(settings, orders.given))
    except Exception:
        log.exception("cannot follow a new configuration")
        return Followed(orders.generation, failed=True)
    server.follow(settings.server)
    return Followed(orders.generation)


if __name__ == "__main__":
    sys.exit(main())
