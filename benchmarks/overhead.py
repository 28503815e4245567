"""What the proxy costs beside its peers: CPU for each request, latency added, memory. `make bench-overhead`

Everything is measured in one run, in front of the same two mock upstreams: the proxy alone on the first core (or as
many as it has workers, where there are enough), everything else on the last. CPU is that of a proxy's whole process
tree, from /proc. The median of the runs is written to benchmarks/RESULTS.md.
"""

import argparse
import contextlib
import datetime
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from benchmarks import processes
from benchmarks.load import Asked, Result
from benchmarks.peers import KEY, LITELLM, MODEL, OURS, PEERS, VLLM_ROUTER, Peer, Setting, Unavailable
from benchmarks.upstream import EVENTS

HERE = Path(__file__).parent
DIRECT = "direct"
UPSTREAM_PORTS = (9411, 9412)
PROXY_PORT = 9421
STARTING = 120.0  # seconds
WARM_UP = 1.0


class Case(msgspec.Struct, frozen=True):
    """One kind of load. rate: requests a second, None for as many as the connections carry."""

    name: str
    title: str
    asked: Asked
    connections: int = 32
    rate: float | None = None
    workers: int = 1

    @property
    def divisor(self) -> int:
        """Return into how many parts the CPU of a request is divided: the events of a paced stream, else one."""
        return EVENTS if self.asked.pace else 1


PLAIN = Asked(model=MODEL, key=KEY)
STREAM = Asked(model=MODEL, key=KEY, stream=True)
CASES = (
    Case("plain", "1 KB prompt, not streamed", PLAIN),
    Case("large", "100 KB prompt, not streamed", msgspec.structs.replace(PLAIN, prompt=100_000)),
    Case("stream", f"1 KB prompt, a stream of {EVENTS} events, unthrottled", STREAM),
    Case("paced", "256 streams at once, 10 ms per token", msgspec.structs.replace(STREAM, pace=10), 256),
    Case("rate", "1 KB prompt, not streamed, 500 requests/s", PLAIN, rate=500.0),
    Case("plain-2", "1 KB prompt, not streamed, 2 workers", PLAIN, workers=2),
    Case("stream-2", f"1 KB prompt, a stream of {EVENTS} events, unthrottled, 2 workers", STREAM, workers=2),
)


class Measured(msgspec.Struct, frozen=True):
    """What one run of one case showed. cpu: microseconds for each request or event; nan where there is no process."""

    rate: float
    p50: float
    p99: float
    cpu: float
    memory: float
    start: float
    errors: int
    first_error: str = ""


class Cores(msgspec.Struct, frozen=True):
    """Which cores the proxy has, and which everything else."""

    proxy: tuple[int, ...]
    rest: tuple[int, ...]


def split_cores(available: Sequence[int], workers: int) -> Cores:
    """Give the proxy a core for each worker if two are left for the rest, else the first core."""
    if len(available) >= workers + 2:
        return Cores(tuple(available[:workers]), tuple(available[workers:]))
    return Cores(tuple(available[:1]), tuple(available[1:] or available))


def main() -> None:
    given = _arguments()
    peers = _installed([peer for peer in PEERS if _chosen(peer.name, given.peers)])
    cases = [case for case in CASES if _chosen(case.name, given.cases)]
    seconds = 2.0 if given.quick else given.seconds
    runs = 1 if given.quick else given.runs
    found: dict[tuple[str, str], list[Measured]] = {}
    with tempfile.TemporaryDirectory() as folder, _upstreams(Path(folder)):
        for number in range(runs):
            for case, name, measured in _one_run(peers, cases, seconds, Path(folder, str(number))):
                found.setdefault((case.name, name), []).append(measured)
                print(f"run {number + 1}: {case.name:9} {name:24} {_line(measured)}", flush=True)
    names = [DIRECT, *(peer.name for peer in peers)]
    text = report(cases, names, {key: median(values) for key, values in found.items()}, runs, seconds)
    print(text)
    if given.write:
        given.write.write_text(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="part of the names of peers, with commas between them; all without")
    parser.add_argument("--cases", help=f"names with commas between them, of {', '.join(c.name for c in CASES)}")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one run, 2 seconds each")
    parser.add_argument("--write", type=Path, default=HERE / "RESULTS.md", help="where the tables go")
    parser.add_argument("--no-write", dest="write", action="store_const", const=None)
    return parser.parse_args()


