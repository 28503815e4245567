"""Whether something always answers: engines are killed, stopped, cut off and slowed while clients ask. `make chaos`

    make chaos ARGS="--seconds 60 --seed 3"

Two real engines and the cloud (the simulator, an endpoint of its own) carry a steady load of streams and plain
requests; some ask for the engines first, some for the cloud. What is done to them is in benchmarks.faults, how each
answer is checked in benchmarks.questions. Exits with 1 unless

1. no request failed, and every answer was whole, in the words that were to be expected;
2. no generation goes on afterwards, in the proxy, the engines or the cloud;
3. every breaker is closed in the end, when the engines that were lost have been started again;
4. the worker holds about as much memory as before the faults;
5. no process is left behind.
"""

import argparse
import asyncio
import contextlib
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import httpx2
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.faults import Chaos
from benchmarks.load import percentile
from benchmarks.questions import FAR, HOME, QUESTIONS, Question, Said, Unsound, judge, read
from benchmarks.stage import SILENCE, Stage, running, stage, until

_SHARES: Final = {HOME: 0.8, FAR: 0.2}
_MOST_UNDER_WAY: Final = 12  # requests
_PATIENCE: Final = 180.0  # seconds for an answer; far more than any may take
_CALM: Final = 0.1  # share of the time that comes before the faults
_RECOVERY: Final = 240.0  # seconds; engines that start together, on two cores
_GROWTH: Final = 8.0  # MiB
_COUNTERS: Final = ("attempt_failures", "streams_resumed", "fallbacks", "breaker_transitions")


class Outcome(msgspec.Struct, frozen=True):
    """What came of a request. who: has spoken; empty if it failed. problem: what is wrong with the answer."""

    question: Question
    seconds: float
    level: str = "-"
    attempts: str = "-"
    who: str = ""
    problem: str = ""


class Report(msgspec.Struct, frozen=True):
    """What came of a run. faults, counters: name -> count. missed: the musts that were not kept, each in a sentence."""

    calm: list[Outcome]
    stormy: list[Outcome]
    faults: dict[str, int]
    counters: dict[str, float]
    restarts: int
    memory: tuple[float, float]  # MiB, before the faults and after all
    missed: list[str]


class Clients:
    """A steady load. What it asks depends on the seed alone."""

    def __init__(self, http: httpx2.AsyncClient, rate: float, seed: int) -> None:
        # All mutable state: the chance, what undisturbed engines say to each prompt, what came of all requests, those
        # that are under way.
        self._http = http
        self._rate = rate
        self._chance = random.Random(seed)
        self._known: dict[int, Said] = {}
        self.outcomes: list[Outcome] = []
        self._asking: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Clients {len(self.outcomes)} answered, {len(self._asking)} under way>"

    async def learn(self) -> None:
        """Ask every question once, to know the answers."""
        answers = await asyncio.gather(*map(self._say, QUESTIONS))
        self._known = {question.number: said for question, (_, _, said) in zip(QUESTIONS, answers, strict=True)}

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            if len(self._asking) < _MOST_UNDER_WAY:
                task = asyncio.create_task(self._ask(self._next()))
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) / self._rate)

    async def end(self) -> None:
        """Wait for the answers under way."""
        await asyncio.gather(*self._asking)

    def _next(self) -> Question:
        (model,) = self._chance.choices(list(_SHARES), list(_SHARES.values()))
        return Question(model, self._chance.randrange(len(QUESTIONS)), stream=self._chance.random() < 0.6)

    async def _ask(self, question: Question) -> None:
        began = time.monotonic()
        try:
            level, attempts, said = await self._say(question)
            who = judge(question, said, self._known[question.number])
            outcome = Outcome(question, time.monotonic() - began, level, attempts, who)
        except Exception as error:
            problem = str(error) if isinstance(error, Unsound) else repr(error)
            print(f"  NOT WELL: {question}: {problem}", flush=True)
            outcome = Outcome(question, time.monotonic() - began, problem=problem)
        self.outcomes.append(outcome)

    async def _say(self, question: Question) -> tuple[str, str, Said]:
        """Return how many models were passed over, the number of attempts, and the answer."""
        answer = await self._http.post("/v1/chat/completions", json=question.body)
        said = read(question, answer.status_code, answer.content)
        return answer.headers["x-polyvox-fallback-level"], answer.headers["x-polyvox-attempts"], said


async def run(seconds: float, rate: float, seed: int) -> Report:
    """Run it all, and return what came of it."""
    with tempfile.TemporaryDirectory(prefix="polyvox-chaos-") as folder:
        async with stage(Path(folder)) as (server, cloud), _client(server.origin) as http:
            clients = Clients(http, rate, seed)
            await clients.learn()
            asking = asyncio.create_task(clients.run())
            print(f"{len(QUESTIONS)} answers are known; all is calm", flush=True)
            await asyncio.sleep(_CALM * seconds)
            await http.get("/metrics")  # which loads modules
            calm, before = list(clients.outcomes), server.worker_mib()
            chaos = Chaos(server.victims, cloud, seed, SILENCE)
            await _for(seconds, chaos.run())
            await chaos.heal()
            print("the faults are over", flush=True)
            missed = await _recover(server, http)
            asking.cancel()
            await clients.end()
            missed += await _generations(server, http, cloud)
            counters = _counters((await http.get("/metrics")).text)
            stormy = clients.outcomes[len(calm) :]
            restarts, after = await server.restarts(), server.worker_mib()
            left = await server.end()
    missed += _judged(calm + stormy, (before, after), left)
    return Report(calm, stormy, dict(chaos.done), counters, restarts, (before, after), missed)


