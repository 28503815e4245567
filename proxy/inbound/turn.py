"""One request and its answer, as ASGI sees them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from proxy.inbound import heads
from proxy.inbound.heads import Headers

Message = Any  # ASGI's dictionaries
Application = Callable[[Any, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

_HIGH_WATER = 256 * 1024  # bytes of a request's body held while nobody takes them, before we stop reading
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_NO_BODY = frozenset((204, 304))

log = logging.getLogger(__name__)


def _is_expectation(header: tuple[bytes, bytes]) -> bool:
    return header[0] == b"expect" and header[1].lower() == b"100-continue"


class Defaults(Protocol):
    """Where the headers of every answer are."""

    default_headers: Headers


class Line(Protocol):
    """What a turn needs of its connection. transport: None when it is over. room: set while writing has to wait."""

    @property
    def transport(self) -> asyncio.Transport | None: ...

    @property
    def room(self) -> "asyncio.Future[None] | None": ...

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    @property
    def shared(self) -> Defaults: ...

    def answered(self, turn: "Turn") -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Turn:
    """One request and its answer, as ASGI sees them."""

    __slots__ = (
        "_abandoned", "_body", "_chunked", "_complete", "_connection", "_head", "_held", "_missing", "_scope", "_taken",
        "_waiter", "_when_gone", "_whole", "begun", "keep_alive", "task",
    )  # fmt: skip

    def __init__(self, connection: Line, scope: dict[str, Any], *, keep_alive: bool) -> None:
        self._connection = connection
        self._scope = scope
        # All mutable state: whether the connection outlives it, and the task that answers it. Of the request: the
        # body not yet taken, whether that was all, and the future of whoever waits for more or for the client to go.
        # Of the answer: its head while it waits, the bytes that its body still must have (None: it is sent in chunks
        # or ends with the connection), whether in chunks, whether it is begun and complete, and whether nobody needs
        # it any more; and what is called when the client goes, where its task is not to be cancelled then.
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
        self.begun = False
        self._complete = False
        self._abandoned = False
        self._when_gone: Callable[[], object] | None = None
        scope["extensions"] = {"polyvox.client": self}

    def __repr__(self) -> str:
        state = "complete" if self._complete else "begun" if self.begun else "waiting"
        return f"<Turn {self._scope['method']} {state}>"

    # Called by the connection

    async def run(self, application: Application) -> None:
        """Have the application answer, and make sure that something is answered."""
        try:
            await application(self._scope, self.receive, self.send)
        except asyncio.CancelledError:
            if not self._abandoned:  # it was not for the client, but for a shutdown that waits no longer
                self._cut()
        except Exception:
            log.exception("an answer failed")
            self._fail()
        else:
            if not self._complete and not self._abandoned:
                log.error("an answer was not completed")
                self._fail()
        finally:
            self._scope.pop("extensions", None)  # it leads back here, and a cycle would be left to the collector

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
        """Nobody needs the answer any more: the client is gone, or was told that its request is broken."""
        if self._complete or self._abandoned:
            return
        self._abandoned = True
        self._head = b""
        self._wake()
        if self._when_gone is not None:
            self._when_gone()
        elif self.task is not None:
            self.task.cancel()

    def when_gone(self, call: Callable[[], object] | None) -> None:
        """Have this called when the client goes, instead of ending the task; None: end it, as usual."""
        self._when_gone = call

    # ASGI

    async def receive(self) -> Message:
        while not self._body and not (self._whole and not self._taken):
            if self._complete or self._abandoned:
                return {"type": "http.disconnect"}
            await self._wait()
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._held = 0
        self._taken = self._whole
        self._connection.resume_reading()
        return {"type": "http.request", "body": body, "more_body": not self._whole}

    async def send(self, message: Message) -> None:
        if self._abandoned:
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
        return not self.begun and not self._held and any(map(_is_expectation, self._scope["headers"]))

    # The answer

    def _start(self, status: int, headers: Headers) -> None:
        if self.begun:
            raise RuntimeError("an answer was begun twice")
        all_headers = [*self._connection.shared.default_headers, *headers, *self._framing(status, headers)]
        if not self.keep_alive:
            all_headers.append((b"connection", b"close"))
        self._head = heads.encode(status, all_headers)
        self.begun = True
        if self._missing is None:  # where the length is known the body is there as well
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
        if not self.begun or self._complete:
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
        if self.begun:
            self._cut()
        elif not self._abandoned:
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
