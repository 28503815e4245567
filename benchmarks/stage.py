"""What `make chaos` runs: `polyvox serve` with two real engines, and the cloud, which is the simulator."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import yaml

from benchmarks import processes
from benchmarks.faults import Relay, Victim
from benchmarks.ports import free_port
from benchmarks.questions import FAR, HOME
from engines import marks
from engines.control_client import ControlClient, ControlUnreachable
from engines.paths import StatePaths
from engines.spec import FleetStatus

REPLICAS = 2
SILENCE = 7.0  # seconds; longer than is waited for a token
_START = 600.0  # seconds
_SHIPPED = Path(__file__).parent.parent / "config/polyvox.yaml"
_CLOUD = {"--time-to-first-token": "0.1", "--time-per-token": "0.03", "--tokens": "100000"}
_TIMES = {"connect": 2, "first_byte": 20, "between_bytes": 5, "first_token": 10, "between_tokens": 5}
_BREAKER = {"failures": 3, "recovery": 3, "max_recovery": 12}


def configuration(shipped: Path, cloud: str) -> dict[str, Any]:
    """Return the shipped configuration, with a second engine, the cloud behind both, and faults found out soon."""
    config: dict[str, Any] = yaml.safe_load(shipped.read_text())
    engine = config["models"][HOME]["engine"] | {
        "replicas": REPLICAS,
        "hang_timeout": 12,
        "restart": {"first_delay": 0.5, "max_delay": 1, "give_up_after": 1000},
    }
    far = {"base_url": f"{cloud}/v1", "model": "cloud", "continues": True}
    settings = {"timeouts": _TIMES, "breaker": _BREAKER}
    return {
        "server": {"host": "127.0.0.1", "workers": 1},
        "cache": False,  # greedy answers would come from it
        "models": {
            HOME: {"engine": engine, **settings},
            "cloud": {"endpoints": [far], **settings},
            FAR: {"endpoints": [far], **settings},
        },
        "fallbacks": {HOME: ["cloud"], FAR: [HOME]},
    }


class Stage:
    """A running server, and the relays to its engines."""

    def __init__(self, process: subprocess.Popen[bytes], origin: str, paths: StatePaths, output: Path) -> None:
        self.process = process
        self.origin = origin
        self._paths = paths
        self._output = output
        self._control = ControlClient(paths.control_socket)
        # All mutable state: the relays, by the ids of their engines, and the tasks that keep them in their place.
        self._relays: dict[str, Relay] = {}
        self._keeping: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<Stage {self.origin} {list(self._relays.values())!r}>"

    async def ready(self) -> bool:
        """Say whether all engines take requests. Raises RuntimeError where none ever will."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{self.log()}")
        fleet = await self._fleet()
        return len(fleet.engines) == REPLICAS and all(e.state == "ready" for e in fleet.engines)

    async def intrude(self) -> None:
        """Put relays between the proxy and its engines."""
        for engine in (await self._fleet()).engines:
            assert engine.address
            relay = self._relays[engine.id] = Relay(Path(engine.address.removeprefix("unix:")))
            await relay.step_between()
            self._keeping.append(asyncio.create_task(relay.keep()))

    async def victims(self) -> list[Victim]:
        """Return the engines that are ready."""
        found = []
        for engine in (await self._fleet()).engines:
            members = marks.marked(self._state(), engine.id)
            core = next((pid for pid in members if b"EngineCore" in _command(pid)), None)
            if engine.state == "ready" and engine.pid and core:
                found.append(Victim(engine, engine.pid, core, self._relays[engine.id]))
        return found

    async def under_way(self) -> float:
        """Return the generations that the ready engines run or queue, as their own gauges tell."""
        total = 0.0
        for engine in (await self._fleet()).engines:
            if engine.state == "ready" and engine.address:
                transport = httpx2.AsyncHTTPTransport(uds=engine.address.removeprefix("unix:"))
                async with httpx2.AsyncClient(transport=transport, base_url="http://engine") as client:
                    total += running((await client.get("/metrics")).text)
        return total

    async def restarts(self) -> int:
        """Return how often engines were started again."""
        return sum(engine.restarts for engine in (await self._fleet()).engines)

    def worker_mib(self) -> float:
        """Return the resident memory of the worker."""
        worker = [pid for pid in processes.tree(self.process.pid) if b"proxy.worker" in _command(pid)]
        return processes.resident_mib(worker)

    def log(self) -> str:
        """Return the end of what the server has written."""
        return self._output.read_text(errors="replace")[-4000:]

    async def end(self) -> list[int]:
        """End the server as its user would; return the processes that it leaves behind."""
        for task in self._keeping:
            task.cancel()
        for relay in self._relays.values():
            await relay.close()
        await self._control.aclose()
        below = processes.tree(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(self.process.wait, 60)
        return sorted({*marks.marked(self._state()), *(pid for pid in below if _command(pid))})

    async def _fleet(self) -> FleetStatus:
        try:
            return await self._control.fleet()
        except ControlUnreachable:
            return FleetStatus(version=0)

    def _state(self) -> str:
        return marks.state_id(self._paths)


@contextlib.asynccontextmanager
async def stage(folder: Path) -> AsyncIterator[tuple[Stage, httpx2.AsyncClient]]:
    """Run the server and the cloud until the block ends; give the server, engines ready, and a client of the cloud."""
    with _cloud() as cloud, _server(folder, cloud) as server:
        await until(server.ready, _START, server.log)
        await server.intrude()
        async with httpx2.AsyncClient(base_url=cloud, timeout=5) as client:
            yield server, client


@contextlib.contextmanager
def _server(folder: Path, cloud: str) -> Iterator[Stage]:
    """Run the server until the block ends; give it at once."""
    shared = os.environ.get("POLYVOX_DATA_DIR")  # environments and weights are made once
    paths = StatePaths.resolve(folder / "state", Path(shared) if shared else StatePaths.resolve().data)
    config, output, port = folder / "polyvox.yaml", folder / "output.log", free_port()
    config.write_text(yaml.safe_dump(configuration(_SHIPPED, cloud)))
    words = ["--config", str(config), "--port", str(port), "--state-dir", str(folder / "state")]
    command = [sys.executable, "-m", "proxy", "serve", *words, "--data-dir", str(paths.data)]
    with output.open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield Stage(process, f"http://127.0.0.1:{port}", paths, output)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def _cloud() -> Iterator[str]:
    """Run the simulator; give its origin."""
    words = [word for flag in _CLOUD.items() for word in flag]
    command = [sys.executable, "-m", "engines.simulator", "--model", "cloud", "--port", "0", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


async def until(condition: Callable[[], Awaitable[bool]], seconds: float, why: Callable[[], str] = str) -> None:
    """Return when a condition holds. Raises TimeoutError if it does not in so many seconds."""
    end = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not so within {seconds:.0f} s: {why()}")
        await asyncio.sleep(0.25)


def running(page: str) -> float:
    """Return the generations under way that an engine's metrics tell of."""
    names = r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? (\S+)$"
    return sum(float(value) for value in re.findall(names, page, re.MULTILINE))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
