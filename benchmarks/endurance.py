"""What a worker keeps: memory after many requests, growth over many more, clients that are slow or go, start.

    make bench-endurance ARGS="--requests 1000000"

Prints one line for each figure. The proxy is pinned to the first core, everything else to the last.
"""

import argparse
import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import uvloop

from benchmarks import processes
from benchmarks.load import Asked
from benchmarks.peers import KEY, MODEL, OURS, PEERS, Setting
from benchmarks.upstream import STREAM_HEAD

UPSTREAM_PORT, PROXY_PORT = 9431, 9441
WARM = 100_000  # requests before growth is counted
SLOW_CLIENTS = 200
SLOW_SECONDS = 20.0
BIG_STREAM = 10 * 2**20  # bytes
_AT_REST = 8.0  # seconds; idle connections to engines are kept for half as long
SLOWLY = Asked(model=MODEL, stream=True)
_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 950 + b'"}}]}\r\n\r\n'
_READ = len(_EVENT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000, help="of the soak, after the first 100,000")
    parser.add_argument("--warm", type=int, default=WARM, help="requests before growth is counted")
    parser.add_argument("--seconds", type=float, default=SLOW_SECONDS, help="how long slow clients are watched")
    parser.add_argument("--abandoned", type=int, default=10_000, help="streams whose clients go at random points")
    parser.add_argument("--only", choices=("soak", "slow", "start", "abandon"))
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    with tempfile.TemporaryDirectory() as folder:
        if given.only in (None, "start"):
            starts = [_start_once(Path(folder), cores[0]) for _ in range(5)]
            print(f"start to listening: {sorted(starts)[2]:.2f} s (median of 5)")
        if given.only in (None, "soak"):
            _soak(Path(folder), cores[0], given.warm, given.requests)
        if given.only in (None, "slow"):
            uvloop.run(_slow_clients(Path(folder), cores[0], given.seconds))
        if given.only in (None, "abandon"):
            uvloop.run(_abandon(Path(folder), cores[0], given.abandoned))


@contextlib.contextmanager
def _proxy(folder: Path, core: int) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """Run ours; give its process, and the seconds until it took a connection."""
    ours = next(peer for peer in PEERS if peer.name == OURS)
    setting = Setting(PROXY_PORT, (f"http://127.0.0.1:{UPSTREAM_PORT}",), 1, folder)
    start = ours.start(ours.install(), setting)
    began = time.monotonic()
    with processes.pinned((core,), start.command, folder / "log") as process:
        _await_answer(began)
        yield process, time.monotonic() - began


def _await_answer(began: float) -> None:
    while time.monotonic() < began + 30:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", PROXY_PORT), 1) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            if connection.recv(100):
                return
        time.sleep(0.005)
    raise SystemExit("the proxy does not start")


def _start_once(folder: Path, core: int) -> float:
    with _proxy(folder, core) as (_, seconds):
        return seconds


