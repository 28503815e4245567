"""Replays traces of real traffic over simulated engines, with the real `Balancer.pick`, and compares policies.

    python -m benchmarks.balancing [--traces FOLDER] [--quick]

It writes BALANCING.md beside itself; with --quick it only prints the first table. See replicas.py for the engines.
"""

import argparse
import datetime
import gc
import itertools
import os
import platform
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from pathlib import Path

import msgspec

from benchmarks.replicas import BLOCK, Job, Machine, Replica
from proxy.balancer import Balancer, Board, Lease, Prompt, prefixes
from proxy.balancer.gauges import Gauges
from proxy.config import Balance
from proxy.shared import Slots, shared_memory

MODEL = "m"
BYTES_PER_TOKEN = 4
WARM = 120.0  # seconds of the trace that are not counted
LOOK = 1.0  # seconds between two looks at the gauges of the engines
SEEDS = 3
TRACES = ("conversation", "synthetic")
REPORT = Path(__file__).with_name("BALANCING.md")


class Row(msgspec.Struct):
    """A request of a trace: milliseconds from its start, tokens, and ids of blocks of 512 tokens."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """rate: how much faster than it was recorded a trace is replayed. blocks: of each cache. slow: replicas at half
    speed. stale: seconds for which what other workers do is not seen."""

    policy: Balance = "predicted_ttft"
    rate: float = 1.0
    replicas: int = 8
    blocks: int = 1200
    slow: int = 0
    workers: int = 1
    stale: float = 0.0
    seed: int = 0


class Result(msgspec.Struct, frozen=True):
    """Seconds to the first token, and the share of prompts' tokens that was found in caches."""

    p50: float
    p99: float
    mean: float
    hits: float


class Place(msgspec.Struct, frozen=True):
    """A candidate, as the registry's endpoints are."""

    name: str
    index: int
    weight: float = 1.0
    max_in_flight: int | None = None


class Trace:
    """A trace, with the prompts as a proxy would see them."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem.rpartition("_")[2]
        self.rows = [msgspec.json.decode(line, type=Row) for line in path.read_bytes().splitlines()]
        self.prompts = [prefixes.read({"messages": _text(row)}) for row in self.rows]

    def __repr__(self) -> str:
        return f"<Trace {self.name} {len(self.rows)} requests>"


def _text(row: Row) -> bytes:
    text = b"".join([b"%016x" % block * (BLOCK * BYTES_PER_TOKEN // 16) for block in row.hash_ids])
    return text[: row.input_length * BYTES_PER_TOKEN]


class Replay:
    """One run of a trace."""

    def __init__(self, trace: Trace, case: Case) -> None:
        speeds = [0.5 if i < case.slow else 1.0 for i in range(case.replicas)]
        self._trace, self._case = trace, case
        self._chance = random.Random(case.seed)
        self._places = [Place(f"{MODEL}/{i}", i) for i in range(case.replicas)]
        # All mutable state: the engines, the workers' balancers, the events to come, the leases of who is under way,
        # and when the gauges of each engine are looked at next.
        self._replicas = [Replica(Machine(blocks=case.blocks, speed=speed)) for speed in speeds]
        self._balancers = self._make_balancers()
        self._events: list[tuple[float, int, int, int]] = []
        self._numbers = itertools.count()
        self._leases: dict[Job, Lease] = {}
        self._looks = [LOOK * (i + 1) / case.replicas for i in range(case.replicas)]

    def __repr__(self) -> str:
        return f"<Replay {self._case}>"

    def _make_balancers(self) -> list[Balancer]:
        names = {MODEL: [place.name for place in self._places]}
        case, memory = self._case, shared_memory()
        tables = [MODEL] if case.policy == "predicted_ttft" else []
        boards = [Board(Slots.of(names, tables), case.workers, i, memory) for i in range(case.workers)]
        os.close(memory)
        return [Balancer(names, {MODEL: case.policy}, board, self._chance.random, case.stale) for board in boards]

    def run(self) -> Result:
        jobs = [
            Job(row.timestamp / 1000 / self._case.rate, row.input_length, row.output_length, row.hash_ids)
            for row in self._trace.rows
        ]
        for job, prompt in zip(jobs, self._trace.prompts, strict=True):
            while self._events and self._events[0][0] <= job.arrived:
                self._step()
            self._look(job.arrived)
            self._arrive(job, prompt)
        while self._events:
            self._step()
        counted = [job for job in jobs if job.arrived >= WARM / self._case.rate]
        waits = sorted(job.first - job.arrived for job in counted)
        hits, queries = sum(r.hits for r in self._replicas), sum(r.queries for r in self._replicas)
        return Result(
            p50=waits[len(waits) // 2], p99=waits[int(len(waits) * 0.99)], mean=statistics.fmean(waits),
            hits=hits / queries,
        )  # fmt: skip

    def _arrive(self, job: Job, prompt: Prompt) -> None:
        balancer = self._chance.choice(self._balancers)
        picked = balancer.pick(MODEL, self._places, prompt, job.arrived)
        assert picked
        place, self._leases[job] = picked
        replica = self._replicas[place.index]
        replica.waiting.append(job)
        if not replica.busy:
            self._schedule(place.index, replica.start(job.arrived))
        elif (end := replica.interrupt(job.arrived)) is not None:
            self._schedule(place.index, end)

    def _look(self, now: float) -> None:
        """Show the engines' gauges to the workers that watch them."""
        for i, replica in enumerate(self._replicas):
            if self._looks[i] <= now:
                self._looks[i] = now + LOOK
                running = len(replica.computing) + len(replica.decoding)
                capacity = replica.machine.blocks * BLOCK
                said = Gauges(
                    running, len(replica.waiting), min(replica.usage, 1.0), replica.queries, replica.hits, capacity
                )
                self._balancers[i % self._case.workers].told(MODEL, self._places[i].name, said)

    def _schedule(self, index: int, end: float | None) -> None:
        if end is not None:
            self._replicas[index].version = number = next(self._numbers)
            heappush(self._events, (end, number, index, number))

    def _step(self) -> None:
        now, _, index, version = heappop(self._events)
        replica = self._replicas[index]
        if version != replica.version:
            return
        for job, is_first in replica.finish(now):
            if is_first:
                self._leases[job].token(now)
            else:
                self._leases.pop(job).release(now, tokens_in=job.tokens)
        self._schedule(index, replica.start(now))


