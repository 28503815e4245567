"""Keeps the Registry true: hears from the supervisor what its engines are and how they are."""

import asyncio
from collections.abc import Callable

import msgspec

from engines.spec import FleetStatus
from proxy.errors import UpstreamError
from proxy.registry import Registry
from proxy.transport import Timeouts, Transport

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


async def watch_fleet(heard: Callable[[FleetStatus], None], supervisor: Transport) -> None:
    """Tell of each report of the supervisor, for ever. While it does not answer, the last report stands."""
    while True:
        try:
            answer = await supervisor.send(b"GET", b"/fleet/watch", [], b"", _TIMEOUTS)
            try:
                await _follow(answer, heard)
            finally:
                await answer.close()
        except (UpstreamError, msgspec.DecodeError):
            pass
        await asyncio.sleep(_RECONNECT_DELAY)


async def _follow(answer: object, heard: Callable[[FleetStatus], None]) -> None:
    rest = b""
    async for data in answer:  # type: ignore[attr-defined]
        *lines, rest = (rest + data).split(b"\n")
        if lines:  # only the newest matters
            heard(msgspec.json.decode(lines[-1], type=FleetStatus))
