"""HTTP/1.1 to a local engine, over a unix socket or TCP: httptools on the running event loop.

A connection serves one exchange at a time. It belongs to its answer until the body is complete, then to the
pool; an answer that is given up before that takes its connection with it, which is how an engine learns that
nobody waits.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import lru_cache
from typing import Self, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from proxy.errors import (
    BetweenBytesTimeout,
    ConnectFailed,
    ConnectTimeout,
    FirstByteTimeout,
    MalformedAnswer,
    PoolTimeout,
    TruncatedAnswer,
    UpstreamError,
)
from proxy.transport import Body, Headers, Timeouts, check_head, check_target, request_lines

_READ_SIZE = 16 * 1024  # bytes taken from a socket at once; uvloop takes 256 KiB, which slow readers make us hold
_HIGH_WATER = 16 * 1024  # bytes of a body held for a slow reader before we stop reading from the socket
_OVERHEAD_LIMIT = 100 * 1024  # bytes in a row that are not body: heads, interim answers, sizes, trailers
_NO_BODY = frozenset((204, 304))
_CHUNKED = b"transfer-encoding: chunked\r\n\r\n"


class Limits(msgspec.Struct, frozen=True):
    """Of the connections to one endpoint. idle_timeout is in seconds.

    It is shorter than the 5 seconds after which uvicorn, and so vLLM, closes an idle connection.
    """

    max_connections: int = 1024
    max_idle: int = 256
    idle_timeout: float = 4.0


class Request(msgspec.Struct, frozen=True, gc=False):
    """A request ready for the wire. `head` ends with its empty line."""

    head: bytes
    body: Body
    bodiless_answer: bool


class LocalAnswer:
    """See proxy.transport.Answer."""

    __slots__ = (
        "_between_bytes", "_chunks", "_connection", "_error", "_pause", "_size", "_waiter", "_whole", "headers",
        "status",
    )  # fmt: skip

    def __init__(self, connection: "Connection", timeouts: Timeouts) -> None:
        # Mutable state: status and headers, 0 and [] until the head is there; the connection, None once
        # the exchange is over; how long the next bytes may take; the body bytes not yet taken and their number;
        # whether the body is complete or why it will never be; the future of whoever waits for any of this.
        self.status = 0
        self.headers: Headers = []
        self._connection: Connection | None = connection
        self._between_bytes = timeouts.between_bytes
        self._pause = timeouts.between_bytes if timeouts.first_chunk is None else timeouts.first_chunk
        self._chunks: list[bytes] = []
        self._size = 0
        self._whole = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        state = "whole" if self._whole else repr(self._error) if self._error else "open"
        return f"<LocalAnswer {self.status or 'no head'} {state}, {self._size} bytes unread>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._whole:
                raise StopAsyncIteration
            await self._wait(self._pause, BetweenBytesTimeout)
        return self._take()

    async def read(self, limit: int) -> bytes:
        parts: list[bytes] = []
        async for chunk in self:
            parts.append(chunk)
            limit -= len(chunk)
            if limit < 0:
                self.abort()
                raise MalformedAnswer("the body is larger than it may be")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def abort(self) -> None:
        self._chunks.clear()
        self._size = 0
        if self._connection is not None:
            self._connection.fail(TruncatedAnswer("it was abandoned by us"))

    async def close(self) -> None:
        self.abort()

    async def wait_for_head(self, first_byte: float | None) -> None:
        """Return when status and headers are set; raise why they never will be."""
        while not self.status:
            if self._error is not None:
                raise self._error
            await self._wait(first_byte, FirstByteTimeout)

    async def _wait(self, seconds: float | None, late: type[UpstreamError]) -> None:
        assert self._connection is not None
        self._connection.watch(seconds, late)
        self._waiter = self._connection.loop.create_future()  # asking for the running loop is a system call
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._waiter = None

    def _take(self) -> bytes:
        chunks, self._chunks = self._chunks, []
        self._size = 0
        self._pause = self._between_bytes
        if self._connection is not None:
            self._connection.resume_reading()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    # What follows is called by the connection.

    def begin(self, status: int, headers: Headers) -> None:
        self.status = status
        self.headers = headers
        self.wake()

    def receive(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)

    def end(self, error: Exception | None) -> None:
        self._connection = None
        self._whole = error is None
        self._error = error
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def unread(self) -> int:
        """Bytes received and not taken."""
        return self._size


class Connection(asyncio.BufferedProtocol):
    """One socket, and the exchange that is on it."""

    def __init__(self, pool: "LocalTransport") -> None:
        # Mutable state, of the socket: the transport (None until connected and when over), the parser,
        # whether reading is paused, the future of an upload that waits for room, the deadline with the error
        # that it means, and one timer, which is moved only when it fires too early or would fire too late.
        self._pool = pool
        self.loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._paused = False
        self._room: asyncio.Future[None] | None = None
        self._deadline: float | None = None
        self._late: type[UpstreamError] = FirstByteTimeout
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        # Of the exchange: its answer (None while idle), its upload, the headers so far, how many exchanges
        # there were before, and what has been seen of the answer.
        self._answer: LocalAnswer | None = None
        self._upload: asyncio.Task[None] | None = None
        self._headers: Headers = []
        self._served = 0
        self._heard = False
        self._overhead = 0
        self._bodiless = False
        self._until_eof = False
        self._complete = False
        self._reusable = False

    def __repr__(self) -> str:
        state = "closed" if self._transport is None else "idle" if self._answer is None else "busy"
        return f"<Connection {state}, {self._served} served>"

    @property
    def went_stale(self) -> bool:
        """It was used before, and ended without a byte of this answer: the request may be sent again."""
        return self._served > 0 and not self._heard

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    # The exchange

    async def exchange(self, request: Request, timeouts: Timeouts) -> LocalAnswer:
        """Send a request, and return its answer when the head is there."""
        self._heard = self._until_eof = self._complete = self._reusable = False
        self._overhead = 0
        self._bodiless = request.bodiless_answer
        answer = self._answer = LocalAnswer(self, timeouts)
        if isinstance(request.body, bytes):
            assert self._transport is not None
            self._transport.write(request.head + request.body)
        else:
            upload = self._send_chunks(request.head, request.body, timeouts.first_byte)
            self._upload = self.loop.create_task(upload)
        await answer.wait_for_head(timeouts.first_byte)
        return answer

    async def _send_chunks(self, head: bytes, body: AsyncIterator[bytes], first_byte: float | None) -> None:
        """Upload a body of unknown length. Every chunk sent starts the wait for the answer anew."""
        try:
            await self._write(head)
            async for chunk in body:
                if chunk:
                    await self._write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                self._expect_head(first_byte)
            await self._write(b"0\r\n\r\n")
            self._expect_head(first_byte)
        except Exception as error:
            self.fail(error)
        finally:
            if (aclose := getattr(body, "aclose", None)) is not None:
                await aclose()

    async def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)
        if self._room is not None:
            await self._room

    def _expect_head(self, first_byte: float | None) -> None:
        if self._answer is not None and not self._answer.status:
            self.watch(first_byte, FirstByteTimeout)

    def fail(self, error: Exception) -> None:
        """End the connection, and its exchange with this error."""
        answer, self._answer = self._answer, None
        self.abort()
        if answer is not None:
            if isinstance(error, UpstreamError):
                error.address = self._pool.address
            answer.end(error)

    def abort(self) -> None:
        """End the connection at once. Idempotent."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._deadline = None
        self._end_upload()
        self._pool.forget(self)

    def _end_upload(self) -> bool:
        """Return True if the whole request had been sent; stop sending it otherwise."""
        upload, self._upload = self._upload, None
        if upload is None or upload.done():
            return True
        if upload is not asyncio.current_task(self.loop):
            upload.cancel()
        return False

    def _finish(self) -> None:
        """The answer is complete: the connection goes back to the pool, if it can."""
        answer, self._answer = self._answer, None
        assert answer is not None
        self._served += 1
        self._deadline = None
        if self._end_upload() and self._reusable:
            self.resume_reading()
            self._pool.checkin(self)
        else:
            self.abort()
        answer.end(None)

    def resume_reading(self) -> None:
        """Somebody has taken what was received."""
        if self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    # Deadlines

    def watch(self, seconds: float | None, late: type[UpstreamError]) -> None:
        """Fail with `late` unless something is received, or watched for, within so many seconds."""
        if seconds is None:
            self._deadline = None
            return
        self._late = late
        self._deadline = self.loop.time() + seconds
        if self._timer is None or self._timer_at > self._deadline:
            self._set_timer(self._deadline)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self.loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self.loop.time() < self._deadline:
            self._set_timer(self._deadline)
        elif self._answer is None:
            self.abort()
        else:
            self.fail(self._late())

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._pool.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.feed(self._pool.buffer[:nbytes])

    def feed(self, data: memoryview) -> None:
        """Take what was received; nothing keeps a reference to it."""
        answer = self._answer
        if answer is None:  # nobody asked for anything
            self.abort()
            return
        self._heard = True
        unread = answer.unread
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._complete:
                self.fail(_malformed(error))
                return
            self._reusable = False
        if self._complete:
            self._finish()
        elif answer.unread > unread:
            self._overhead = 0
            self._deadline = None
            answer.wake()
            self._pause_if_full(answer.unread)
        else:
            self._count_overhead(len(data))

    def _pause_if_full(self, unread: int) -> None:
        if unread > _HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _count_overhead(self, size: int) -> None:
        self._overhead += size
        if self._overhead > _OVERHEAD_LIMIT:
            self.fail(MalformedAnswer("endless headers"))

    def eof_received(self) -> None:
        if self._answer is not None and self._until_eof:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self.resume_writing()
        error = TruncatedAnswer("in the middle" if self._heard else "before its first byte")
        error.__cause__ = exc
        self.fail(error)

    def pause_writing(self) -> None:
        self._room = self.loop.create_future()

    def resume_writing(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    # httptools callbacks

    def on_message_begin(self) -> None:
        if self._complete:
            raise MalformedAnswer("bytes after its end")
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is not None and not self._answer.status:  # else a trailer
            self._headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            return
        assert self._answer is not None
        head = check_head(status, self._headers)
        if self._bodiless:
            self._end_without_body()
        elif status not in _NO_BODY:
            self._until_eof = head.length is None and not head.chunked
        self._deadline = None
        self._answer.begin(status, head.headers)

    def _end_without_body(self) -> None:
        """The answer to HEAD ends here, whatever its length says; the parser cannot know, and is replaced."""
        self._complete = True
        self._reusable = self._parser.should_keep_alive()
        self._parser = httptools.HttpResponseParser(self)

    def on_body(self, data: bytes) -> None:
        if self._complete:
            raise MalformedAnswer("bytes after its end")
        assert self._answer is not None
        self._answer.receive(data)

    def on_message_complete(self) -> None:
        if self._answer is not None and self._answer.status and not self._complete:
            self._complete = True
            self._reusable = self._parser.should_keep_alive()


class LocalTransport:
    """proxy.transport.Transport to one address, `unix:/path` or `http://host:port`: a pool of connections."""

    def __init__(self, address: str, limits: Limits | None = None) -> None:
        # Mutable state: the connections that exist; those of them that are idle, in order of use; how many
        # more there may be; the futures of those who wait for one, each of which gets a connection or, as
        # None, the right to make one; whether all is over.
        self.address = address
        self._limits = limits or Limits()
        self._connections: set[Connection] = set()
        self._idle: dict[Connection, None] = {}
        self._free = self._limits.max_connections
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        self._closed = False
        self._host = _host(address)
        self.buffer = memoryview(bytearray(_READ_SIZE))  # what each connection reads into, and empties at once

    def __repr__(self) -> str:
        used = f"{len(self._connections)} open, {len(self._idle)} idle"
        return f"<LocalTransport {self.address}: {used}, {self._free} free, {len(self._waiting)} waiting>"

    async def send(self, method: bytes, path: bytes, headers: Headers, body: Body, timeouts: Timeouts) -> LocalAnswer:
        request = self._request(method, path, headers, body)
        connection = self._take_idle() or await self._acquire(timeouts.connect)
        try:
            return await connection.exchange(request, timeouts)
        except TruncatedAnswer:
            if not (connection.went_stale and isinstance(body, bytes)):
                raise
        fresh = await self._acquire(timeouts.connect)
        return await fresh.exchange(request, timeouts)

    @property
    def is_idle(self) -> bool:
        return self._free + len(self._idle) == self._limits.max_connections

    async def close(self) -> None:
        self._closed = True
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(ConnectFailed("we are closing", address=self.address))
        for connection in list(self._connections):
            connection.fail(TruncatedAnswer("we are closing"))
        await asyncio.sleep(0)  # the event loop closes the sockets in its next turn

    def _request(self, method: bytes, path: bytes, headers: Headers, body: Body) -> Request:
        lines = [_start(method, path, self._host), *request_lines(headers)]
        lines.append(b"content-length: %d\r\n\r\n" % len(body) if isinstance(body, bytes) else _CHUNKED)
        return Request(b"\r\n".join(lines), body, method == b"HEAD")

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.is_open:
                return connection
        return None

    async def _acquire(self, seconds: float | None) -> Connection:
        """Return a new connection, or one that another request has just left, if there may be no more."""
        deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
        if self._closed:
            raise ConnectFailed("we are closing", address=self.address)
        while self._free == 0:
            given = await self._queue(deadline)
            if given is None:
                return await self._connect(deadline)
            if given.is_open:
                return given
        self._free -= 1
        return await self._connect(deadline)

    async def _queue(self, deadline: float | None) -> Connection | None:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Connection | None] = loop.create_future()
        timer = None if deadline is None else loop.call_at(deadline, self._expire, waiter)
        self._waiting.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None:
                self._give_back(waiter.result())
            raise
        finally:
            if timer is not None:
                timer.cancel()
            with suppress(ValueError):
                self._waiting.remove(waiter)

    def _expire(self, waiter: asyncio.Future[Connection | None]) -> None:
        if not waiter.done():
            waiter.set_exception(PoolTimeout(address=self.address))

    async def _connect(self, deadline: float | None) -> Connection:
        """Make a connection with the right to one, which is given back if it fails."""
        connection = Connection(self)
        try:
            async with asyncio.timeout_at(deadline):
                await self._open(connection)
            if not connection.is_open:
                raise ConnectionResetError
        except BaseException as error:
            connection.abort()
            self._give_back(None)
            if isinstance(error, OSError):
                late = isinstance(error, TimeoutError)
                failure = ConnectTimeout() if late else ConnectFailed(type(error).__name__)
                failure.address = self.address
                raise failure from error
            raise
        self._connections.add(connection)
        return connection

    async def _open(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        if self.address.startswith("unix:"):
            await loop.create_unix_connection(lambda: connection, self.address.removeprefix("unix:"))
        else:
            parts = urlsplit(self.address)
            await loop.create_connection(lambda: connection, parts.hostname or "", parts.port or 80)

    def _give_back(self, given: Connection | None) -> None:
        """Pass a connection, or the right to make one, to whoever waits for it."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(given)
                return
        if given is None:
            self._free += 1
        elif self._closed or len(self._idle) >= self._limits.max_idle:
            given.abort()
        else:
            self._idle[given] = None
            given.watch(self._limits.idle_timeout, FirstByteTimeout)

    # What follows is called by the connections.

    def checkin(self, connection: Connection) -> None:
        """A connection has completed its exchange and can serve another."""
        self._give_back(connection)

    def forget(self, connection: Connection) -> None:
        """A connection has ended. Idempotent."""
        if connection in self._connections:
            self._connections.remove(connection)
            self._idle.pop(connection, None)
            self._give_back(None)


@lru_cache(maxsize=256)
def _start(method: bytes, path: bytes, host: bytes) -> bytes:
    check_target(method, path)
    return b"%b %b HTTP/1.1\r\nhost: %b" % (method, path, host)


def _host(address: str) -> bytes:
    if address.startswith("unix:"):
        return b"localhost"
    parts = urlsplit(address)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"address {address!r}: expected unix:/path or http://host:port")
    return parts.netloc.rpartition("@")[2].encode("ascii")


def _malformed(error: Exception) -> MalformedAnswer:
    """Say what the parser did not like, or what our own callback inside it raised."""
    ours = error.__context__
    malformed = MalformedAnswer(ours.reason if isinstance(ours, MalformedAnswer) else _reason(error))
    malformed.__cause__ = error
    return malformed


def _reason(error: Exception) -> str:
    return "it switches protocols" if isinstance(error, httptools.HttpParserUpgrade) else str(error)
