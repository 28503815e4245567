"""Engines in simulated time: continuous batching, chunked prefill, and a prefix cache, as vLLM has them."""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

import msgspec

BLOCK = 512  # tokens of a block of the cache: what the traces' hash_ids stand for


class Machine(msgspec.Struct, frozen=True):
    """What an engine runs on.

    blocks: of its cache. prefill: tokens a second. step, sequence: seconds of each step, and of each sequence that
    decodes in it. budget: tokens of prompts in one step. most: requests that run at once. speed: of all of it.
    """

    blocks: int = 1200
    prefill: float = 9000.0
    step: float = 0.012
    sequence: float = 0.0001
    budget: int = 8192
    most: int = 256
    speed: float = 1.0


class Job:
    """One request: when it came, what it asks, and when its first and last token came."""

    __slots__ = ("arrived", "blocks", "done", "first", "generated", "left", "tokens")

    def __init__(self, arrived: float, tokens: int, generated: int, blocks: Sequence[int]) -> None:
        # All mutable state: the tokens of the prompt still to be computed, and the two times.
        self.arrived, self.tokens, self.generated, self.blocks = arrived, tokens, max(generated, 1), blocks
        self.left = 0
        self.first = self.done = 0.0

    def __repr__(self) -> str:
        return f"<Job {self.tokens} tokens at {self.arrived}>"

    @property
    def needs(self) -> int:
        """Blocks for what it generates."""
        return self.generated // BLOCK + 1


class Cache:
    """Blocks that are computed, the least recently used first. Those of running requests stay."""

    def __init__(self, size: int) -> None:
        # All mutable state: the blocks in the order of their use, and how many requests hold each.
        self._size = size
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._held: Counter[int] = Counter()

    def __repr__(self) -> str:
        return f"<Cache {len(self._blocks)} of {self._size}, {len(self._held)} held>"

    @property
    def held(self) -> int:
        return len(self._held)

    def match(self, blocks: Sequence[int]) -> int:
        """Return how many blocks of a prompt are there, from its start."""
        for i, block in enumerate(blocks):
            if block not in self._blocks:
                return i
        return len(blocks)

    def touch(self, blocks: Sequence[int]) -> None:
        """These were used; the ends of prompts go before their starts."""
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)

    def hold(self, blocks: Sequence[int]) -> None:
        self._held.update(blocks)

    def let_go(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._held[block] -= 1
            if not self._held[block]:
                del self._held[block]
        self._evict()

    def _evict(self) -> None:
        over = len(self._blocks) - self._size
        free = (block for block in self._blocks if block not in self._held)
        for block in [block for block, _ in zip(free, range(over), strict=False)]:
            del self._blocks[block]


class Replica:
    """One engine. Whoever drives it calls `start` when it may begin a step, and `finish` when that is over."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        # All mutable state: the cache; who waits, whose prompt is computed, who decodes (by the step of the end); steps
        # so far; the step under way: its beginning, length and number, how many at once, and whose prompt it completes.
        self.cache = Cache(machine.blocks)
        self.waiting: deque[Job] = deque()
        self.computing: list[Job] = []
        self.decoding: list[tuple[int, int, Job]] = []
        self.generated_blocks = 0
        self.steps = 0
        self.version = 0
        self._began = self._length = 0.0
        self._count = 0
        self._completes: list[Job] = []
        self.hits = self.queries = 0

    def __repr__(self) -> str:
        return f"<Replica {len(self.waiting)} waiting, {len(self.computing) + len(self.decoding)} running>"

    @property
    def busy(self) -> bool:
        return self._count > 0

    @property
    def usage(self) -> float:
        return (self.cache.held + self.generated_blocks) / self.machine.blocks

    def start(self, now: float) -> float | None:
        """Begin the next step, or as many as only decode; return when it ends, None where there is nothing to do."""
        self._admit()
        if not self.computing and not self.decoding:
            return None
        tokens = self._compute()
        m = self.machine
        self._began = now
        self._length = (m.step + tokens / m.prefill + m.sequence * len(self.decoding)) / m.speed
        self._count = 1 if self.computing else self.decoding[0][0] - self.steps
        return now + self._length * self._count

    def interrupt(self, now: float) -> float | None:
        """Somebody came: end after the step under way; return when, None where that changes nothing."""
        if self._count <= 1:
            return None
        self._count = min(self._count, int((now - self._began) / self._length) + 1)
        return self._began + self._length * self._count

    def finish(self, now: float) -> Iterator[tuple[Job, bool]]:
        """The step is over: yield whose first token came (True), and who is done (False)."""
        self.steps += self._count
        self._count = 0
        while self.decoding and self.decoding[0][0] <= self.steps:
            yield self._end(heappop(self.decoding)[2], now), False
        for job in self._completes:
            self.computing.remove(job)
            self.cache.touch(job.blocks[: job.tokens // BLOCK])
            job.first = now
            yield job, True
            if job.generated == 1:
                yield self._end(job, now), False
            else:
                heappush(self.decoding, (self.steps + job.generated - 1, id(job), job))
        self._completes = []

    def _end(self, job: Job, now: float) -> Job:
        job.done = now
        self.generated_blocks -= job.needs
        self.cache.let_go(job.blocks)
        return job

    def _admit(self) -> None:
        while self.waiting and len(self.computing) + len(self.decoding) < self.machine.most:
            job = self.waiting[0]
            needed = len(job.blocks) + job.needs + self.cache.held + self.generated_blocks
            if needed > self.machine.blocks and (self.computing or self.decoding):
                return
            self.waiting.popleft()
            whole = min(self.cache.match(job.blocks), job.tokens // BLOCK)
            hit = min(whole * BLOCK, job.tokens - 1)
            job.left = job.tokens - hit
            self.hits += hit
            self.queries += job.tokens
            self.generated_blocks += job.needs
            self.cache.hold(job.blocks)
            self.cache.touch(job.blocks[:whole])
            self.computing.append(job)

    def _compute(self) -> int:
        """Spend the step's budget on prompts, first come first served; return the tokens of it."""
        budget = self.machine.budget
        for job in self.computing:
            part = min(budget, job.left)
            job.left -= part
            budget -= part
            if not job.left:
                self._completes.append(job)
            if not budget:
                break
        return self.machine.budget - budget
