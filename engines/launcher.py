"""Brings together what one engine needs before it can start: environment, weights, a place, an address."""

import asyncio
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from engines import environment, memory, weights
from engines.devices import read_machine
from engines.logs import slug
from engines.memory import Footprint, Placement, Plan
from engines.paths import StatePaths
from engines.preparation import Report
from engines.simulator import simulator_command
from engines.spec import EngineSpec, Launch, command_line


class Launcher:
    """Prepares the engines of one server. base: the folder that relative paths of its configuration start from."""

    def __init__(self, paths: StatePaths, base: Path) -> None:
        self._paths = paths
        self._base = base
        # All mutable state: where each engine was placed, by its id, and what compiles each kind of environment.
        self._placements: dict[str, Placement] = {}
        self._warming: dict[environment.Kind, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"Launcher({self._placements!r})"

    def plan(self, specs: Sequence[EngineSpec]) -> Plan:
        """Place engines on this machine as it is now. Raises PlanRefused, or WeightsSourceError."""
        footprints = {spec.id: self._footprint(spec) for spec in specs}
        plan = memory.plan(specs, footprints, read_machine())
        self._placements |= plan.placements
        return plan

    def forget(self, engines: Iterable[str]) -> None:
        """Plan engines anew when they start next, since they have become others."""
        for engine in engines:
            self._placements.pop(engine, None)

    def preview(self, spec: EngineSpec) -> Launch:
        """Return how a planned engine would be started. Nothing is fetched or made."""
        source = self._source(spec)
        if source is None:
            return self._launch(spec, "", "", self._address(spec))
        interpreter = environment.location(environment.kind(spec.settings.devices), self._paths)
        return self._launch(spec, str(interpreter), weights.location(source, self._paths), self._address(spec))

    async def prepare(self, spec: EngineSpec, report: Report) -> Launch:
        """Get all that an engine needs and return how to start it. What it raises says what to do.

        1. Plan it, if it was not planned with the others. 2. Install vLLM and fetch the weights, side by side.
        3. Convert the weights; nobody waits for the compiling of what an engine imports, which goes on beside it.
        """
        if spec.id not in self._placements:  # 1
            await asyncio.to_thread(self.plan, [spec])
        source = self._source(spec)
        if source is None:
            return self._launch(spec, "", "", self._address(spec))
        kind = await asyncio.to_thread(environment.kind, spec.settings.devices)
        try:
            async with asyncio.TaskGroup() as together:  # 2
                installing = together.create_task(environment.ensure(kind, self._paths, report))
                together.create_task(weights.fetch(source, self._paths, lambda *_: None))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        interpreter = installing.result()
        if kind not in self._warming:
            self._warming[kind] = asyncio.create_task(environment.warm_up(kind, self._paths))
        folder = await weights.convert(source, interpreter, self._paths, report, spec.settings.env)  # 3
        return self._launch(spec, str(interpreter), folder, self._address(spec))

    def _launch(self, spec: EngineSpec, interpreter: str, folder: str, address: str) -> Launch:
        if spec.settings.simulator is not None:
            return Launch(simulator_command(spec, address), dict(spec.settings.env), address)
        placed = memory.placed(spec, self._placements[spec.id])
        argv = command_line(placed, interpreter, folder, address)
        return Launch(argv, {**self._ours(), **placed.settings.env}, address)

    def _ours(self) -> dict[str, str]:
        """Keep what vLLM writes beside our own data, its usage statistics off the network, and itself at home."""
        cache = self._paths.data / "cache"
        return {
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "VLLM_CONFIG_ROOT": str(cache / "vllm-config"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # an allowed host could redirect to one that is not
        }

    def _address(self, spec: EngineSpec) -> str:
        if spec.settings.listen == "unix":
            return f"unix:{self._paths.run / slug(spec.id)}.sock"
        return f"http://127.0.0.1:{_free_port()}"

    def _source(self, spec: EngineSpec) -> weights.Source | None:
        written = spec.settings.weights
        return None if written is None else weights.parse(written, self._base)

    def _footprint(self, spec: EngineSpec) -> Footprint:
        source = self._source(spec)
        return weights.footprint(source, self._paths, spec.settings.env) if source else Footprint()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
