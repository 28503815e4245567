"""The composition root of a proxy worker: builds everything, and closes it in reverse order."""

import asyncio
from pathlib import Path

from litestar.types import ASGIApp

from engines.spec import FleetStatus
from proxy import providers, registry
from proxy.api import Api, build_app
from proxy.chat import Chat
from proxy.config import Config
from proxy.endpoints import Endpoints
from proxy.metrics import Metrics
from proxy.probe import LiveRegistry, watch_fleet
from proxy.recovery import Recovery
from proxy.registry import Endpoint
from proxy.transport import Transport
from proxy.transport.local import LocalTransport


class Worker:
    """What one worker process holds."""

    def __init__(self, config: Config, control_socket: Path, metrics: Metrics) -> None:
        providers.prepare(config)
        self._config = config
        self._metrics = metrics
        self._supervisor = LocalTransport(f"unix:{control_socket}")
        self._live = LiveRegistry(registry.build(config, FleetStatus(version=0)))
        self._endpoints = Endpoints(metrics)
        self._recovery = Recovery(self._live, self._endpoints, self._transport_to)
        # All mutable state: a transport for each address in use, and the task that follows the supervisor.
        self._transports: dict[str, Transport] = {}
        self._watching: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Worker {self._live!r} {len(self._transports)} transports>"

    def app(self) -> ASGIApp:
        """Return the ASGI application; it starts and stops with this worker."""
        server = self._config.server
        chat = Chat(self._live, self._transport_to, server.start_wait, self._config.limits, self._endpoints)
        api = Api(chat, self._live, self._metrics, server)
        return build_app(api, on_startup=[self._start], on_shutdown=[self._stop])

    async def _start(self) -> None:
        if self._config.engines():
            self._watching = asyncio.create_task(watch_fleet(self._live, self._config, self._supervisor))

    async def _stop(self) -> None:
        if self._watching:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._recovery.close()
        for transport in (*self._transports.values(), self._supervisor):
            await transport.close()

    def _transport_to(self, endpoint: Endpoint) -> Transport:
        transport = self._transports.get(endpoint.address)
        if transport is None:
            transport = self._transports[endpoint.address] = _make_transport(endpoint.address)
        return transport


def _make_transport(address: str) -> Transport:
    if address.startswith("https:"):
        # Imported here because most servers call no cloud, and it takes longer than the rest of the start.
        from proxy.transport.cloud import CloudTransport

        return CloudTransport(address)
    return LocalTransport(address)