def _chosen(name: str, wanted: str | None) -> bool:
    """Cases are named exactly, peers by a part of their name."""
    words = wanted.lower().split(",") if wanted else [""]
    exact = {case.name for case in CASES}
    return any(word == name if name in exact and word else word in name.lower() for word in words)


def _installed(peers: Iterable[Peer]) -> list[Peer]:
    there = []
    for peer in peers:
        try:
            peer.install()
            there.append(peer)
        except Unavailable as e:
            print(f"{peer.name} is left out: {e}", file=sys.stderr)
    return there


@contextlib.contextmanager
def _upstreams(folder: Path) -> Iterator[None]:
    cores = split_cores(sorted(os.sched_getaffinity(0)), 1)
    command = (sys.executable, "-m", "benchmarks.upstream", *map(str, UPSTREAM_PORTS))
    with processes.pinned(cores.rest[-1:], command, folder / "upstream.log"):
        until_up(f"http://127.0.0.1:{UPSTREAM_PORTS[0]}", {}, 10)
        yield


def _one_run(
    peers: Sequence[Peer], cases: Sequence[Case], seconds: float, folder: Path
) -> Iterator[tuple[Case, str, Measured]]:
    folder.mkdir()
    for case in cases:
        if case.workers == 1:
            yield case, DIRECT, _measure(case, _direct_url(), {}, [], seconds, 0.0)
    for peer in peers:
        for workers in sorted({case.workers for case in cases}):
            if workers == 1 or peer.scales:
                chosen = [case for case in cases if case.workers == workers]
                yield from _run_peer(peer, chosen, workers, seconds, folder)


def _direct_url() -> str:
    return f"http://127.0.0.1:{UPSTREAM_PORTS[0]}/v1/chat/completions"


def _run_peer(
    peer: Peer, cases: Sequence[Case], workers: int, seconds: float, folder: Path
) -> Iterator[tuple[Case, str, Measured]]:
    own = folder / f"{peer.name}-{workers}".replace(" ", "-")
    own.mkdir()
    cores = split_cores(sorted(os.sched_getaffinity(0)), workers)
    setting = Setting(PROXY_PORT, tuple(f"http://127.0.0.1:{port}" for port in UPSTREAM_PORTS), workers, own)
    start = peer.start(peer.install(), setting)
    began = time.monotonic()
    with processes.pinned(cores.proxy, start.command, own / "log", start.environ) as process:
        origin = f"http://127.0.0.1:{PROXY_PORT}"
        if not until_up(origin, start.headers, STARTING, process):
            print(f"{peer.name} does not start: {(own / 'log').read_text()[-500:]}", file=sys.stderr)
            return
        listening = time.monotonic() - began
        for case in cases:
            pids = processes.tree(process.pid)
            url, longer = origin + start.path, seconds * peer.patience
            yield case, peer.name, _measure(case, url, start.headers, pids, longer, listening)


def until_up(
    origin: str, headers: dict[str, str], limit: float, process: subprocess.Popen[bytes] | None = None
) -> bool:
    """Wait until something answers, whatever it says."""
    end = time.monotonic() + limit
    while time.monotonic() < end and (process is None or process.poll() is None):
        request = urllib.request.Request(f"{origin}/v1/models", headers={"Authorization": f"Bearer {KEY}", **headers})
        try:
            urllib.request.urlopen(request, timeout=2).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(0.02)
        else:
            return True
    return False


def _measure(
    case: Case, url: str, headers: dict[str, str], pids: Sequence[int], seconds: float, start: float
) -> Measured:
    asked = msgspec.structs.replace(case.asked, headers=headers)
    _drive(case, url, asked, WARM_UP)
    before = processes.cpu_seconds(pids)
    result = _drive(case, url, asked, seconds)
    used = processes.cpu_seconds(pids) - before
    return Measured(
        rate=result.rate,
        p50=result.p50,
        p99=result.p99,
        cpu=used / result.requests / case.divisor * 1e6 if pids and result.requests else math.nan,
        memory=processes.resident_mib(pids) if pids else math.nan,
        start=start,
        errors=result.errors,
        first_error=result.first_error,
    )


