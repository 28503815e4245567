"""A load generator: as many requests as the connections carry, or so many a second. Prints one line of JSON.

python -m benchmarks.load http://127.0.0.1:PORT/v1/chat/completions [--connections 32] [--seconds 5] [--rate 500]
"""

import argparse
import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast
from urllib.parse import SplitResult, urlsplit

import msgspec
import uvloop

SENTENCE = "The quick brown fox jumps over the lazy dog. "
VARIETY = 64  # different prompts in turn
_GIVE_UP = 30.0  # seconds after the end for answers that are still under way
_MODEL, _KEY = "mock", "sk-bench"


class Asked(msgspec.Struct, frozen=True):
    """What every request asks for. prompt: its size in bytes. pace: milliseconds between events, None for no pause."""

    prompt: int = 900
    stream: bool = False
    pace: int | None = None
    model: str = _MODEL
    key: str = _KEY
    headers: dict[str, str] = {}

    def bodies(self) -> list[bytes]:
        """Return the JSON bodies to be sent in turn."""
        return [self._body(number) for number in range(VARIETY)]

    def _body(self, number: int) -> bytes:
        text = f"{number} " + SENTENCE * max(1, round(self.prompt / len(SENTENCE)))
        messages = [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": text}]
        content = {"model": self.model, "messages": messages, "max_tokens": 64, "temperature": 0.7}
        if self.stream:
            content |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.pace is not None:
            content["seed"] = self.pace
        return json.dumps(content, separators=(",", ":")).encode()

    def requests(self, url: SplitResult, bodies: Sequence[bytes] = ()) -> list[bytes]:
        """Return the requests as bytes on the wire. bodies: those to be sent instead of its own."""
        fields = {
            "host": url.netloc,
            "content-type": "application/json",
            "authorization": f"Bearer {self.key}",
            **self.headers,
        }
        head = f"POST {url.path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items())
        return [head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body for body in bodies or self.bodies()]


class Result(msgspec.Struct, frozen=True):
    """What came of a run. Latencies are in milliseconds, from when a request was due to the end of its answer."""

    requests: int
    errors: int
    seconds: float
    p50: float
    p99: float
    first_error: str = ""

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds if self.seconds else 0.0


class Client(asyncio.Protocol):
    """One connection: sends a request, reads to the end of the answer, says that it is free."""

    def __init__(self, done: Callable[["Client", bytes], None]) -> None:
        # All mutable state: the socket, the answer so far and where it ends (None: with its last chunk).
        self._done = done
        self._transport: asyncio.Transport | None = None
        self._seen = b""
        self._head = b""
        self._missing: int | None = None

    def __repr__(self) -> str:
        return f"<Client {'open' if self._transport else 'closed'}>"

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._done(self, b"connection lost")

    def send(self, request: bytes) -> None:
        """Send a request."""
        assert self._transport
        self._head = self._seen = b""
        self._transport.write(request)

    def close(self) -> None:
        """Close the socket."""
        if self._transport:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if not self._head:
            self._seen += data
            end = self._seen.find(b"\r\n\r\n")
            if end < 0:
                return
            self._head, data = self._seen[: end + 2].lower(), self._seen[end + 4 :]
            self._missing = _content_length(self._head)
            self._seen = b"\r\n"
        if self._missing is not None:
            self._missing -= len(data)
            whole = self._missing <= 0
        else:
            self._seen = (self._seen + data)[-7:]
            whole = self._seen.endswith(b"\r\n0\r\n\r\n")
        if whole:
            self._done(self, b"" if b" 200 " in self._head[:15] else self._head.partition(b"\r\n")[0])


def _content_length(head: bytes) -> int | None:
    _, found, rest = head.partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0]) if found else None