def measure(trace: Trace, case: Case) -> Result:
    """Return the medians of runs with several seeds; a policy without chance in it runs once."""
    seeds = range(SEEDS) if case.policy == "predicted_ttft" or case.workers > 1 else range(1)
    runs = [Replay(trace, msgspec.structs.replace(case, seed=seed)).run() for seed in seeds]
    return Result(*(statistics.median(figures) for figures in zip(*map(msgspec.structs.astuple, runs), strict=True)))


def table(title: str, about: str, cases: Sequence[tuple[Trace, str, Case]]) -> Iterator[str]:
    """Yield the lines of a table: each case under the three policies."""
    yield from (f"## {title}", "", about, "")
    policies = ("round_robin", "least_loaded", "predicted_ttft")
    columns = ("trace", "case", *(f"{p} p50 / p99" for p in policies), "hits", *(f"p99 / {p}" for p in policies[:2]))
    yield from (f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2))
    for trace, name, case in cases:
        ours = measure(trace, case)
        turns, least = (
            measure(trace, msgspec.structs.replace(case, policy=p)) for p in ("round_robin", "least_loaded")
        )
        cells = [f"{r.p50:.2f} / {r.p99:.2f}" for r in (turns, least, ours)]
        hits = f"{turns.hits:.2f} → {ours.hits:.2f}"
        line = [trace.name, name, *cells, hits, f"**{ours.p99 / turns.p99:.2f}**", f"{ours.p99 / least.p99:.2f}"]
        yield f"| {' | '.join(line)} |"
    yield ""