def _drive(case: Case, url: str, asked: Asked, seconds: float) -> Result:
    """Put the load of a case on a URL, with wrk where there is one and it can: it leaves more of its core to others."""
    core = str(split_cores(sorted(os.sched_getaffinity(0)), case.workers).rest[-1])
    if case.rate is None and shutil.which("wrk"):
        return _drive_wrk(case, url, asked, seconds, core)
    words = ["--connections", str(case.connections), "--seconds", str(seconds)]
    words += ["--rate", str(case.rate)] if case.rate else []
    words += ["--asked", msgspec.json.encode(asked).decode()]
    command = ["taskset", "-c", core, sys.executable, "-m", "benchmarks.load", url, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return msgspec.json.decode(done.stdout, type=Result)


def _drive_wrk(case: Case, url: str, asked: Asked, seconds: float, core: str) -> Result:
    script = str(HERE / "wrk.lua")
    words = ["-t1", f"-c{case.connections}", f"-d{max(1, round(seconds))}s", "--timeout", "20s", "-s", script, url]
    fields = {"content-type": "application/json", "authorization": f"Bearer {asked.key}", **asked.headers}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bodies").write_bytes(b"\n".join(asked.bodies()))
        Path(folder, "headers").write_text("".join(f"{k}\t{v}\n" for k, v in fields.items()))
        environ = {**os.environ, "LOAD": folder}
        command = ["taskset", "-c", core, "wrk", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    first = next((line for line in done.stdout.splitlines() if line.startswith("status")), "")
    return msgspec.structs.replace(msgspec.json.decode(line, type=Result), first_error=first)


def median(runs: Sequence[Measured]) -> Measured:
    """Return the median of each figure."""
    rows = [msgspec.structs.astuple(run) for run in runs]
    middle = [statistics.median(column) for column in list(zip(*rows, strict=True))[:-1]]
    return Measured(*middle[:-1], errors=round(middle[-1]), first_error=next((r.first_error for r in runs), ""))


def _line(m: Measured) -> str:
    text = f"{m.rate:9.0f}/s  p50 {m.p50:8.2f}  p99 {m.p99:8.2f} ms  {m.cpu:9.1f} us CPU  {m.memory:7.1f} MiB"
    return f"{text}  {m.errors} ERRORS {m.first_error}" if m.errors or m.first_error else text


# The report


def report(
    cases: Sequence[Case], names: Sequence[str], found: dict[tuple[str, str], Measured], runs: int, seconds: float
) -> str:
    """Return the results as Markdown: a table for each case, and the ratios that matter."""
    parts = [_heading(runs, seconds)]
    for case in cases:
        rows = [(name, found[case.name, name]) for name in names if (case.name, name) in found]
        if rows:
            parts.append(_table(case, rows))
    return "\n".join(parts)


def _heading(runs: int, seconds: float) -> str:
    now = datetime.datetime.now(datetime.UTC)
    return f"""# What the proxy costs

{now:%Y-%m-%d}, {_machine()}, Python {platform.python_version()}; median of {runs} run(s) of {seconds:g} s for each \
figure, written by `make bench-overhead`.

The proxy alone on core 0, load generator and two mock upstreams on another. CPU is user and system time of a proxy's
whole process tree. Latency is from when a request was due to the last byte of its answer. Ratios are of CPU.
"""


def _machine() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def _table(case: Case, rows: Sequence[tuple[str, Measured]]) -> str:
    figures = dict(rows)
    unit = "CPU us/event" if case.divisor > 1 else "CPU us/request"
    head = f"| | requests/s | p50 ms | p99 ms | {unit} | / vllm-router | / LiteLLM | MiB | errors |"
    lines = [f"## {case.title}", "", head, "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for name, m in rows:
        shown = [f"{m.rate:,.0f}", f"{m.p50:.2f}", f"{m.p99:.2f}", _number(m.cpu)]
        shown += [_ratio(m, figures.get(VLLM_ROUTER)), _ratio(m, figures.get(LITELLM)), _number(m.memory)]
        lines.append(f"| {'**' * (name == OURS)}{name}{'**' * (name == OURS)} | {' | '.join(shown)} | {m.errors} |")
    lines += [_added(figures)] if case.rate and {DIRECT, OURS} <= figures.keys() else []
    return "\n".join([*lines, ""])


def _added(figures: dict[str, Measured]) -> str:
    direct, ours = figures[DIRECT], figures[OURS]
    return f"\nAdded by {OURS} over direct: p50 {ours.p50 - direct.p50:.2f} ms, p99 {ours.p99 - direct.p99:.2f} ms."


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.1f}"


def _ratio(m: Measured, base: Measured | None) -> str:
    if base is None or not base.cpu or math.isnan(base.cpu + m.cpu):
        return ""
    ratio = m.cpu / base.cpu
    return f"{ratio:.2f}" if ratio >= 0.1 else f"1/{1 / ratio:.0f}"


if __name__ == "__main__":
    main()