class Generator:
    """Keeps connections busy for a while, and remembers how long answers took."""

    def __init__(self, url: SplitResult, asked: Asked, rate: float | None, bodies: Sequence[bytes] = ()) -> None:
        """bodies: those to be sent instead of those of `asked`."""
        self._loop = asyncio.get_running_loop()
        self._url = url
        self._requests = asked.requests(url, bodies)
        self._rate = rate
        # All mutable state: requests sent, those waiting for a connection, when each one under way was due, free
        # connections, latencies in seconds, errors, whether the time is over, and the future of the end.
        self._sent = 0
        self._due: deque[float] = deque()
        self._under_way: dict[Client, float] = {}
        self._free: list[Client] = []
        self._latencies: list[float] = []
        self._errors: list[bytes] = []
        self._over = False
        self._ended: asyncio.Future[None] = self._loop.create_future()

    def __repr__(self) -> str:
        return f"<Generator {self._sent} sent, {len(self._under_way)} under way>"

    async def run(self, connections: int, seconds: float, limit: int | None = None) -> Result:
        """Generate load for so many seconds, or until so many requests were sent."""
        self._limit = limit or sys.maxsize
        self._free = [await self._connect() for _ in range(connections)]
        began = time.perf_counter()
        self._loop.call_later(seconds, self._stop)
        if self._rate:
            self._tick(began, 0)
        else:
            for client in list(self._free):
                self._begin(client, time.perf_counter())
        await self._ended
        seconds = time.perf_counter() - began
        for client in (*self._free, *self._under_way):
            client.close()
        return self._result(seconds)

    async def _connect(self) -> Client:
        _, client = await self._loop.create_connection(
            lambda: Client(self._on_done), self._url.hostname or "", self._url.port or 80
        )
        return client

    def _tick(self, began: float, number: int) -> None:
        """Open loop: what is due is sent when a connection is free, and counted from when it was due."""
        assert self._rate
        if self._over:
            return
        now = time.perf_counter()
        while (due := began + number / self._rate) <= now:
            number += 1
            self._due.append(due)
        self._drain()
        self._loop.call_later(due - now, self._tick, began, number)

    def _drain(self) -> None:
        while self._due and self._free:
            self._begin(self._free[-1], self._due.popleft())

    def _begin(self, client: Client, due: float) -> None:
        self._free.remove(client)
        self._under_way[client] = due
        self._sent += 1
        client.send(self._requests[self._sent % len(self._requests)])

    def _on_done(self, client: Client, error: bytes) -> None:
        due = self._under_way.pop(client, None)
        if due is None:
            return
        now = time.perf_counter()
        if error:
            self._errors.append(error)
        else:
            self._latencies.append(now - due)
        if self._sent >= self._limit:
            self._over = True
        if client.is_open:
            self._free.append(client)
        if self._over:
            self._end_if_done()
        elif self._rate:
            self._drain()
        elif client.is_open:
            self._begin(client, now)
        elif not self._under_way:
            self._stop()

    def _stop(self) -> None:
        self._over = True
        self._loop.call_later(_GIVE_UP, self._give_up)
        self._end_if_done()

    def _end_if_done(self) -> None:
        if not self._under_way and not self._ended.done():
            self._ended.set_result(None)

    def _give_up(self) -> None:
        if not self._ended.done():
            self._errors.extend([b"no answer"] * len(self._under_way))
            self._ended.set_result(None)

    def _result(self, seconds: float) -> Result:
        ordered = sorted(self._latencies)
        first = self._errors[0].decode("latin-1") if self._errors else ""
        return Result(
            requests=len(ordered),
            errors=len(self._errors),
            seconds=seconds,
            p50=percentile(ordered, 0.50) * 1000,
            p99=percentile(ordered, 0.99) * 1000,
            first_error=first,
        )


def percentile(ordered: list[float], share: float) -> float:
    """Return the value below which this share of the ordered values is; 0 without values."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def generate(url: str, asked: Asked, *, connections: int, seconds: float, rate: float | None) -> Result:
    """Put load on a URL."""
    return await Generator(urlsplit(url), asked, rate).run(connections, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, help="requests a second; without it as many as the connections carry")
    parser.add_argument("--limit", type=int, help="stop after so many requests")
    parser.add_argument("--asked", default="{}", help="JSON: prompt, stream, pace, model, key, headers")
    given = parser.parse_args()
    asked = msgspec.json.decode(given.asked, type=Asked)
    print(msgspec.json.encode(uvloop.run(_run(given, asked))).decode())


async def _run(given: argparse.Namespace, asked: Asked) -> Result:
    generator = Generator(urlsplit(given.url), asked, given.rate)
    return await generator.run(given.connections, given.seconds, given.limit)


if __name__ == "__main__":
    main()
