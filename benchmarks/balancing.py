"""Replays traces of real traffic over simulated engines, with the real `Balancer.pick`, and compares policies.

    python -m benchmarks.balancing [--traces FOLDER] [--quick]
"""

import argparse
import gc
import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.replicas import BLOCK, Job, Machine, Replica
from proxy.balancer import Balancer, Board, Lease, Prompt, prefixes
from proxy.config import Balance
from proxy.metrics import shared_memory

MODEL = "m"
BYTES_PER_TOKEN = 4
WARM = 120.0  # seconds of the trace that are not counted


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
    """Seconds to the first token, share of tokens found in caches, and microseconds of a pick."""

    p50: float
    p99: float
    mean: float
    hits: float
    pick: float


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
        self.rows = msgspec.json.decode(b"[" + b",".join(path.read_bytes().split()) + b"]", type=list[Row]) \
            if False else [msgspec.json.decode(line, type=Row) for line in path.read_bytes().splitlines()]
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
        # All mutable state: the engines, the workers' balancers, the events to come, and the leases of who is under way.
        self._replicas = [Replica(Machine(blocks=case.blocks, speed=speed)) for speed in speeds]
        self._balancers = self._make_balancers()
        self._events: list[tuple[float, int, int, int]] = []
        self._numbers = itertools.count()
        self._leases: dict[Job, Lease] = {}
        self._picking = 0.0

    def __repr__(self) -> str:
        return f"<Replay {self._case}>"

    def _make_balancers(self) -> list[Balancer]:
        names = {MODEL: [place.name for place in self._places]}
        case, memory = self._case, shared_memory()
        tables = [MODEL] if case.policy == "predicted_ttft" else []
        boards = [Board(names, tables, case.workers, i, memory) for i in range(case.workers)]
        return [Balancer(names, {MODEL: case.policy}, board, self._chance.random, case.stale) for board in boards]

    def run(self) -> Result:
        jobs = [
            Job(row.timestamp / 1000 / self._case.rate, row.input_length, row.output_length, row.hash_ids)
            for row in self._trace.rows
        ]
        for job, prompt in zip(jobs, self._trace.prompts, strict=True):
            while self._events and self._events[0][0] <= job.arrived:
                self._step()
            self._arrive(job, prompt)
        while self._events:
            self._step()
        counted = [job for job in jobs if job.arrived >= WARM / self._case.rate]
        waits = sorted(job.first - job.arrived for job in counted)
        hits, queries = sum(r.hits for r in self._replicas), sum(r.queries for r in self._replicas)
        return Result(
            p50=waits[len(waits) // 2], p99=waits[int(len(waits) * 0.99)], mean=statistics.fmean(waits),
            hits=hits / queries, pick=self._picking / len(jobs) * 1e6,
        )  # fmt: skip

    def _arrive(self, job: Job, prompt: Prompt) -> None:
        balancer = self._chance.choice(self._balancers)
        begun = time.perf_counter()
        picked = balancer.pick(MODEL, self._places, prompt, job.arrived)
        self._picking += time.perf_counter() - begun
        assert picked
        place, self._leases[job] = picked
        replica = self._replicas[place.index]
        replica.waiting.append(job)
        if not replica.busy:
            self._schedule(place.index, replica.start(job.arrived))
        elif (end := replica.interrupt(job.arrived)) is not None:
            self._schedule(place.index, end)

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

def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--traces", type=Path, default=Path("../shared/data"))
    p.add_argument("--trace", default="conversation")
    p.add_argument("--cases", nargs="*", default=["{}"])
    p.add_argument("--policies", default="round_robin,least_loaded,predicted_ttft")
    p.add_argument("--first", type=int, default=0)
    a = p.parse_args()
    t=time.time()
    trace = Trace(a.traces / f"trace_mooncake_{a.trace}.jsonl")
    print(trace, time.time()-t)
    if a.first: trace.rows = trace.rows[:a.first]; trace.prompts = trace.prompts[:a.first]
    gc.freeze()
    for c in a.cases:
        for policy in a.policies.split(","):
            t=time.time()
            case = msgspec.structs.replace(msgspec.json.decode(c, type=Case), policy=policy)
            r = Replay(trace, case).run()
            print(c, policy, {k: round(v,3) for k,v in msgspec.structs.asdict(r).items()}, f"{time.time()-t:.1f}s", flush=True)


if __name__ == "__main__":
    main()
