"""How long a client waits for its answer: the header `x-request-timeout`, in seconds."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Mapping
from time import monotonic
from typing import Self, TypeVar

from proxy.errors import BadRequest, DeadlinePassed

T = TypeVar("T")

HEADER = b"x-request-timeout"
_SECONDS = re.compile(rb"[0-9]{1,9}(\.[0-9]{1,9})?").fullmatch


class Deadline:
    """The moment at which a request ends, whatever it waits for: a queue, an engine, or more of its answer.

    Times are those of time.monotonic.
    """

    __slots__ = ("_at",)

    def __init__(self, at: float) -> None:
        self._at = at

    def __repr__(self) -> str:
        return f"<Deadline at {self._at:.3f}>"

    @classmethod
    def of(cls, headers: Mapping[bytes, bytes]) -> Self | None:
        """Return the deadline that the headers of a request that is here now ask for, None for none.

        Raises BadRequest where the value is no number of seconds above 0.
        """
        value = headers.get(HEADER)
        return None if value is None else cls(monotonic() + _seconds(value))

    def remaining(self) -> float:
        """Return the seconds until then, 0.0 if it has passed."""
        return max(self._at - monotonic(), 0.0)

    def header(self) -> tuple[bytes, bytes]:
        """Return the header that tells another server what remains. Raises DeadlinePassed if nothing does."""
        remaining = round(self.remaining(), 3)
        if not remaining:
            raise DeadlinePassed
        return HEADER, b"%.3f" % remaining

    async def bound(self, work: Awaitable[T]) -> T:
        """Wait for something. Raises DeadlinePassed, with the work cancelled, if it takes too long."""
        bounds = asyncio.timeout(self.remaining())
        try:
            async with bounds:
                return await work
        except TimeoutError:
            if bounds.expired():
                raise DeadlinePassed from None
            raise

    async def bounded(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pass bytes on as they come. Raises DeadlinePassed at the moment, whether bytes come or not."""
        while self.remaining():
            try:
                data = await self.bound(anext(body))
            except StopAsyncIteration:
                return
            yield data
        raise DeadlinePassed


def _seconds(value: bytes) -> float:
    seconds = float(value) if _SECONDS(value) else 0.0
    if not seconds:
        raise BadRequest("x-request-timeout: expected seconds as a number above 0, such as 30 or 2.5",
                         param="x-request-timeout")  # fmt: skip
    return seconds
