"""An upstream that plays a script on raw sockets and remembers what it received."""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

DEADLINE = 60.0


class Step(Enum):
    """What the upstream does between sending bytes."""

    CLOSE = auto()
    RESET = auto()
    STALL = auto()  # until release() or until the peer is gone
    PING = auto()  # comments of an event stream, each a chunk, until the peer is gone


Play = Sequence[bytes | Step]


@dataclass
class Received:
    """A request as it came; header names lower-case, in their order."""

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    connection: int

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]


@dataclass
class ScriptedUpstream:
    """Answers the nth request with the nth play, then always with the last.

    With `read_requests` off it plays as soon as somebody connects.
    """

    plays: Sequence[Play]
    read_requests: bool = True
    address: str = ""
    requests: list[Received] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    sent: int = 0
    _release: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def release(self) -> None:
        """Let every stall go on."""
        self._release.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        try:
            await self._converse(reader, writer, self.connections)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError, ssl.SSLError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            if self.read_requests:
                self.requests.append(await _read_request(reader, number))
            play = self.plays[min(max(len(self.requests) - 1, 0), len(self.plays) - 1)]
            for step in play:
                if await self._perform(step, reader, writer):
                    return

    async def _perform(self, step: bytes | Step, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Return True when the connection is over."""
        if isinstance(step, bytes):
            writer.write(step)
            await writer.drain()
            self.sent += len(step)
            await asyncio.sleep(0)
            return False
        if step is Step.STALL:
            return await self._stall(reader)
        if step is Step.PING:
            return await _ping(reader, writer)
        if step is Step.RESET:
            _reset(writer)
        return True

    async def _stall(self, reader: asyncio.StreamReader) -> bool:
        gone = asyncio.ensure_future(reader.read(1))
        released = asyncio.ensure_future(self._release.wait())
        await asyncio.wait((gone, released), return_when=asyncio.FIRST_COMPLETED)
        over = gone.done()
        for waiting in (gone, released):
            waiting.cancel()
        await asyncio.gather(gone, released, return_exceptions=True)
        return over

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def upstream(
    *plays: Play, unix: Path | None = None, read_requests: bool = True, tls: ssl.SSLContext | None = None
) -> AsyncIterator[ScriptedUpstream]:
    """Serve plays on a unix socket or on a free loopback port, there over TLS if there is a context for it."""
    scripted = ScriptedUpstream(plays, read_requests)
    if unix is not None:
        server = await asyncio.start_unix_server(scripted.serve, str(unix))
        scripted.address = f"unix:{unix}"
    else:
        server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0, ssl=tls)
        scripted.address = f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield scripted
    finally:
        server.close()
        await scripted.close()


async def eventually(condition: Callable[[], bool]) -> None:
    """Return when a condition holds; fail after DEADLINE seconds."""
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.001)


def ok(body: bytes = b"", *headers: bytes, status: bytes = b"200 OK") -> bytes:
    """An answer with a content-length."""
    lines = [b"HTTP/1.1 " + status, b"content-length: %d" % len(body), *headers, b"", body]
    return b"\r\n".join(lines)


def chunked(*chunks: bytes) -> bytes:
    """A complete chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


async def _read_request(reader: asyncio.StreamReader, connection: int) -> Received:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    method, target, _ = first.split(b" ")
    headers = [(name.lower(), value) for name, value in (line.split(b": ", 1) for line in lines)]
    return Received(method, target, headers, await _read_body(reader, dict(headers)), connection)


async def _read_body(reader: asyncio.StreamReader, headers: dict[bytes, bytes]) -> bytes:
    if headers.get(b"transfer-encoding") != b"chunked":
        return await reader.readexactly(int(headers.get(b"content-length", b"0")))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return body


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _ping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    gone = asyncio.ensure_future(reader.read(1))
    while not gone.done():
        writer.write(b"8\r\n: ping\n\n\r\n")
        await asyncio.wait((gone,), timeout=0.01)
    return True
