"""Starts `polyvox serve` with real engines and looks behind it: its engines, their gauges, its processes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import msgspec
import psutil

from benchmarks.ports import free_port
from engines import marks
from engines.paths import StatePaths
from engines.spec import EngineStatus, FleetStatus

START_DEADLINE = 900.0  # seconds; a machine with two cores starts six engines in a third of it
HANG_TIMEOUT = 10.0  # seconds; long for an engine that computes, short for a test that waits for one that does not

CPU_ENGINE = {
    "dtype": "float32",
    "devices": "cpu",
    "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
    "start_timeout": START_DEADLINE,
    "restart": {"first_delay": 0.1},
}


def engine(weights: str | Path, max_model_len: int | None = None, **args: object) -> dict[str, object]:
    """Return the `engine:` section of a small model on the CPU; `args` are flags of vLLM, `_` for `-`."""
    flags = {"enforce-eager": True, "max-num-seqs": 16, **{k.replace("_", "-"): v for k, v in args.items()}}
    return {**CPU_ENGINE, "weights": str(weights), "max_model_len": max_model_len, "args": flags}


class Footprint(msgspec.Struct, frozen=True):
    """The processes of a server at one moment, and the marks that those of its engines carried."""

    processes: tuple[psutil.Process, ...]
    marks: frozenset[str]

    def alive(self) -> list[psutil.Process]:
        """Return those that still run, and every process of this machine with one of the marks."""
        return [p for p in psutil.process_iter(["status"]) if self._has(p) and p.info["status"] != "zombie"]

    def _has(self, process: psutil.Process) -> bool:
        return process in self.processes or _mark(process) in self.marks


def command(process: psutil.Process) -> str:
    """Return the command line of a process. One that was killed is a zombie for a moment, and has none any more."""
    try:
        return " ".join(process.cmdline())
    except (psutil.ZombieProcess, psutil.NoSuchProcess):
        return ""


class Server(msgspec.Struct, frozen=True):
    """A running `polyvox serve`: its address, its folders, its process and where that writes."""

    base_url: str
    paths: StatePaths
    process: psutil.Popen
    output: Path

    @property
    def config(self) -> Path:
        """The configuration's file."""
        return self.output.with_name("polyvox.yaml")

    def fleet(self) -> dict[str, EngineStatus]:
        """Return the engines by model, as the supervisor tells them over its control socket."""
        transport = httpx2.HTTPTransport(uds=str(self.paths.control_socket))
        with httpx2.Client(transport=transport, base_url="http://control", timeout=60) as client:
            fleet = msgspec.json.decode(client.get("/fleet").content, type=FleetStatus)
        return {e.model: e for e in fleet.engines}

    def engine_client(self, model: str) -> httpx2.Client:
        """Return a client that speaks to the engine of a model past the proxy."""
        address = self.fleet()[model].address
        assert address, f"the engine of {model} has no address"
        transport = httpx2.HTTPTransport(uds=address.removeprefix("unix:"))
        return httpx2.Client(transport=transport, base_url="http://engine", timeout=60)

    def gauge(self, model: str, name: str) -> float:
        """Return the sum of a metric of the engine of a model over its labels."""
        with self.engine_client(model) as client:
            text = client.get("/metrics").raise_for_status().text
        values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert values, f"the engine of {model} has no metric {name}"
        return sum(map(float, values))

    def processes(self, engine: str) -> list[psutil.Process]:
        """Return the processes of the engine of a model, or of MODEL/REPLICA, found below the server by their mark."""
        below = self.process.children(recursive=True)
        return [p for p in below if ((_mark(p) or "").partition(":")[2] + "/").startswith(f"{engine}/")]

    def core(self, engine: str) -> psutil.Process:
        """Return the process of an engine that does the work: the child of vLLM's API server."""
        (core,) = (p for p in self.processes(engine) if "EngineCore" in command(p))
        return core

    def footprint(self) -> Footprint:
        """Return all processes of the server; fail where no engine is marked, as leftovers could not be found."""
        below = self.process.children(recursive=True)
        found = frozenset(m for p in below if (m := _mark(p)))
        assert found, "the engines carry no mark"
        return Footprint((psutil.Process(self.process.pid), *below), found)

    def log(self) -> str:
        """Return the end of what the server has written."""
        return self.output.read_text(errors="replace")[-6000:]


@contextlib.contextmanager
def serve(configuration: dict[str, object], folder: Path) -> Iterator[Server]:
    """Run `polyvox serve` until the block ends, and fail unless it then ends well and leaves no process.

    A block that has ended the server itself is left alone.
    """
    with beginning(configuration, folder) as server:
        wait_until_ready(server)
        yield server


@contextlib.contextmanager
def beginning(configuration: dict[str, object], folder: Path) -> Iterator[Server]:
    """As `serve`, for a block that does something else while the server starts."""
    server = start(configuration, folder)
    try:
        yield server
        if server.process.is_running() and server.process.poll() is None:
            stop(server)
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def shared_data() -> Path:
    """Return the folder of environments and weights, which all servers share, those of the user included."""
    named = os.environ.get("POLYVOX_DATA_DIR")
    return StatePaths.resolve(data_dir=Path(named) if named else None).data


def start(configuration: dict[str, object], folder: Path) -> Server:
    """Start `polyvox serve` and return at once."""
    paths = StatePaths.resolve(folder / "state", shared_data())
    config, output, port = folder / "polyvox.yaml", folder / "output.log", free_port()
    config.write_text(json.dumps(configuration))  # JSON is YAML
    command = [sys.executable, "-m", "proxy", "serve", "--config", config, "--port", str(port)]
    folders = ["--state-dir", folder / "state", "--data-dir", paths.data]
    with output.open("ab") as log:
        process = psutil.Popen([*command, *folders], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    return Server(f"http://127.0.0.1:{port}", paths, process, output)


def wait_until_ready(server: Server) -> None:
    """Wait until every engine is ready; fail at once where one has given up or the server has ended."""

    def ready() -> bool:
        assert server.process.poll() is None, f"the server ended:\n{server.log()}"
        with contextlib.suppress(httpx2.TransportError):
            fleet = server.fleet().values()
            for e in fleet:
                assert e.state != "failed", f"{e.id} failed: {e.detail}\n{server.log()}"
            return bool(fleet) and all(e.state == "ready" for e in fleet)
        return False

    eventually(ready, START_DEADLINE, lambda: f"not all engines are ready:\n{server.log()}", pause=0.1)


def stop(server: Server) -> None:
    """Ask the server to end, and fail unless it ends well and leaves no process of an engine."""
    footprint = server.footprint()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0, server.log()
    assert footprint.alive() == []


def _mark(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(marks.VARIABLE)
    return None


def eventually(
    condition: Callable[[], object], deadline: float = 60.0, message: Callable[[], str] = str, pause: float = 0.05
) -> None:
    """Poll until the condition holds; fail after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, message() or f"not so within {deadline} s"
        time.sleep(pause)


def answers(client: httpx2.Client, url: str) -> bool:
    """Say whether a server is there, and answers with 200."""
    try:
        return client.get(url).status_code == 200
    except httpx2.TransportError:
        return False
