"""An answer that is translated while it passes."""

from collections.abc import Callable
from typing import Protocol, Self

from proxy.errors import MalformedAnswer, UpstreamError
from proxy.transport import Answer, Headers

_LARGEST = 64 * 1024 * 1024  # bytes; a document is translated as a whole


class Translation(Protocol):
    """Bytes in, bytes out. `complete`: all of the answer has been given back, whatever may still come."""

    complete: bool

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes, cut anywhere; return what they give, perhaps nothing. May raise an UpstreamError."""
        ...

    def end(self) -> bytes:
        """The body has ended: return the rest. Raises an UpstreamError if it ended too early."""
        ...


class Translated:
    """See proxy.transport.Answer. headers: those of the translation, which says its own length if it knows one."""

    def __init__(self, answer: Answer, headers: Headers, translation: Translation) -> None:
        # All mutable state: the answer, how far its translation is, and whether the answer has ended.
        self.headers = headers
        self._answer = answer
        self._translation = translation
        self._ended = False

    def __repr__(self) -> str:
        return f"<Translated {self._answer!r} by {self._translation!r}>"

    @property
    def status(self) -> int:
        return self._answer.status

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._ended:
            if data := await self._next():
                return data
        raise StopAsyncIteration

    async def _next(self) -> bytes:
        try:
            return self._translation.feed(await anext(self._answer))
        except StopAsyncIteration:
            self._ended = True
            return self._translation.end()
        except UpstreamError:
            if not self._translation.complete:
                raise
            self._ended = True
            return b""

    async def read(self, limit: int) -> bytes:
        parts: list[bytes] = []
        async for data in self:
            parts.append(data)
            limit -= len(data)
            if limit < 0:
                await self.close()
                raise MalformedAnswer("the body is larger than it may be")
        return b"".join(parts)

    def abort(self) -> None:
        self._answer.abort()

    async def close(self) -> None:
        await self._answer.close()


class Document:
    """The Translation of a body that is translated when all of it is there."""

    def __init__(self, translate: Callable[[bytes], bytes]) -> None:
        # All mutable state: the body so far.
        self.complete = False
        self._translate = translate
        self._parts: list[bytes] = []
        self._size = 0

    def __repr__(self) -> str:
        return f"<Document {self._size} bytes>"

    def feed(self, data: bytes) -> bytes:
        self._parts.append(data)
        self._size += len(data)
        if self._size > _LARGEST:
            raise MalformedAnswer("the body is larger than it may be")
        return b""

    def end(self) -> bytes:
        return self._translate(b"".join(self._parts))
