"""Memory that all workers of a server share, so that each sees what the others have under way."""

import mmap
import os
from collections.abc import Mapping, Sequence

from proxy.balancer.load import LIVE, SLOW
from proxy.balancer.prefixes import PrefixTable

_DOUBLE, _INTEGER = 8, 4  # bytes


class Board:
    """Doubles for each endpoint and worker, and a table of prefixes for each model that wants one.

    Each worker writes doubles of its own only and sums those of all; the tables, and a double for each endpoint with the
    time of its newest first token, are everybody's.
    """

    def __init__(
        self, endpoints: Mapping[str, Sequence[str]], tables: Sequence[str], workers: int = 1, worker: int = 0,
        memory: int = -1,
    ) -> None:  # fmt: skip
        """endpoints: their names by model. tables: the models with one. memory: its descriptor; -1 for my own."""
        self._first: dict[str, int] = {}
        count = 0
        for model, names in endpoints.items():
            self._first[model] = count
            count += len(names)
        self._sizes = {model: len(names) for model, names in endpoints.items()}
        self._slow_at, self._part, self._workers = count * LIVE, count * (LIVE + SLOW), workers
        doubles = self._part * workers * _DOUBLE
        shared = doubles + count * _DOUBLE
        integers = {model: PrefixTable.size(self._sizes[model]) * _INTEGER for model in tables}
        size = max(shared + sum(integers.values()), _DOUBLE)
        if memory >= 0:
            os.ftruncate(memory, size)
        # All mutable state: the memory. This worker's doubles start at 0: whoever had its place before is dead.
        everything = memoryview(mmap.mmap(memory, size))
        self._doubles = everything[:doubles].cast("d")
        self._newest = everything[doubles:shared].cast("d")
        self._own = self._doubles[worker * self._part : (worker + 1) * self._part]
        self._own[:] = memoryview(bytes(len(self._own) * _DOUBLE)).cast("d")
        self._tables: dict[str, PrefixTable] = {}
        at = shared
        for model, length in integers.items():
            self._tables[model] = PrefixTable(everything[at : at + length].cast("I"), self._sizes[model])
            at += length

    def __repr__(self) -> str:
        return f"<Board {len(self._own)} doubles for each of {self._workers} workers, {len(self._tables)} tables>"

    @property
    def shared(self) -> bool:
        """Say whether there are other workers."""
        return self._workers > 1

    def table(self, model: str) -> PrefixTable | None:
        return self._tables.get(model)

    def live(self, model: str, index: int) -> "memoryview[float]":
        """Return this worker's doubles of an endpoint that change with each request."""
        at = (self._first[model] + index) * LIVE
        return self._own[at : at + LIVE]

    def slow(self, model: str, index: int) -> "memoryview[float]":
        """Return this worker's other doubles of an endpoint."""
        at = self._slow_at + (self._first[model] + index) * SLOW
        return self._own[at : at + SLOW]

    def newest(self, model: str, index: int) -> "memoryview[float]":
        """Return the double with the time of the newest first token of an endpoint, which all workers write."""
        at = self._first[model] + index
        return self._newest[at : at + 1]

    def live_sums(self, model: str) -> list[float]:
        """Return the sums over all workers, LIVE for each endpoint of a model."""
        return self._sums(self._first[model] * LIVE, self._sizes[model] * LIVE)

    def slow_sums(self, model: str) -> list[float]:
        """Return the sums over all workers, SLOW for each endpoint of a model."""
        return self._sums(self._slow_at + self._first[model] * SLOW, self._sizes[model] * SLOW)

    def _sums(self, at: int, length: int) -> list[float]:
        starts = range(at, len(self._doubles), self._part)
        parts = [self._doubles[start : start + length].tolist() for start in starts]
        return parts[0] if len(parts) == 1 else list(map(sum, zip(*parts, strict=True)))
