"""One generation that several requests wait for: who comes late gets what was there before, and then what follows.

The bytes are put in by one task and read by each request at its own speed. They are put in no faster than the fastest
reads, so that what one request reads alone is bounded as without a flight. All of them are kept, for those who come
later and for the cache, up to a limit. Beyond it nobody may join any more, and only what somebody still has to read is
kept: who is slower than the fastest by more than the limit is let go.
"""

import asyncio
from typing import Any, Self

import msgspec

from proxy.cache import Entry
from proxy.errors import TruncatedAnswer, UpstreamError
from proxy.reply import Reply

_AHEAD = 256 * 1024  # bytes that may be put in before anybody takes them


class Flight(msgspec.Struct, eq=False):
    """What there is of one answer, and who waits for it. Members are known by what they joined with.

    name: that the model has in the answer. limit: bytes of the whole answer that are kept. All else is mutable state.

    task: what is cancelled when no member is left. reply: to who began it, once it is there. source: the endpoint that
    it is from. streams: it is a stream that all read. over: with an entry if it is whole, or an error. similarity: of
    an entry's question to the one that was asked, where that is another.
    """

    name: str
    limit: int
    task: "asyncio.Task[Any] | None" = None
    reply: Reply | None = None
    source: str = ""
    streams: bool = False
    over: bool = False
    entry: Entry | None = None
    similarity: float | None = None
    error: Exception | None = None
    # The members, with their readers if they read as it comes; who waits for more of it, or for somebody to take some.
    _members: "dict[object, Reader | None]" = {}
    _waiting: "list[asyncio.Future[None]]" = []
    _room: "asyncio.Future[None] | None" = None
    # The bytes of a stream, how many pieces of them are gone at the front, and how many bytes there were.
    _pieces: list[bytes] = []
    _gone: int = 0
    _size: int = 0

    def __repr__(self) -> str:
        state = "over" if self.over else "under way"
        return f"<Flight {state}, {len(self._members)} members, {self._size} bytes>"

    # Members

    def join(self, member: object, *, reads: bool) -> None:
        """Somebody waits for the answer, until it leaves. reads: as it comes, if it is a stream."""
        self._members[member] = Reader(self) if reads else None

    def leave(self, member: object) -> bool:
        """Somebody does not wait any more. The last to leave ends the generation. Say whether it goes on."""
        self._members.pop(member, None)
        self._make_room()
        if not self._members and self.task is not None and not self.over:
            self.task.cancel()
        return not self.over

    def reader(self, member: object) -> "Reader":
        """Return what reads the stream, from its beginning, for a member that does."""
        reader = self._members[member]
        assert reader
        return reader

    def has(self, member: object) -> bool:
        """Say whether somebody still waits."""
        return member in self._members

    @property
    def is_open(self) -> bool:
        """Say whether all of it is still there, for one more."""
        return not self._gone and self.error is None

    async def begun(self) -> None:
        """Wait until the reply is there, or will never be."""
        while self.reply is None and not self.over:
            await self.more()

    async def ended(self) -> None:
        """Wait until it is over."""
        while not self.over:
            await self.more()

    def more(self) -> "asyncio.Future[None]":
        """Return what is done when something has changed."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        return waiter

    # The answer

    def begin(self, reply: Reply, source: str, *, streams: bool) -> None:
        """The reply is here, from an endpoint. streams: its body will be put in, for all; else it is there already."""
        self.reply, self.source, self.streams = reply, source, streams
        self._tell()

    def put(self, data: bytes) -> None:
        """More of a stream is here."""
        if data:
            self._pieces.append(data)
            self._size += len(data)
            if self._size > self.limit:
                self._trim()
            self._tell()

    @property
    def is_full(self) -> bool:
        """Say whether nobody has taken what is there; members that do not read as it comes take all at once."""
        return self._size > _AHEAD and self._size - self._furthest() > _AHEAD

    async def room(self) -> None:
        """Wait until somebody has taken what is there."""
        while self.is_full:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def whole(self) -> bytes | None:
        """Return all of the stream so far, None if that is more than is kept."""
        return None if self._gone or self._size > self.limit else b"".join(self._pieces)

    def end(self, entry: Entry | None = None, error: Exception | None = None) -> None:
        """It is over: whole, with an entry for those who do not read as it comes, or failed. The first call counts."""
        if not self.over:
            self.over, self.entry, self.error = True, entry, error
            self._tell()

    def _furthest(self) -> int:
        return max((self._size if r is None else r.taken for r in self._members.values()), default=0)

    def _trim(self) -> None:
        readers = [reader for reader in self._members.values() if reader]
        for reader in readers:
            reader.is_lost = self._size - reader.taken > self.limit + _AHEAD
        first = min((r.at for r in readers if not r.is_lost), default=self._gone + len(self._pieces))
        del self._pieces[: first - self._gone]
        self._gone = first

    def _tell(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(None)

    def _make_room(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def news(self, reader: "Reader") -> bytes:
        """Return what a reader has not read yet, b"" for nothing. Raises UpstreamError where there will not be all."""
        if reader.is_lost:
            raise TruncatedAnswer("it was read too slowly")
        new = self._pieces[reader.at - self._gone :]
        if new:
            if self._room is not None:
                self._make_room()
            reader.at += len(new)
            return new[0] if len(new) == 1 else b"".join(new)
        if self.error is not None:
            raise self.error if isinstance(self.error, UpstreamError) else TruncatedAnswer() from self.error
        return b""


class Reader:
    """Yields the bytes of a flight's stream. at: the piece that comes next; taken: the bytes before it."""

    __slots__ = ("_flight", "at", "is_lost", "taken")

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        # All mutable state: where it is, and whether that is too far behind.
        self.at = 0
        self.taken = 0
        self.is_lost = False

    def __repr__(self) -> str:
        return f"<Reader of {self._flight!r} at {self.taken} bytes>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        flight = self._flight
        while not (data := flight.news(self)):
            if flight.over:
                raise StopAsyncIteration
            await flight.more()
        self.taken += len(data)
        return data
