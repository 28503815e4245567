"""The composition root of a proxy worker: builds everything, and closes it in reverse order."""

import asyncio
from pathlib import Path
from typing import NamedTuple

from litestar.types import ASGIApp

from engines.spec import FleetStatus
from proxy import gauging, market, providers, registry
from proxy.admission import Admission
from proxy.api import Api, build_app
from proxy.balancer import Balancer, Board
from proxy.cache.bulletin import Bulletin
from proxy.cached import Cached
from proxy.caching import make_cached
from proxy.capabilities import Folder
from proxy.chat import Chat
from proxy.config import Config
from proxy.discovery import Discovery
from proxy.dispatch import Dispatcher
from proxy.endpoints import Endpoints
from proxy.ledger.books import Books, Place
from proxy.ledger.recorder import Both
from proxy.live import LiveRegistry, Sources, watch_findings, watch_fleet
from proxy.metrics import Metrics
from proxy.prices import Prices
from proxy.recovery import Recovery
from proxy.registry import Endpoint
from proxy.route import Ways
from proxy.telemetry import Sink
from proxy.transport import Transport
from proxy.transport.local import LocalTransport


class Places(NamedTuple):
    """Where a worker finds what it shares: the supervisor's socket, and the folders of ledger and findings."""

    control_socket: Path
    ledger: Path
    capabilities: Path


class Worker:
    """What one worker process holds."""

    def __init__(self, config: Config, places: Places, metrics: Metrics, board: Board, bulletin: Bulletin) -> None:
        providers.prepare(config)
        self._config = config
        self._metrics = metrics
        self._board = board
        self._balancer = make_balancer(config, board)
        self._supervisor = LocalTransport(f"unix:{places.control_socket}")
        self._found = Folder(places.capabilities)
        self._found_at = self._found.changed()
        parts = config, FleetStatus(version=0), self._found.read()
        self._live = LiveRegistry(registry.build(*parts))
        self._sources = Sources(self._live, *parts)
        self._prices = Prices(config, metrics.throughput)
        self._books = make_books(config, places.ledger, self._prices)
        self._endpoints = Endpoints(metrics)
        self._bulletin = bulletin
        self._recovery = Recovery(self._live, self._endpoints, self._transport_to)
        # All mutable state: the cache, a transport for each address in use, and the tasks that go on beside the
        # requests.
        self._cached: Cached | None = None
        self._transports: dict[str, Transport] = {}
        self._following: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<Worker {self._live!r} {len(self._transports)} transports>"

    def app(self) -> ASGIApp:
        """Return the ASGI application; it starts and stops with this worker."""
        server = self._config.server
        admission = make_admission(self._config, self._balancer, self._metrics)
        ways = Ways(self._live, self._endpoints, self._transport_to, server.start_wait, self._config.limits, admission)
        sink: Sink = Both(self._metrics, self._books.recorder) if self._books else self._metrics
        self._cached = make_cached(self._config, ways, self._bulletin, self._metrics, sink, self._prices)
        if self._cached:
            self._metrics.stores = self._cached.sums
        rate = self._metrics.tokens_per_second
        dispatcher = Dispatcher(self._endpoints, self._config.limits, self._prices, rate)
        chat = Chat(ways, dispatcher, self._cached)
        api = Api(chat, self._live, self._metrics, server, self._prices, self._books, self._cached)
        return build_app(api, on_startup=[self._start], on_shutdown=[self._stop])

    async def _start(self) -> None:
        if self._config.engines():
            self._following.append(asyncio.create_task(watch_fleet(self._sources, self._supervisor)))
        found = watch_findings(self._sources, self._found, self._found_at)
        self._following.append(asyncio.create_task(found))
        if self._board.is_first and any(m.probe and m.engine for m in self._config.models.values()):
            discovery = Discovery(self._live, self._transport_to, self._found)
            self._following.append(asyncio.create_task(discovery.run()))
        if names := self._board.mine():
            gauged = gauging.follow(names, self._live, self._transport_to, self._balancer)
            self._following.append(asyncio.create_task(gauged))

        if self._cached:
            self._following.append(asyncio.create_task(self._cached.run()))
        if self._books:
            self._following.append(asyncio.create_task(self._books.recorder.run()))
        if offers := market.offers(self._config):
            self._following.append(asyncio.create_task(self._learn_prices(offers)))

    async def _learn_prices(self, offers: list[market.Offer]) -> None:
        self._prices.learn(await market.ask(offers))

    async def _stop(self) -> None:
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        await self._recovery.close()
        if self._cached:
            await self._cached.close()
        if self._books:
            await self._books.close()
        for transport in (*self._transports.values(), self._supervisor):
            await transport.close()

    def _transport_to(self, endpoint: Endpoint) -> Transport:
        transport = self._transports.get(endpoint.address)
        if transport is None:
            transport = self._transports[endpoint.address] = make_transport(endpoint.address)
        return transport


def make_books(config: Config, folder: Path, prices: Prices) -> Books | None:
    """Return a worker's way to the ledger, None for a server that keeps none."""
    settings = config.ledger_settings()
    return Books(Place(settings, folder), prices.known) if settings else None


def make_board(config: Config, worker: int = 0, memory: int = -1) -> Board:
    """Return the part of a worker in the memory behind a descriptor, in which all see each other's load."""
    names = config.endpoint_names()
    learning = [name for name in names if len(names[name]) > 1 and config.models[name].balance == "predicted_ttft"]
    return Board(names, learning, config.server.workers, worker, memory)


def make_admission(config: Config, balancer: Balancer, sink: Sink) -> Admission:
    """Make what lets requests in, with the queue of each model."""
    return Admission(balancer, {name: model.queue for name, model in config.models.items()}, sink)


def make_balancer(config: Config, board: Board) -> Balancer:
    """Return the balancer of a configuration's endpoints."""
    return Balancer(config.endpoint_names(), {name: model.balance for name, model in config.models.items()}, board)


def make_transport(address: str) -> Transport:
    """Return a way to an address: `unix:/path` or `scheme://host:port`."""
    if address.startswith("https:"):
        # Imported here because most servers call no cloud, and it takes longer than the rest of the start.
        from proxy.transport.cloud import CloudTransport

        return CloudTransport(address)
    return LocalTransport(address)