def _worker(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the process of the proxy's worker."""
    return [pid for pid in processes.tree(process.pid) if b"proxy.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _soak(folder: Path, core: int, warm: int, requests: int) -> None:
    upstream = (sys.executable, "-m", "benchmarks.upstream", str(UPSTREAM_PORT))
    with processes.pinned((max(os.sched_getaffinity(0)),), upstream, folder / "up"), _proxy(folder, core) as (ours, _):
        worker = _worker(ours)
        print(f"a worker before its first request: {processes.resident_mib(worker):.1f} MiB")
        _load(warm)
        before = processes.resident_mib(worker)
        print(f"after {warm:,} requests: {before:.1f} MiB")
        _load(requests)
        after = processes.resident_mib(worker)
        print(f"after {requests:,} more: {after:.1f} MiB, growth {after - before:+.1f} MiB", flush=True)


def _load(requests: int) -> None:
    """Send so many requests, every tenth of them for a stream."""
    url = f"http://127.0.0.1:{PROXY_PORT}/v1/chat/completions"
    for share, stream in ((0.9, "false"), (0.1, "true")):
        asked = f'{{"key": "{KEY}", "stream": {stream}}}'
        words = ("--limit", str(max(1, int(requests * share))), "--seconds", "100000", "--asked", asked)
        subprocess.run([sys.executable, "-m", "benchmarks.load", url, *words], check=True, stdout=subprocess.DEVNULL)


# Slow clients


class Torrent(asyncio.Protocol):
    """An engine that streams ten megabytes as fast as they are taken."""

    def __init__(self) -> None:
        # All mutable state: the socket, whether it takes more, and how much is still to be sent.
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._left = 0

    def __repr__(self) -> str:
        return f"<Torrent {self._left} bytes left>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        assert self._transport
        if b"POST" not in data:
            return
        self._transport.write(STREAM_HEAD)
        self._left = BIG_STREAM
        self._send()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._send()

    def _send(self) -> None:
        while self._transport and self._left > 0 and not self._paused:
            self._left -= len(_EVENT)
            self._transport.write(b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT))


async def _slow_clients(folder: Path, core: int, seconds: float) -> None:
    """Let 200 clients read an event a second, and print what the worker holds for them."""
    server = await asyncio.get_running_loop().create_server(Torrent, "127.0.0.1", UPSTREAM_PORT)
    with _proxy(folder, core) as (ours, _):
        worker = _worker(ours)
        before = processes.resident_mib(worker)
        sockets = [await _ask() for _ in range(SLOW_CLIENTS)]
        highest, end = before, time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.gather(*(_read_one(s) for s in sockets))
            highest = max(highest, processes.resident_mib(worker))
            await asyncio.sleep(1.0)
        growth = highest - before
        print(f"{SLOW_CLIENTS} slow clients: {before:.1f} MiB before, {highest:.1f} at most, {growth:+.1f} MiB")
        for s in sockets:
            s.close()
    server.close()


async def _ask(asked: Asked = SLOWLY) -> socket.socket:
    loop, s = asyncio.get_running_loop(), socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.setblocking(False)
    await loop.sock_connect(s, ("127.0.0.1", PROXY_PORT))
    url = urlsplit(f"http://127.0.0.1:{PROXY_PORT}/v1/chat/completions")
    await loop.sock_sendall(s, asked.requests(url)[0])
    return s


async def _read_one(s: socket.socket) -> None:
    await asyncio.get_running_loop().sock_recv(s, _READ)


# Clients that go


async def _abandon(folder: Path, core: int, streams: int) -> None:
    """Let clients go at random points of their streams, and print what the worker has more of than before."""
    upstream = (sys.executable, "-m", "benchmarks.upstream", str(UPSTREAM_PORT))
    with processes.pinned((max(os.sched_getaffinity(0)),), upstream, folder / "up"), _proxy(folder, core) as (ours, _):
        worker, chance = _worker(ours), random.Random(7)
        await _go_away(streams // 10, chance)
        before, held = await _sockets_at_rest(worker), processes.resident_mib(worker)
        await _go_away(streams, chance)
        after, holds = await _sockets_at_rest(worker), processes.resident_mib(worker)
        print(f"{streams:,} abandoned streams: {after - before:+} sockets, {holds - held:+.1f} MiB, {_running()}")


async def _go_away(streams: int, chance: random.Random) -> None:
    some = asyncio.Semaphore(50)

    async def one(wait: float) -> None:
        async with some:
            s = await _ask(Asked(model=MODEL, stream=True, pace=5))
            await asyncio.sleep(wait)
            s.close()

    await asyncio.gather(*[one(chance.random() * 0.4) for _ in range(streams)])


async def _sockets_at_rest(worker: list[int]) -> int:
    """Return the sockets of the worker when those that it keeps for a while have been closed."""
    await asyncio.sleep(_AT_REST)
    return _sockets(worker)


def _sockets(worker: list[int]) -> int:
    links = [link for pid in worker for link in Path(f"/proc/{pid}/fd").iterdir()]
    return sum("socket:" in os.readlink(link) for link in links)


def _running() -> str:
    """Return the line of the metrics that counts requests under way."""
    ask = Request(f"http://127.0.0.1:{PROXY_PORT}/metrics", headers={"authorization": f"Bearer {KEY}"})
    lines = urlopen(ask).read().decode().splitlines()
    return next(line for line in lines if line.startswith("polyvox_num_requests_running"))


if __name__ == "__main__":
    main()
