"""What the workers of a server tell each other about their stores: how much they hold, and what is to be dropped.

It lies in memory that all of them share. A purge is noted there, and each worker drops what it says before its next
look-up, or within a moment if there is none.
"""

import asyncio
import fcntl
import mmap
import os
import struct

import msgspec

from proxy.cache import KEY_BYTES, Stats

_ROOM = 64  # purges that are noted; a worker that has missed more drops all
_NAME_BYTES = 200
_RECORD = struct.Struct(f"<HB{_NAME_BYTES}s{KEY_BYTES}s")  # bytes of a model's name and of a prefix, 0 for any; both
_COUNT = struct.Struct("<Q")
_ROW = struct.Struct("<4d2Q")  # entries, bytes, stored, evicted; purges applied, entries that the last of them dropped
_ACKNOWLEDGED, _LOOKS = 1.0, 50  # seconds to wait for the other workers, and how often to look
_LOOK = 0.25  # seconds between two looks for purges where there are no requests


class Purge(msgspec.Struct, frozen=True):
    """What is to be dropped. model: None for all. prefix: of keys."""

    model: str | None = None
    prefix: bytes = b""


class Bulletin:
    """One worker's view of what all of them tell."""

    def __init__(self, workers: int = 1, worker: int = 0, memory: int = -1) -> None:
        """memory: the descriptor of what all workers share; -1: my own."""
        self._workers = workers
        self._rows = _COUNT.size + _ROOM * _RECORD.size
        self._at = self._rows + worker * _ROW.size
        self._fd = os.memfd_create("polyvox-cache") if memory < 0 else memory
        size = self._rows + workers * _ROW.size
        os.ftruncate(self._fd, size)
        # All mutable state: the shared memory, of which this worker writes its own row, and new purges; how many purges
        # it has applied, and what it has told of its store.
        self._memory = mmap.mmap(self._fd, size)
        self._counted = memoryview(self._memory)[: _COUNT.size].cast("Q")
        self.applied = self._counted[0]
        self._stats = Stats(0, 0, 0, 0)
        before = _ROW.unpack_from(self._memory, self._at)
        self._before = before[2], before[3]  # by the worker that had this row
        self._tell(0)

    def __repr__(self) -> str:
        return f"<Bulletin of {self._workers} workers, {self._counted[0]} purges>"

    def kept(self, stats: Stats) -> None:
        """Tell what the store of this worker holds."""
        self._stats = stats
        self._tell(0)

    def _tell(self, dropped: int) -> None:
        s, (stored, evicted) = self._stats, self._before
        row = (s.entries or 0, s.bytes or 0, stored + s.stored, evicted + s.evicted, self.applied, dropped)
        _ROW.pack_into(self._memory, self._at, *row)

    def all(self) -> Stats:
        """Return what the stores of all workers hold together."""
        sums = [sum(column) for column in zip(*self._each(), strict=True)]
        return Stats(*(round(figure) for figure in sums[:4]))

    def _each(self) -> list[tuple[float, ...]]:
        return [_ROW.unpack_from(self._memory, self._rows + i * _ROW.size) for i in range(self._workers)]

    # Purges

    def is_behind(self) -> bool:
        """Say whether there is something to be dropped."""
        return self._counted[0] != self.applied

    def post(self, purge: Purge) -> int:
        """Note a purge for all workers, this one included; return its number."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)  # of a process, unlike flock's: workers share the descriptor
        try:
            number = self._counted[0]
            name = (purge.model or "").encode()[:_NAME_BYTES]
            record = (len(name), len(purge.prefix), name, purge.prefix)
            _RECORD.pack_into(self._memory, _COUNT.size + number % _ROOM * _RECORD.size, *record)
            self._counted[0] = number + 1
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
        return number + 1

    def missed(self) -> list[Purge]:
        """Return the purges that this worker has not applied."""
        count = self._counted[0]
        if count - self.applied > _ROOM:
            return [Purge()]
        return [self._purge(number) for number in range(self.applied, count)]

    def _purge(self, number: int) -> Purge:
        at = _COUNT.size + number % _ROOM * _RECORD.size
        name_bytes, prefix_bytes, name, prefix = _RECORD.unpack_from(self._memory, at)
        return Purge(name[:name_bytes].decode() or None, prefix[:prefix_bytes])

    def apply(self, dropped: int) -> None:
        """All that was to be dropped is."""
        self.applied = self._counted[0]
        self._tell(dropped)

    async def acknowledged(self, number: int) -> int:
        """Wait until all workers that run have applied a purge; return how many entries they dropped."""
        for _ in range(_LOOKS):  # a worker that is just being started has nothing to drop, and does not say so
            if all(row[4] >= number for row in self._each()):
                break
            await asyncio.sleep(_ACKNOWLEDGED / _LOOKS)
        return sum(int(row[5]) for row in self._each() if row[4] >= number)

    @staticmethod
    async def pause() -> None:
        """Wait until it is time to look for purges."""
        await asyncio.sleep(_LOOK)
