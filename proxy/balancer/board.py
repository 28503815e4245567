"""Memory that all workers of a server share, so that each sees what the others have under way."""

from collections.abc import Iterable, Sequence
from functools import partial, reduce
from itertools import accumulate
from operator import add

from proxy.balancer.load import LIVE, SLOW
from proxy.balancer.prefixes import PrefixTable
from proxy.shared import Shared, Slot, Slots


class Block:
    """Doubles for each endpoint of a model and each worker, and its table of prefixes, if it has one.

    Each worker writes doubles of its own only and sums those of all. The table, and a double for each endpoint with
    the time of its newest first token, are everybody's. Figures of one kind are beside each other.
    """

    def __init__(self, memory: "memoryview[float]", slot: Slot, workers: int, worker: int) -> None:
        """memory: Block.size(slot, workers) doubles."""
        count = self._count = len(slot.endpoints)
        part = self._part = count * (LIVE + SLOW)
        self.shared = workers > 1
        # All mutable state: the memory. This worker's doubles start at 0: whoever had its place before is dead.
        self._doubles, self._newest = memory[: workers * part], memory[workers * part : workers * part + count]
        self._own = self._doubles[worker * part : (worker + 1) * part]
        self._own[:] = memoryview(bytes(self._own.nbytes)).cast("d")
        columns = [self._column(figure, workers) for figure in range(LIVE + SLOW)]
        self._live, self._slow = columns[:LIVE], columns[LIVE:]
        self.table = PrefixTable(memory[workers * part + count :], count) if slot.table else None

    def __repr__(self) -> str:
        return f"<Block of {self._count} endpoints, {self.table!r}>"

    @staticmethod
    def size(slot: Slot, workers: int) -> int:
        """Return how many doubles a model takes."""
        count = len(slot.endpoints)
        return workers * count * (LIVE + SLOW) + count + (PrefixTable.size(count) if slot.table else 0)

    def _column(self, figure: int, workers: int) -> "list[memoryview[float]]":
        """Return one figure of all endpoints, as each worker has it."""
        starts = [worker * self._part + figure * self._count for worker in range(workers)]
        return [self._doubles[start : start + self._count] for start in starts]

    def live(self, index: int) -> "memoryview[float]":
        """Return this worker's LIVE doubles of an endpoint, which change with each request."""
        return self._own[index : LIVE * self._count : self._count]

    def slow(self, index: int) -> "memoryview[float]":
        """Return this worker's SLOW other doubles of an endpoint."""
        return self._own[LIVE * self._count + index :: self._count]

    def newest(self, index: int) -> "memoryview[float]":
        """Return the double with the time of the newest first token of an endpoint, which all workers write."""
        return self._newest[index : index + 1]

    def live_sums(self) -> list[Iterable[float]]:
        """Return the sums over all workers, for each of LIVE figures those of all endpoints, to be read once."""
        return list(map(_sum, self._live))

    def slow_sums(self) -> list[Sequence[float]]:
        """Return the sums over all workers, for each of SLOW figures those of all endpoints."""
        return [list(_sum(column)) for column in self._slow]


_plus = partial(map, add)


def _sum(column: "Sequence[memoryview[float]]") -> Iterable[float]:
    return reduce(_plus, column)


class Board:
    """One worker's view of the blocks of all models."""

    def __init__(self, slots: Slots, workers: int = 1, worker: int = 0, memory: int = -1) -> None:
        """memory: the descriptor of what all workers lay out alike; -1 for my own."""
        self._memory = Shared(memory)
        self._workers, self._worker = workers, worker
        self.is_first = worker == 0
        # All mutable state: the blocks that were ever used here, and those of the models that there are now.
        self._blocks: dict[Slot, Block] = {}
        self._current: dict[str, Slot] = {}
        self.follow(slots)

    def __repr__(self) -> str:
        return f"<Board of {list(self._current)}, {len(self._blocks)} blocks>"

    def follow(self, slots: Slots) -> None:
        """Have a block for each model that there is now. One that was there before stays as it is."""
        ends = list(accumulate(Block.size(slot, self._workers) for slot in slots.given))
        if new := set(slots.current) - self._blocks.keys():
            memory = self._memory.doubles(ends[-1] + 1)
            for slot, end in zip(slots.given, ends, strict=True):
                if slot in new:
                    part = memory[end - Block.size(slot, self._workers) : end]
                    self._blocks[slot] = Block(part, slot, self._workers, self._worker)
        self._current = {slot.model: slot for slot in slots.current}

    def block(self, model: str) -> Block:
        return self._blocks[self._current[model]]

    def mine(self) -> dict[str, list[str]]:
        """Return the endpoints, by model, that this worker watches for all: its share of those with a table."""
        return {
            model: mine
            for model, slot in self._current.items()
            if slot.table and (mine := list(slot.endpoints[self._worker :: self._workers]))
        }
