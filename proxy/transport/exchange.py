"""One HTTP/2 stream as its reader sees it: what has come of the answer, and the wait for more."""

import asyncio
import re

import httpcore2

from proxy.errors import MalformedAnswer, UpstreamError
from proxy.transport import Headers

_STATUS = re.compile(rb"[1-9][0-9]{2}").fullmatch
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+").fullmatch
_FORBIDDEN = re.compile(rb"[\r\n\0]").search
_OF_CONNECTIONS = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))


class Exchange:
    """A request and its answer on one stream of a connection."""

    def __init__(self, stream: int, heard: int) -> None:
        # Mutable state: status (0 until the head is there) and headers; the body's bytes that nobody took yet,
        # and the flow-control credit that they hold; whether the body is whole, and whether the request was
        # sent to its end; why the answer will never be whole, and whether the server said that it did nothing;
        # the futures of those who wait for a change.
        self.stream = stream
        self.heard_before = heard
        self.status = 0
        self.headers: Headers = []
        self._chunks: list[bytes] = []
        self._held = 0
        self.whole = False
        self.sent = False
        self.error: UpstreamError | None = None
        self.unprocessed = False
        self._waiting: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        state = "whole" if self.whole else repr(self.error) if self.error else "open"
        return f"<Exchange {self.stream}: {self.status or 'no head'}, {state}, {self._held} bytes held>"

    async def head(self, seconds: float | None) -> tuple[int, Headers]:
        """Return status and headers; httpcore2.ReadTimeout if they do not come in so many seconds."""
        while not self.status:
            if self.error is not None:
                raise self.error
            await self.change(seconds, httpcore2.ReadTimeout)
        return self.status, self.headers

    async def body(self, seconds: float | None) -> tuple[bytes, int]:
        """Return the next bytes, b"" at the end, with the credit that they held."""
        while not self._chunks:
            if self.error is not None:
                raise self.error
            if self.whole:
                return self.drop()
            await self.change(seconds, httpcore2.ReadTimeout)
        return self.drop()

    def drop(self) -> tuple[bytes, int]:
        """Return what is there, and forget it."""
        chunks, held = self._chunks, self._held
        self._chunks, self._held = [], 0
        return b"".join(chunks), held

    async def change(self, seconds: float | None, late: type[Exception]) -> None:
        """Return when something has happened; raise `late` if nothing does."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiting.add(waiter)
        timer = None if seconds is None else loop.call_later(seconds, _expire, waiter, late)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)
            if timer is not None:
                timer.cancel()

    # What follows is called by the connection.

    def begin(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Take the head; MalformedAnswer if it is none."""
        status, kept = _checked(headers)
        if self.error is None:
            self.status, self.headers = status, kept
            self.wake()

    def receive(self, data: bytes, held: int) -> None:
        """Take bytes of the body, and the credit that they hold, which padding adds to."""
        if data and self.error is None:
            self._chunks.append(data)
        self._held += held
        self.wake()

    def end(self) -> None:
        """The server has said all."""
        if not self.status:
            self.fail(MalformedAnswer("it has no head"))
        self.whole = self.error is None
        self.wake()

    def fail(self, error: UpstreamError, *, unprocessed: bool = False) -> None:
        """The answer will not be whole. What came of its body is still given first."""
        if not self.whole and self.error is None:
            self.error = error
            self.unprocessed = unprocessed
            self.wake()

    def wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)


def _expire(waiter: asyncio.Future[None], late: type[Exception]) -> None:
    if not waiter.done():
        waiter.set_exception(late())


def _checked(raw: list[tuple[bytes, bytes]]) -> tuple[int, Headers]:
    """Return status and headers of a head that is well formed (RFC 9113, section 8.2 and 8.3)."""
    headers = [(bytes(name), bytes(value)) for name, value in raw if not name.startswith(b":")]
    pseudo = [(bytes(name), bytes(value)) for name, value in raw if name.startswith(b":")]
    if len(pseudo) != 1 or pseudo[0][0] != b":status" or not _STATUS(pseudo[0][1]):
        raise MalformedAnswer("it has no single status")
    for name, value in headers:
        if not _NAME(name) or _FORBIDDEN(value):
            raise MalformedAnswer("a header has a wrong name or value")
        if name in _OF_CONNECTIONS:
            raise MalformedAnswer("a header belongs to HTTP/1.1")
    return int(pseudo[0][1]), headers
