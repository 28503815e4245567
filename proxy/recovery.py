"""Health checks of the endpoints whose breaker is open, so that one that comes back is asked again at once."""

import asyncio
import contextlib
from collections.abc import Callable

from proxy.breaker import Breaker, State
from proxy.endpoints import Endpoints
from proxy.errors import UpstreamError
from proxy.live import LiveRegistry
from proxy.registry import Endpoint
from proxy.transport import Timeouts, Transport

INTERVAL = 1.0  # seconds between two checks; with the time that one may take, well below five
_TIMEOUTS = Timeouts(connect=1.0, first_byte=2.0, between_bytes=1.0)


class Recovery:
    """Checks each open endpoint, in a task of its own, until it is no longer open. Costs nothing while none is."""

    def __init__(
        self,
        live: LiveRegistry,
        endpoints: Endpoints,
        transport_to: Callable[[Endpoint], Transport],
        interval: float = INTERVAL,
    ) -> None:
        self._live = live
        self._endpoints = endpoints
        self._transport_to = transport_to
        self._interval = interval
        # All mutable state: the tasks that check, by the names of their endpoints.
        self._tasks: dict[str, asyncio.Task[None]] = {}
        endpoints.on_open(self._begin)

    def __repr__(self) -> str:
        return f"<Recovery of {sorted(self._tasks)}>"

    async def close(self) -> None:
        """Stop checking."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, endpoint: Endpoint, breaker: Breaker) -> None:
        if endpoint.name not in self._tasks:
            task = self._tasks[endpoint.name] = asyncio.get_running_loop().create_task(self._check(endpoint, breaker))
            task.add_done_callback(lambda _: self._tasks.pop(endpoint.name, None))

    async def _check(self, endpoint: Endpoint, breaker: Breaker) -> None:
        """Check an endpoint until its breaker is closed; while a trial is under way, that tells more."""
        while breaker.state is not State.CLOSED:
            await asyncio.sleep(self._interval * (0.5 + self._endpoints.chance()))
            now = self._live.current.ready_endpoint(endpoint.model, endpoint.name)
            if now is not None and breaker.state is State.OPEN and await self._is_healthy(now):
                breaker.recovered(self._endpoints.clock())

    async def _is_healthy(self, endpoint: Endpoint) -> bool:
        """Ask for health, and a server of others for its models: there, all but a 5xx shows that it is alive.

        It is sent no key, which it does not need to refuse us.
        """
        ours = endpoint.base_path is None
        path = "/health" if ours else f"{endpoint.base_path}/models"
        transport = self._transport_to(endpoint)
        with contextlib.suppress(UpstreamError):
            answer = await transport.send(b"GET", path.encode(), [], b"", _TIMEOUTS)
            status = answer.status
            await answer.close()
            return status == 200 if ours else status < 500
        return False
