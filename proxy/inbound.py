"""HTTP/1.1 from clients: the protocol that uvicorn runs on each connection, in the place of its own.

What it does otherwise than uvicorn's, and why:

* The task that answers a request is cancelled as soon as its client goes. Nobody has to listen for that.
* The head of an answer waits for the first of its body for the rest of the event loop's turn, and the end of a body
  for nothing: an ordinary answer is one write to the socket where it would be three. Each costs 10 us.
* One timer for each connection, moved lazily, not a new one for each request.
* A body is kept in the pieces that it came in, and joined once.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Protocol, cast
from urllib.parse import unquote

import httptools

from proxy.errors import BadRequest

Headers = list[tuple[bytes, bytes]]
Message = Any  # ASGI's dictionaries
Application = Callable[[Any, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

_HIGH_WATER = 256 * 1024  # bytes of a request's body held while nobody takes them, before we stop reading
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}
_NO_BODY = frozenset((204, 304))

log = logging.getLogger(__name__)


class Settings(Protocol):
    """What we use of uvicorn.Config."""

    loaded_app: Any
    asgi_version: str
    root_path: str
    timeout_keep_alive: int


class Shared(Protocol):
    """What we use of uvicorn's ServerState: uvicorn shuts down what is in the sets, and waits for them."""

    connections: set[Any]
    tasks: set["asyncio.Task[None]"]
    default_headers: Headers
    total_requests: int