def _client(origin: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=origin, timeout=_PATIENCE, trust_env=False)


async def _for(seconds: float, doing: Coroutine[Any, Any, None]) -> None:
    """Let something go on for so long."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(doing, seconds)


async def _recover(server: Stage, http: httpx2.AsyncClient) -> list[str]:
    """Wait until the engines are back and all breakers closed, while the load goes on; return what is missed."""

    async def closed() -> bool:
        return await server.ready() and not _open_breakers((await http.get("/metrics")).text)

    try:
        await until(closed, _RECOVERY)
    except TimeoutError:
        still = _open_breakers((await http.get("/metrics")).text)
        return [f"not all is well after {_RECOVERY:.0f} s: breakers {still or 'closed'}: {server.log()}"]
    return []


async def _generations(server: Stage, http: httpx2.AsyncClient, cloud: httpx2.AsyncClient) -> list[str]:
    """Return where requests are still under way, though every client has its answer."""
    found: dict[str, float] = {}

    async def none() -> bool:
        found["the proxy"] = _under_way((await http.get("/metrics")).text)
        found["the engines"] = await server.under_way()
        found["the cloud"] = running((await cloud.get("/metrics")).text)
        return not any(found.values())

    try:
        await until(none, 10.0)
    except TimeoutError:
        return [f"generations go on: {found}"]
    return []


def _under_way(page: str) -> float:
    values = re.findall(r"^polyvox_num_requests_running\{.*\} (\S+)$", page, re.MULTILINE)
    return sum(map(float, values))


def _open_breakers(page: str) -> list[str]:
    found = re.findall(r'^polyvox_breakers\{endpoint="([^"]*)".*state="(open|half_open)"\} (\S+)$', page, re.M)
    return [f"{endpoint} {state}" for endpoint, state, count in found if float(count)]


def _counters(page: str) -> dict[str, float]:
    """Return what the proxy counted, without zeros."""
    lines = re.findall(r"^polyvox_((?:" + "|".join(_COUNTERS) + r")_total\{.*\}) (\S+)$", page, re.M)
    return {name.replace("_total", ""): float(value) for name, value in lines if float(value)}


def _judged(outcomes: Sequence[Outcome], memory: tuple[float, float], left: list[int]) -> list[str]:
    failed = [o for o in outcomes if o.problem]
    missed = [f"{len(failed)} of {len(outcomes)} answers are not what they must be"] if failed else []
    missed += [] if outcomes else ["nothing was asked"]
    missed += [f"memory grew from {memory[0]:.1f} to {memory[1]:.1f} MiB"] if memory[1] - memory[0] > _GROWTH else []
    return missed + ([f"processes are left: {left}"] if left else [])


# What is printed


def show(report: Report) -> None:
    """Print the tables."""
    terminal = Console(width=None if sys.stdout.isatty() else 120)
    terminal.print(_faults(report), _outcomes(report), _latencies(report), *_counts(report))
    for question, problem in ((o.question, o.problem) for o in report.calm + report.stormy if o.problem):
        terminal.print(f"{question}: {problem}", markup=False, highlight=False)
    for must in report.missed:
        terminal.print(f"MISSED: {must}", markup=False, highlight=False)
    terminal.print("all musts are kept" if not report.missed else f"{len(report.missed)} musts are missed")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def _faults(report: Report) -> Table:
    table = _table("Faults", "fault", "injected")
    for name, count in sorted(report.faults.items(), key=lambda item: -item[1]):
        table.add_row(name, str(count))
    return table


def _outcomes(report: Report) -> Table:
    table = _table("Answers under faults", "asked", "as", "who spoke", "level", "attempts", "requests")
    rows = Counter((o.question.model, _kind(o.question), o.who or "FAILED", o.level, o.attempts) for o in report.stormy)
    for row, count in sorted(rows.items()):
        table.add_row(*row, str(count))
    return table


def _latencies(report: Report) -> Table:
    """Added latency is what an answer took beyond the median of calm answers to such questions."""
    table = _table(
        "Seconds to the whole answer", "asked", "as", "calm p50", "p99", "faults p50", "p99", "added p50", "p99"
    )
    for model in _SHARES:
        for kind in ("plain", "stream"):
            calm, stormy = _seconds(report.calm, model, kind), _seconds(report.stormy, model, kind)
            usual = percentile(calm, 0.5)
            figures = [percentile(values, share) for values in (calm, stormy) for share in (0.5, 0.99)]
            table.add_row(model, kind, *(f"{f:.2f}" for f in (*figures, figures[2] - usual, figures[3] - usual)))
    return table


def _seconds(outcomes: Iterable[Outcome], model: str, kind: str) -> list[float]:
    return sorted(o.seconds for o in outcomes if o.question.model == model and _kind(o.question) == kind)


def _kind(question: Question) -> str:
    return "stream" if question.stream else "plain"


def _counts(report: Report) -> list[Table | str]:
    table = _table("What the proxy counted", "counter", "count")
    for name, count in sorted(report.counters.items()):
        table.add_row(name, f"{count:.0f}")
    asked, before, after = len(report.calm) + len(report.stormy), *report.memory
    return [table, f"{asked} requests, engines started again {report.restarts} times",
            f"memory of the worker: {before:.1f} MiB before the faults, {after:.1f} MiB at the end"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long faults are injected")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    report = asyncio.run(run(given.seconds, given.rate, given.seed))
    show(report)
    sys.exit(1 if report.missed else 0)


if __name__ == "__main__":
    main()
