"""The cache of answers: what is kept of one, and what a store of them can do.

A store that is in memory answers at once; one elsewhere gives back something to wait for. Whoever asks looks at which
it is, since waiting for nothing costs as much as the look-up itself.
"""

from collections.abc import Awaitable
from typing import Protocol

import msgspec

from proxy.accounting import Usage

KEY_BYTES = 32  # of a key: SCOPE_BYTES that tell whose answers these are, then a digest
SCOPE_BYTES = 8
ENTRY_OVERHEAD = 1024  # bytes that an entry takes beside its body, counted generously


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A complete, successful answer.

    model: that gave it. endpoint: of that. name: the name of the model as the body has it. operation: one of
    telemetry.OPERATIONS. stream: the body is an event stream, with its usage in it; else it is one document. usage,
    finish_reason: what was read of it, None where it did not tell. stored_at: in seconds since 1970. ttl: seconds.
    """

    model: str
    endpoint: str
    name: str
    operation: str
    stream: bool
    content_type: bytes
    body: bytes
    stored_at: float
    ttl: float
    usage: Usage | None = None
    finish_reason: str | None = None

    def age(self, now: float) -> float:
        """Return the seconds since it was stored, none of them negative: clocks of machines differ."""
        return max(now - self.stored_at, 0.0)

    def is_fresh(self, now: float) -> bool:
        return now - self.stored_at < self.ttl

    def size(self) -> int:
        """Return the bytes that it is counted with."""
        return len(self.body) + ENTRY_OVERHEAD


class Claim(msgspec.Struct, frozen=True, gc=False):
    """The right to generate the answer of a key, where several replicas share a store. token: of the fence.

    A store that is of one process gives none: there, requests that are alike find each other (proxy/cache/flight.py).
    """

    key: bytes
    token: int


class Stats(msgspec.Struct, frozen=True, gc=False):
    """What a store holds, and what it has done since it was opened.

    evicted: to make room; what is too old is not counted. entries, bytes: None where that is not known without looking
    at all of them.
    """

    entries: int | None
    bytes: int | None
    stored: int
    evicted: int


class Store(Protocol):
    """Keeps entries by their keys, for the ttl of each at most. It never raises for what goes wrong: that is a miss."""

    @property
    def is_shared(self) -> bool:
        """Say whether it is that of all workers, rather than one of each."""
        ...

    def get(self, key: bytes) -> "Entry | Awaitable[Entry | None] | None":
        """Return the entry of a key while it is fresh."""
        ...

    def claim(self, key: bytes, seconds: float) -> "Claim | Entry | Awaitable[Claim | Entry | None] | None":
        """Ask to generate the answer of a key, alone among replicas.

        While another replica generates it, wait so many seconds at most, and return its entry if it comes. None: go on
        without a claim, as there is nobody to share with, or the store does not answer.
        """
        ...

    def put(self, key: bytes, entry: Entry, claim: Claim | None = None) -> "Awaitable[None] | None":
        """Keep an entry, in the place of another if there is one; not under a claim that is no longer the newest."""
        ...

    def release(self, claim: Claim) -> "Awaitable[None] | None":
        """Give a claim back under which nothing was put: whoever waits may try."""
        ...

    def purge(self, model: str | None = None, prefix: bytes = b"") -> "Awaitable[int] | int":
        """Drop the entries of a model (None: of all) whose keys begin like this; return how many there were."""
        ...

    def stats(self) -> "Awaitable[Stats] | Stats": ...

    def told(self) -> Stats:
        """Return what it knows without asking anybody."""
        ...

    async def close(self) -> None:
        """Give back what it holds open."""
        ...
