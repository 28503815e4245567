"""Keeps the Registry true: hears from the supervisor how its engines are, and what is found out of models."""

import asyncio
from collections.abc import Callable

import msgspec

from engines.spec import FleetStatus
from proxy import registry
from proxy.capabilities import Findings, Folder
from proxy.config import Config
from proxy.errors import UpstreamError
from proxy.registry import Registry
from proxy.transport import Answer, Timeouts, Transport

_RECONNECT_DELAY = 0.1
_TIMEOUTS = Timeouts(connect=1.0, first_byte=5.0, between_bytes=None)


class LiveRegistry:
    """The one reference to the current Registry, and a way to wait for a better one."""

    def __init__(self, current: Registry) -> None:
        # All mutable state: the registry, and the futures of those who wait for the next one.
        self.current = current
        self._waiting: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        return f"<LiveRegistry {len(self.current.models)} models, {len(self._waiting)} waiting>"

    def replace(self, new: Registry) -> None:
        """Put a new registry in the place of the current one and wake everybody who waits."""
        self.current = new
        waiting, self._waiting = self._waiting, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def until(self, true_of: Callable[[Registry], bool], timeout: float) -> bool:
        """Wait until something is true of the registry, `timeout` seconds at most; say whether it is."""
        try:
            async with asyncio.timeout(timeout):
                while not true_of(self.current):
                    await self._next()
        except TimeoutError:
            return true_of(self.current)
        return True

    async def _next(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)


class Sources:
    """What the registry is made of. Each part that is new makes a new one."""

    def __init__(self, live: LiveRegistry, config: Config, fleet: FleetStatus, findings: Findings) -> None:
        # All mutable state: the newest of each part.
        self._live = live
        self._config = config
        self._fleet = fleet
        self._findings = findings

    def __repr__(self) -> str:
        return f"<Sources of {self._live!r}: fleet {self._fleet.version}, {len(self._findings)} findings>"

    def follow(self, config: Config) -> None:
        """There is another configuration."""
        self._config = config
        self._build()

    def heard(self, fleet: FleetStatus) -> None:
        """The supervisor told of its engines."""
        self._fleet = fleet
        self._build()

    def found(self, findings: Findings) -> None:
        """Something was found out of models."""
        self._findings = findings
        self._build()

    def _build(self) -> None:
        self._live.replace(registry.build(self._config, self._fleet, self._findings))


async def watch_fleet(sources: Sources, supervisor: Transport) -> None:
    """Follow the supervisor's reports for ever. While it does not answer, the last report stands."""
    while True:
        try:
            answer = await supervisor.send(b"GET", b"/fleet/watch", [], b"", _TIMEOUTS)
            try:
                await _follow(answer, sources)
            finally:
                await answer.close()
        except (UpstreamError, msgspec.DecodeError):
            pass
        await asyncio.sleep(_RECONNECT_DELAY)


async def _follow(answer: Answer, sources: Sources) -> None:
    rest = b""
    async for data in answer:
        *lines, rest = (rest + data).split(b"\n")
        if lines:  # only the newest matters
            sources.heard(msgspec.json.decode(lines[-1], type=FleetStatus))


async def watch_findings(sources: Sources, folder: Folder, seen: int, pause: float = 1.0) -> None:
    """Look for new findings for ever: of this server's workers, and of `polyvox probe`. seen: of those known so far."""
    while True:
        await asyncio.sleep(pause)
        if (now := folder.changed()) != seen:
            seen = now
            sources.found(folder.read())