def tables(traces: Sequence[Trace]) -> Iterator[str]:
    """Yield the lines of all tables."""
    talk = traces[0]

    def vary(field: str, steps: Sequence[float], **others: Sequence[float]) -> list[tuple[Trace, str, Case]]:
        cases = []
        for i, step in enumerate(steps):
            values = {field: step, **{name: values[i] for name, values in others.items()}}
            cases += [(trace, f"{field} {step}", msgspec.convert(values, Case)) for trace in traces]
        return cases

    yield from base(traces)
    yield from table("Load", "How much faster than recorded the trace is replayed.", vary("rate", (0.6, 0.8, 1.2, 1.4)))
    yield from table(
        "Replicas",
        "The load grows with them, so that each has as much to do.",
        vary("replicas", (4, 16), rate=(0.5, 2.0)),
    )
    yield from table("Caches", "Blocks of 512 tokens that each replica holds.", vary("blocks", (600, 2400, 4800)))
    yield from table("One replica at half speed", "The first of eight; the policies are not told.", vary("slow", (1,)))
    stale = [
        (talk, f"{workers} workers, stale for {seconds} s", Case(workers=workers, stale=seconds))
        for workers in (4, 16)
        for seconds in (0.0, 0.1, 1.0, 5.0)
    ]
    stale += [(talk, "4 workers, one at half speed", Case(workers=4, slow=1))]
    about = (
        "Each request comes to a worker by chance. Workers see each other's load in shared memory, so 0 s is how it "
        "is; the rest shows what would happen if they saw it late. The requests of this trace come in bursts every 3 "
        "seconds, all of one burst in the same moment, so any delay hides a whole burst."
    )
    yield from table("Several workers", about, stale)


def base(traces: Sequence[Trace]) -> Iterator[str]:
    """Yield the lines of the first table."""
    about = "Eight replicas of 1,200 blocks, each trace at the speed it was recorded at, one worker."
    yield from table("As recorded", about, [(trace, "as recorded", Case()) for trace in traces])


def picks() -> Iterator[str]:
    """Yield the lines of what a pick costs, the reading of the prompt included."""
    yield from (
        "## What a pick costs",
        "",
        "Reading the prompt, choosing, taking the lease; all prompts begin alike.",
        "",
    )
    yield from ("| endpoints | workers | prompt | microseconds |", "|---:|---:|---:|---:|")
    for count, workers, size in ((2, 1, 1024), (16, 1, 1024), (16, 4, 1024), (2, 1, 102_400), (16, 1, 102_400)):
        yield f"| {count} | {workers} | {size // 1024} KB | {pick_cost(count, workers, size):.1f} |"
    yield ""


def pick_cost(count: int, workers: int, size: int) -> float:
    """Return the microseconds of a pick: the best of several rounds, since others use the machine too."""
    names = {MODEL: [f"{MODEL}/{i}" for i in range(count)]}
    memory = shared_memory()
    boards = [Board(Slots.of(names, [MODEL]), workers, i, memory) for i in range(workers)]
    os.close(memory)
    balancer = Balancer(names, {MODEL: "predicted_ttft"}, boards[0], random.Random(0).random)
    places = tuple(Place(name, i) for i, name in enumerate(names[MODEL]))
    bodies = [{"messages": b"a" * (size // 2) + b"%04d" % i * (size // 8)} for i in range(100)]
    best = float("inf")
    for turn in range(20):
        begun = time.perf_counter()
        picked = [
            balancer.pick(MODEL, places, balancer.prompt(MODEL, body), turn + i / 100) for i, body in enumerate(bodies)
        ]
        best = min(best, (time.perf_counter() - begun) / len(bodies))
        for choice in picked:
            assert choice
            choice[1].release(turn + 1.0)
    return best * 1e6


def head() -> Iterator[str]:
    yield from ("# Balancing", "")
    yield (
        "Traces of Mooncake (FAST'25), replayed over simulated engines (`replicas.py`: continuous batching, chunked "
        "prefill at 9,000 tokens/s, an exact LRU prefix cache) with the proxy's own `Balancer.pick`, which reads "
        "prompts of 4 bytes a token, sees first tokens and ends, and the engines' gauges once a second. Seconds to the "
        f"first token, without the first {WARM:.0f} s of the trace; medians of {SEEDS} seeds where chance is in it. "
        "`make bench-balance` writes this file."
    )
    yield from ("", f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores.", "")


def main() -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description="Compare balancing policies on traces.")
    parser.add_argument(
        "--traces", type=Path, default=Path("../shared/data"), help="folder with trace_mooncake_*.jsonl"
    )
    parser.add_argument("--quick", action="store_true", help="the first table only, and write nothing")
    options = parser.parse_args()
    traces = [Trace(options.traces / f"trace_mooncake_{name}.jsonl") for name in TRACES]
    gc.freeze()
    lines = []
    for line in itertools.chain(head(), base(traces) if options.quick else itertools.chain(tables(traces), picks())):
        print(line, flush=True)
        lines.append(line)
    if not options.quick:
        REPORT.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
