"""Answers in the memory of one process: bounded by bytes, the least recently used ones go first, each step is O(1).

What is too old is found when it is asked for, or goes as it is used no more. Nothing sweeps.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

from proxy.cache import ENTRY_OVERHEAD, Claim, Entry, Stats


class MemoryStore:
    """A Store that answers at once."""

    is_shared = False

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        # All mutable state: the entries, those used last at the end; the bytes that they are counted with; how often
        # one was stored, and how often one had to go.
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._bytes = 0
        self._stored = 0
        self._evicted = 0

    def __repr__(self) -> str:
        return f"<MemoryStore {len(self._entries)} entries, {self._bytes} of {self._max_bytes} bytes>"

    def get(self, key: bytes) -> Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if not entry.is_fresh(self._clock()):
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    def claim(self, key: bytes, seconds: float) -> None:
        """Give no claim: nobody else has this store."""

    def put(self, key: bytes, entry: Entry, claim: Claim | None = None) -> None:
        if key in self._entries:
            self._drop(key)
        size = len(entry.body) + ENTRY_OVERHEAD
        if size > self._max_bytes:
            return
        self._entries[key] = entry
        self._stored += 1
        self._bytes += size
        if self._bytes > self._max_bytes:
            self._make_room()

    def release(self, claim: Claim) -> None:
        """Nothing to give back."""

    def purge(self, model: str | None = None, prefix: bytes = b"") -> int:
        found = [k for k, e in self._entries.items() if model in (None, e.model) and k.startswith(prefix)]
        for key in found:
            self._drop(key)
        return len(found)

    def stats(self) -> Stats:
        return Stats(len(self._entries), self._bytes, self._stored, self._evicted)

    told = stats

    async def close(self) -> None:
        self._entries.clear()
        self._bytes = 0

    def _make_room(self) -> None:
        while self._bytes > self._max_bytes:
            self._bytes -= self._entries.popitem(last=False)[1].size()
            self._evicted += 1

    def _drop(self, key: bytes) -> None:
        self._bytes -= self._entries.pop(key).size()
