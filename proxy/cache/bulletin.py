"""What the workers of a server tell each other about their stores: how much they hold, and what is to be dropped.

It lies in memory that all of them share. A purge is noted there, and each worker drops what it says before its next
look-up, or within a moment if there is none.
"""

import asyncio
import fcntl
import mmap
import os
import re
import struct
from collections.abc import Callable, Mapping

import msgspec

from proxy.cache import KEY_BYTES, Stats
from proxy.errors import BadRequest
from proxy.telemetry import CACHE_RESULTS

_ROOM = 64  # purges that are noted; a worker that has missed more drops all
_NAME_BYTES = 200
_RECORD = struct.Struct(f"<HB{_NAME_BYTES}s{KEY_BYTES}s")  # bytes of a model's name and of a prefix, 0 for any; both
_COUNT = struct.Struct("<Q")
# Entries, bytes, stored, evicted; how often each of CACHE_RESULTS was; purges applied, and what they dropped in all.
_ROW = struct.Struct(f"<{4 + len(CACHE_RESULTS)}Q2Q")
_WIDTH = 6 + len(CACHE_RESULTS)
_ACKNOWLEDGED, _LOOKS = 5.0, 250  # seconds to wait for the other workers, and how often to look
_LOOK = 0.25  # seconds between two looks for purges where there are no requests


class Purge(msgspec.Struct, frozen=True):
    """What is to be dropped. model: None for all. prefix: of keys."""

    model: str | None = None
    prefix: bytes = b""


ALL = Purge()
_HEX = re.compile(f"([0-9a-f]{{2}}){{0,{KEY_BYTES}}}").fullmatch


def parse(asked: Mapping[str, str], model_called: Callable[[str], str]) -> Purge:
    """Read what is to be dropped from its words: `model` and `key_prefix`, both may be left out.

    model_called: returns the model that a name stands for. Raises BadRequest with the word that is wrong.
    """
    for name in asked:
        if name not in ("model", "key_prefix"):
            raise BadRequest(
                f"unknown parameter {name!r}; known: model, key_prefix", param=name, code="invalid_parameter"
            )
    prefix = asked.get("key_prefix", "").lower()
    if not _HEX(prefix):
        raise BadRequest(
            f"key_prefix is {prefix[:80]!r}; give an even number of hexadecimal digits, {2 * KEY_BYTES} at most: the "
            "beginning of an x-polyvox-cache-key, of which the first 16 are the id of the API key",
            param="key_prefix",
            code="invalid_parameter",
        )
    return Purge(model_called(asked["model"]) if asked.get("model") else None, bytes.fromhex(prefix))


class Report(msgspec.Struct, frozen=True):
    """What the caches of all workers hold and have done. hit_rate: of requests that looked, with those that joined.

    entries, bytes: None where there are too many to count, or nobody has.
    """

    entries: int | None
    bytes: int | None
    stored: int
    evicted: int
    hit: int
    miss: int
    bypass: int
    joined: int
    hit_rate: float | None = None


class Bulletin:
    """What all workers tell, as one of them, or the process that has started them, sees it."""

    def __init__(self, workers: int = 1, worker: int | None = 0, memory: int = -1) -> None:
        """worker: the number of this one; None: it is none. memory: the descriptor of what all share; -1: my own."""
        self._workers = workers
        self._rows = _COUNT.size + _ROOM * _RECORD.size
        self._at = None if worker is None else self._rows + worker * _ROW.size
        self._fd = os.memfd_create("polyvox-cache") if memory < 0 else memory
        size = self._rows + workers * _ROW.size
        os.ftruncate(self._fd, size)
        # All mutable state: the shared memory, of which this worker writes its own row, and new purges; how many purges
        # it has applied, and what these dropped.
        self._memory = mmap.mmap(self._fd, size)
        self._counted = memoryview(self._memory)[: _COUNT.size].cast("Q")
        self.applied = self._counted[0]
        self._dropped = 0
        # What was counted in this row before, by another worker or another cache.
        self._before = (0,) * _WIDTH
        self.carry()

    def __repr__(self) -> str:
        return f"<Bulletin of {self._workers} workers, {self._counted[0]} purges>"

    def carry(self) -> None:
        """Another cache begins to count, at nothing: what was counted so far is kept."""
        if self._at is not None:
            self._before = _ROW.unpack_from(self._memory, self._at)
        self.kept(Stats(0, 0, 0, 0), {})

    def kept(self, stats: Stats, results: Mapping[str, int]) -> None:
        """Tell what the store of this worker holds, and how often it gave each of CACHE_RESULTS."""
        if self._at is None:
            return
        before = self._before
        counts = [results.get(name, 0) + before[4 + i] for i, name in enumerate(CACHE_RESULTS)]
        held = stats.entries or 0, stats.bytes or 0, stats.stored + before[2], stats.evicted + before[3]
        _ROW.pack_into(self._memory, self._at, *held, *counts, self.applied, self._dropped)

    def all(self) -> Report:
        """Return what all workers have told."""
        sums = [sum(column) for column in zip(*self._each(), strict=True)]
        held, (hit, miss, bypass, joined) = sums[:4], sums[4 : 4 + len(CACHE_RESULTS)]
        asked = hit + joined + miss
        entries, size, stored, evicted = held
        rate = (hit + joined) / asked if asked else None
        return Report(entries, size, stored, evicted, hit, miss, bypass, joined, rate)

    def _each(self) -> list[tuple[int, ...]]:
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
            return [ALL]
        return [self._purge(number) for number in range(self.applied, count)]

    def _purge(self, number: int) -> Purge:
        at = _COUNT.size + number % _ROOM * _RECORD.size
        name_bytes, prefix_bytes, name, prefix = _RECORD.unpack_from(self._memory, at)
        return Purge(name[:name_bytes].decode() or None, prefix[:prefix_bytes])

    def apply(self, dropped: int) -> None:
        """All that was to be dropped is: so many entries. It is told with what is kept, see `kept`."""
        self.applied = self._counted[0]
        self._dropped += dropped

    async def purge(self, purge: Purge) -> int:
        """Have all workers drop something; return how many entries that were, as far as they say so in time."""
        before = sum(row[-1] for row in self._each())
        number = self.post(purge)
        for _ in range(_LOOKS):  # a worker that is just being started has nothing to drop, and does not say so
            if all(row[-2] >= number for row in self._each()):
                break
            await asyncio.sleep(_ACKNOWLEDGED / _LOOKS)
        return max(sum(row[-1] for row in self._each()) - before, 0)

    @staticmethod
    async def pause() -> None:
        """Wait until it is time to look for purges."""
        await asyncio.sleep(_LOOK)