class Connection(asyncio.Protocol):
    """One connection of a client. Requests on it are answered one after the other."""

    def __init__(
        self,
        config: Settings,
        server_state: Shared,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.application: Application = config.loaded_app
        self.shared = server_state
        self.loop = _loop or asyncio.get_running_loop()
        self._config = config
        self._app_state = app_state
        # All mutable state, of the socket: the transport, None when it is over; the parser; whether reading is
        # paused; the future of those who wait for room to write; when an idle connection ends, and the timer.
        self.transport: asyncio.Transport | None = None
        self._parser: httptools.HttpRequestParser = httptools.HttpRequestParser(self)
        self._paused = False
        self.room: asyncio.Future[None] | None = None
        self._idle_until: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ends: dict[str, Any] = {}
        # Of its requests: the one that is answered now, those that came after it, the one whose body is coming,
        # the target and headers so far, and whether no more are answered.
        self._current: Exchange | None = None
        self._next: deque[Exchange] = deque()
        self._receiving: Exchange | None = None
        self._target = b""
        self._headers: Headers = []
        self._closing = False

    def __repr__(self) -> str:
        state = "closed" if self.transport is None else "busy" if self._current else "idle"
        return f"<Connection {state}, {len(self._next)} requests waiting>"

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._ends = {"server": _address(transport, "sockname"), "client": _address(transport, "peername")}
        self.shared.connections.add(self)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.shared.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self.resume_writing()
        self._next.clear()
        if self._current is not None:
            self._current.abandon()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._closing = True  # we go on in HTTP/1.1; what follows this request is not HTTP to the parser
            if self._receiving is not None:
                self._receiving.keep_alive = False
        except httptools.HttpParserError:
            self._refuse()

    def eof_received(self) -> None:
        """A client that will send no more wants no answer either: what is under way ends with the connection."""

    def pause_writing(self) -> None:
        self.room = self.loop.create_future()

    def resume_writing(self) -> None:
        room, self.room = self.room, None
        if room is not None and not room.done():
            room.set_result(None)

    # httptools callbacks

    def on_message_begin(self) -> None:
        self._idle_until = None
        self._target = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        version = self._parser.get_http_version()
        raw_path, path, query = split_target(self._target)
        scope = {
            "type": "http",
            "asgi": {"version": self._config.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "method": self._parser.get_method().decode("ascii"),
            "scheme": "http",
            "root_path": self._config.root_path,
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": self._headers,
            "state": self._app_state.copy(),
            **self._ends,
        }
        exchange = Exchange(self, scope, keep_alive=version == "1.1" and self._parser.should_keep_alive())
        self._receiving = exchange
        if self._current is None:
            self._answer(exchange)
        else:
            self._next.append(exchange)
            self.pause_reading()

    def on_body(self, data: bytes) -> None:
        if self._receiving is not None:
            self._receiving.feed(data)

    def on_message_complete(self) -> None:
        exchange, self._receiving = self._receiving, None
        if exchange is not None:
            exchange.feed_end()

    # Requests

    def _answer(self, exchange: "Exchange") -> None:
        self._current = exchange
        self.shared.total_requests += 1
        task = exchange.task = self.loop.create_task(exchange.run(self.application))
        self.shared.tasks.add(task)
        task.add_done_callback(self.shared.tasks.discard)

    def answered(self, exchange: "Exchange") -> None:
        """The answer is complete, or never will be. Called by the exchange, once."""
        self._current = None
        if self.transport is None:
            return
        if self._closing or not exchange.keep_alive:
            self.transport.close()
        elif self._next:
            self._answer(self._next.popleft())
        else:
            self.resume_reading()
            self._await_request()

    def shutdown(self) -> None:
        """Called by uvicorn: finish what is under way, and take no more."""
        self._closing = True
        self._next.clear()
        if self._current is not None:
            self._current.keep_alive = False
        elif self.transport is not None:
            self.transport.close()

    def _refuse(self) -> None:
        """What came is not HTTP. Nothing may follow it, so nothing else is answered either."""
        if self.transport is None:
            return
        if self._current is None:
            body = BadRequest("The request is not valid HTTP.").envelope()
            head = _status_line(400) + b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
            self.transport.write(head + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    # Flow and time

    def pause_reading(self) -> None:
        """Take no more from the socket for now."""
        if not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on reading, unless requests wait that came too early."""
        if self._paused and self.transport is not None and not self._next:
            self._paused = False
            self.transport.resume_reading()

    def _await_request(self) -> None:
        self._idle_until = self.loop.time() + self._config.timeout_keep_alive
        if self._timer is None:
            self._timer = self.loop.call_at(self._idle_until, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._idle_until is None or self.transport is None:
            return
        if self.loop.time() < self._idle_until:
            self._timer = self.loop.call_at(self._idle_until, self._on_timer)
        else:
            self.transport.close()


class Exchange:
    """One request and its answer, as ASGI sees them."""

    def __init__(self, connection: Connection, scope: dict[str, Any], *, keep_alive: bool) -> None:
        self._connection = connection
        self._scope = scope
        # All mutable state: whether the connection outlives it, and the task that answers it. Of the request: the
        # body not yet taken, whether that was all, and the future of whoever waits for more or for the client to go.
        # Of the answer: its head while it waits, the bytes that its body still must have (None: it is sent in chunks
        # or ends with the connection), whether in chunks, and whether it is begun and complete.
        self.keep_alive = keep_alive
        self.task: asyncio.Task[None] | None = None
        self._body: list[bytes] = []
        self._held = 0
        self._whole = False
        self._taken = False
        self._waiter: asyncio.Future[None] | None = None
        self._head = b""
        self._missing: int | None = None
        self._chunked = False
        self._begun = False
        self._complete = False

    def __repr__(self) -> str:
        state = "complete" if self._complete else "begun" if self._begun else "waiting"
        return f"<Exchange {self._scope['method']} {state}>"

    # Called by the connection

    async def run(self, application: Application) -> None:
        """Have the application answer, and make sure that something is answered."""
        try:
            await application(self._scope, self.receive, self.send)
        except asyncio.CancelledError:
            if self._connection.transport is not None:  # not the client, but a shutdown that waits no longer
                self._cut()
        except Exception:
            log.exception("an answer failed")
            self._fail()
        else:
            if not self._complete and self._connection.transport is not None:
                log.error("an answer was not completed")
                self._fail()

    def feed(self, data: bytes) -> None:
        """Take more of the request's body; what comes after the answer is dropped."""
        if self._complete:
            return
        self._body.append(data)
        self._held += len(data)
        if self._held > _HIGH_WATER:
            self._connection.pause_reading()
        self._wake()

    def feed_end(self) -> None:
        """The request is whole."""
        self._whole = True
        self._wake()

    def abandon(self) -> None:
        """The client is gone: nobody needs the answer."""
        self._wake()
        if self.task is not None and not self._complete:
            self.task.cancel()

    # ASGI

    async def receive(self) -> Message:
        while not self._body and not (self._whole and not self._taken):
            if self._complete or self._connection.transport is None:
                return {"type": "http.disconnect"}
            await self._wait()
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._held = 0
        self._taken = self._whole
        self._connection.resume_reading()
        return {"type": "http.request", "body": body, "more_body": not self._whole}

    async def send(self, message: Message) -> None:
        if self._connection.transport is None:
            return
        if message["type"] == "http.response.start":
            self._start(message["status"], message["headers"])
        else:
            self._send_body(message.get("body", b""), message.get("more_body", False))
        if (room := self._connection.room) is not None:
            await room

    async def _wait(self) -> None:
        if not self._whole and self._expects_continue():
            self._write(_CONTINUE)
        self._connection.resume_reading()
        self._waiter = self._connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _expects_continue(self) -> bool:
        return not self._begun and (b"expect", b"100-continue") in self._scope["headers"] and not self._held

    # The answer

    def _start(self, status: int, headers: Headers) -> None:
        if self._begun:
            raise RuntimeError("an answer was begun twice")
        all_headers = [*self._connection.shared.default_headers, *headers, *self._framing(status, headers)]
        if not self.keep_alive:
            all_headers.append((b"connection", b"close"))
        head = b"".join([_status_line(status), *[b"%b: %b\r\n" % header for header in all_headers], b"\r\n"])
        if not head.count(b"\n") == head.count(b"\r") == len(all_headers) + 2:
            raise RuntimeError("a header of an answer has a line break")
        self._begun = True
        self._head = head
        self._connection.loop.call_soon(self._flush)

    def _framing(self, status: int, headers: Headers) -> Headers:
        """Decide how the client knows where the body ends, and return the header that says so if there is none yet."""
        if self._scope["method"] == "HEAD" or status in _NO_BODY:
            self._missing = 0
            return []
        for name, value in headers:
            if name == b"content-length":
                self._missing = int(value)
                return []
        if self._scope["http_version"] == "1.1":
            self._chunked = True
            return [(b"transfer-encoding", b"chunked")]
        self.keep_alive = False
        return []

    def _send_body(self, data: bytes, more: bool) -> None:
        if not self._begun or self._complete:
            raise RuntimeError("a body without a head, or after its end")
        data = self._framed(data, more)
        if self._head:
            data, self._head = self._head + data, b""
        if data:
            self._write(data)
        if not more:
            self._end()

    def _framed(self, data: bytes, more: bool) -> bytes:
        if self._chunked:
            chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            return chunk if more else chunk + _LAST_CHUNK
        if self._missing is None:
            return data
        if self._scope["method"] == "HEAD":
            return b""
        self._missing -= len(data)
        if self._missing < 0 or (self._missing and not more):
            raise RuntimeError("a body is not as long as its head says")
        return data

    def _end(self) -> None:
        self._complete = True
        self._wake()
        self._connection.answered(self)

    def _flush(self) -> None:
        """Send a head that no body has taken along."""
        if self._head:
            head, self._head = self._head, b""
            self._write(head)

    def _write(self, data: bytes) -> None:
        if self._connection.transport is not None:
            self._connection.transport.write(data)

    def _fail(self) -> None:
        """Say that something is wrong: with a status where none was sent, else by breaking off."""
        if self._begun:
            self._cut()
        elif self._connection.transport is not None:
            self.keep_alive = False
            self._start(500, [(b"content-length", b"0")])
            self._send_body(b"", more=False)

    def _cut(self) -> None:
        """End the connection before the answer is complete, so that nobody takes it for complete."""
        self._complete = True
        self._flush()
        if self._connection.transport is None:
            return
        if self._chunked or self._missing is not None:
            self._connection.transport.close()
        else:
            self._connection.transport.abort()  # an orderly end would be the end of the body


@lru_cache(maxsize=64)
def _status_line(status: int) -> bytes:
    return b"HTTP/1.1 %d %b\r\n" % (status, _PHRASES.get(status, b""))


@lru_cache(maxsize=256)
def split_target(target: bytes) -> tuple[bytes, str, bytes]:
    """Return the raw path, the path with its escapes resolved, and the query of a request's target."""
    url = httptools.parse_url(target)
    raw = url.path or b"/"
    path = raw.decode("ascii", "replace")
    return raw, unquote(path) if "%" in path else path, url.query or b""


def _address(transport: asyncio.BaseTransport, which: str) -> tuple[str, int] | None:
    found = transport.get_extra_info(which)
    return (str(found[0]), int(found[1])) if isinstance(found, tuple) else None
