"""Memory that all workers of a server share, so that each sees what the others have under way."""

import mmap
import os
from collections.abc import Mapping, Sequence
from operator import add

from proxy.balancer.load import LIVE, SLOW
from proxy.balancer.prefixes import PrefixTable

_DOUBLE = 8  # bytes


class Board:
    """Doubles for each endpoint and worker, and a table of prefixes for each model that wants one.

    Each worker writes doubles of its own only and sums those of all. The tables, and a double for each endpoint with
    the time of its newest first token, are everybody's. Of each model, figures of one kind are beside each other.
    """

    def __init__(
        self, endpoints: Mapping[str, Sequence[str]], tables: Sequence[str], workers: int = 1, worker: int = 0,
        memory: int = -1,
    ) -> None:  # fmt: skip
        """endpoints: their names by model. tables: the models with one. memory: its descriptor; -1 for my own."""
        self._names = endpoints
        self._sizes = {model: len(names) for model, names in endpoints.items()}
        count = sum(self._sizes.values())
        lengths = [workers * count * (LIVE + SLOW), count, *(PrefixTable.size(self._sizes[model]) for model in tables)]
        size = max(sum(lengths), 1) * _DOUBLE
        if memory >= 0:
            os.ftruncate(memory, size)
        # All mutable state: the memory. This worker's doubles start at 0: whoever had its place before is dead.
        everything = memoryview(mmap.mmap(memory, size)).cast("d")
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        parts = [everything[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        self._doubles, self._newest = parts[:2]
        self._tables = {m: PrefixTable(part, self._sizes[m]) for m, part in zip(tables, parts[2:], strict=True)}
        self._part, self._worker, self._workers = count * (LIVE + SLOW), worker, workers
        self.shared, self.is_first = workers > 1, worker == 0
        self._own = self._doubles[worker * self._part : (worker + 1) * self._part]
        self._own[:] = memoryview(bytes(self._part * _DOUBLE)).cast("d")
        self._first = self._offsets()

    def __repr__(self) -> str:
        return f"<Board {self._part} doubles for each worker, {len(self._tables)} tables>"

    def _offsets(self) -> dict[str, int]:
        """Return how many endpoints there are before those of each model."""
        offsets, count = {}, 0
        for model, size in self._sizes.items():
            offsets[model] = count
            count += size
        return offsets

    def table(self, model: str) -> PrefixTable | None:
        return self._tables.get(model)

    def mine(self) -> dict[str, list[str]]:
        """Return the endpoints, by model, that this worker watches for all: its share of those with a table."""
        return {
            model: mine
            for model in self._tables
            if (mine := [n for i, n in enumerate(self._names[model]) if i % self._workers == self._worker])
        }

    def live(self, model: str, index: int) -> "memoryview[float]":
        """Return this worker's LIVE doubles of an endpoint, which change with each request."""
        at, size = self._first[model] * (LIVE + SLOW), self._sizes[model]
        return self._own[at + index : at + LIVE * size : size]

    def slow(self, model: str, index: int) -> "memoryview[float]":
        """Return this worker's SLOW other doubles of an endpoint."""
        at, size = self._first[model] * (LIVE + SLOW), self._sizes[model]
        return self._own[at + LIVE * size + index : at + (LIVE + SLOW) * size : size]

    def newest(self, model: str, index: int) -> "memoryview[float]":
        """Return the double with the time of the newest first token of an endpoint, which all workers write."""
        at = self._first[model] + index
        return self._newest[at : at + 1]

    def live_sums(self, model: str) -> list[Sequence[float]]:
        """Return the sums over all workers, for each of LIVE figures those of all endpoints of a model."""
        return self._sums(model, 0, LIVE)

    def slow_sums(self, model: str) -> list[Sequence[float]]:
        """Return the sums over all workers, for each of SLOW figures those of all endpoints of a model."""
        return self._sums(model, LIVE, SLOW)

    def _sums(self, model: str, first: int, figures: int) -> list[Sequence[float]]:
        size = self._sizes[model]
        at = self._first[model] * (LIVE + SLOW) + first * size
        sums: Sequence[float] = self._doubles[at : at + figures * size].tolist()
        for start in range(at + self._part, len(self._doubles), self._part):
            sums = list(map(add, sums, self._doubles[start : start + figures * size].tolist()))
        return [sums[i * size : (i + 1) * size] for i in range(figures)]
