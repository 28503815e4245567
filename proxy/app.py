"""The composition root of a proxy worker: builds everything, and closes it in reverse order."""

import asyncio
import importlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from litestar.types import ASGIApp

from engines.spec import FleetStatus
from proxy import caching, gauging, market, providers, registry
from proxy.admin import Admin
from proxy.admission import Admission
from proxy.api import Api, build_app
from proxy.balancer import Balancer, Board
from proxy.cache.bulletin import Bulletin
from proxy.cached import Cached
from proxy.caching import make_cached
from proxy.capabilities import Folder
from proxy.chat import Chat
from proxy.config import Balance, Config, Queue
from proxy.cost import Price, Tariff
from proxy.discovery import Discovery
from proxy.endpoints import Endpoints
from proxy.ledger.books import Books, Place
from proxy.ledger.recorder import Both
from proxy.live import LiveRegistry, Sources, watch_findings, watch_fleet
from proxy.metrics import Metrics
from proxy.prices import Prices
from proxy.recovery import Recovery
from proxy.registry import Endpoint
from proxy.route import Ways
from proxy.routing.dispatch import Dispatcher
from proxy.routing.placing import Placing
from proxy.shared import Slots
from proxy.telemetry import Sink
from proxy.transport import Transport
from proxy.transport.local import LocalTransport

if TYPE_CHECKING:
    from proxy.embedding import Means

_CLOSING = 1.0  # seconds between two looks whether something that is used no more can be closed


class Places(NamedTuple):
    """Where a worker finds what it shares: the supervisor's socket, and the folders of ledger and findings."""

    control_socket: Path
    ledger: Path
    capabilities: Path


class Worker:
    """What one worker process holds."""

    def __init__(self, config: Config, places: Places, metrics: Metrics, board: Board, bulletin: Bulletin) -> None:
        providers.prepare(config)
        self._metrics = metrics
        self._board = board
        self._bulletin = bulletin
        self._balancer = make_balancer(config, board)
        self._admission = make_admission(config, self._balancer, metrics)
        self._supervisor = LocalTransport(f"unix:{places.control_socket}")
        self._found = Folder(places.capabilities)
        self._found_at = self._found.changed()
        parts = config, FleetStatus(version=0), self._found.read()
        self._live = LiveRegistry(registry.build(*parts))
        self._sources = Sources(self._live, *parts)
        self._books = make_books(config, places.ledger, lambda: self._prices.known())
        self._endpoints = Endpoints(metrics)
        self._recovery = Recovery(self._live, self._endpoints, self._transport_to)
        # All mutable state: the configuration and what was learned of prices beside it; what answers; the cache, and
        # those before it that still have something under way; a transport for each address in use, and the tasks that
        # go on beside the requests, by what they do.
        self._config = config
        self._tariffs: dict[market.Offer, Tariff | None] = {}
        self._prices = Prices(config, metrics.throughput)
        speed = metrics.tokens_per_second
        self._dispatcher = Dispatcher(self._endpoints, config.limits, self._prices, speed)
        self._sink: Sink = Both(metrics, self._books.recorder) if self._books else metrics
        self._retired: list[Cached] = []
        self._cached = self._make_cache()
        metrics.stores = self._cached.sums if self._cached else None
        admin = Admin(self._supervisor)
        self._api = Api(self._chat(), self._live, metrics, config.server, self._prices, self._books, admin)
        self._transports: dict[str, Transport] = {}
        self._beside: dict[str, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"<Worker {self._live!r} {len(self._transports)} transports>"

    def app(self) -> ASGIApp:
        """Return the ASGI application; it starts and stops with this worker."""
        return build_app(self._api, on_startup=[self._start], on_shutdown=[self._stop])

    async def follow(self, config: Config, slots: Slots) -> None:
        """Go by another configuration from now on. Requests that are under way go on with what they began with.

        What is known of endpoints that stay (load, breakers, counts) stays. Whatever here may take long, or fail, comes
        first; the rest happens between two turns of the event loop.
        """
        await asyncio.to_thread(_prepare, config)
        before, self._config = self._config, config
        self._metrics.follow(config, slots)
        self._board.follow(slots)
        self._balancer.follow(config.endpoint_names(), policies_of(config))
        self._admission.follow(queues_of(config))
        self._prices = Prices(config, self._metrics.throughput)
        self._dispatcher.follow(config.limits, self._prices)
        self._sources.follow(config)
        self._endpoints.keep([name for names in config.endpoint_names().values() for name in names])
        if config.cache != before.cache:
            self._begin_anew()
        self._api.follow(self._chat(), config.server, self._prices)
        self._look_around()

    def _make_cache(self) -> Cached | None:
        return make_cached(self._config, self._means, self._bulletin, self._metrics, self._sink)

    def _begin_anew(self) -> None:
        """Keep answers as the configuration says now. What others wait for in the cache before ends there."""
        if self._cached:
            self._cached.sums()  # what it has counted is told
            self._retired.append(self._cached)
        self._bulletin.carry()
        self._cached = self._make_cache()
        self._metrics.stores = self._cached.sums if self._cached else None
        self._go_on("caching", self._cached.run() if self._cached else asyncio.sleep(0))

    def _chat(self) -> Chat:
        return Chat(self._ways(), self._dispatcher, self._cached)

    def _ways(self) -> Ways:
        start_wait, limits = self._config.server.start_wait, self._config.limits
        return Ways(self._live, self._endpoints, self._transport_to, start_wait, limits, self._admission)

    def _means(self) -> "Means":
        from proxy.embedding import Means  # it imports numpy

        ways = self._ways()
        return Means(ways, Placing(self._dispatcher, ways.limits), self._prices)

    async def _start(self) -> None:
        self._go_on("finding", watch_findings(self._sources, self._found, self._found_at))
        if self._books:
            self._go_on("recording", self._books.recorder.run())
        if self._cached:
            self._go_on("caching", self._cached.run())
        self._look_around()

    def _look_around(self) -> None:
        """Follow the engines, the gauges and the prices of what the configuration names."""
        if self._config.engines() and "watching" not in self._beside:
            self._go_on("watching", watch_fleet(self._sources, self._supervisor))
        asks = self._board.is_first and any(m.probe and m.engine for m in self._config.models.values())
        if asks and "discovering" not in self._beside:
            self._go_on("discovering", Discovery(self._live, self._transport_to, self._found).run())
        self._go_on("gauging", gauging.follow(self._board.mine(), self._live, self._transport_to, self._balancer))
        self._go_on("pricing", self._learn_prices(self._prices, market.offers(self._config)))
        self._go_on("closing", self._close_unused())
        self._go_on("retiring", self._close_retired())

    def _go_on(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside the requests, in the place of what had this name before."""
        if name in self._beside:
            self._beside[name].cancel()
        self._beside[name] = asyncio.create_task(work)

    async def _learn_prices(self, prices: Prices, offers: list[market.Offer]) -> None:
        """Look up what is asked for, and keep it for the next configuration."""
        prices.learn({o.endpoint: tariff for o in offers if (tariff := self._tariffs.get(o))})
        new = [o for o in offers if o not in self._tariffs]
        learned = await market.ask(new)
        prices.learn(learned)
        self._tariffs |= {o: learned.get(o.endpoint) for o in new}

    async def _close_unused(self) -> None:
        """Close the transports to addresses that no endpoint has any more, when nothing is under way there."""
        while unused := self._transports.keys() - self._live.current.addresses():
            for address in unused:
                if self._transports[address].is_idle:
                    await self._transports.pop(address).close()
            await asyncio.sleep(_CLOSING)

    async def _close_retired(self) -> None:
        """Close the caches that another took the place of, when nobody waits for anything there."""
        while self._retired:
            for cached in [cached for cached in self._retired if cached.is_idle]:
                await cached.close()
                self._retired.remove(cached)
            await asyncio.sleep(_CLOSING)

    async def _stop(self) -> None:
        for task in self._beside.values():
            task.cancel()
        await asyncio.gather(*self._beside.values(), return_exceptions=True)
        await self._recovery.close()
        for cached in (self._cached, *self._retired):
            if cached:
                await cached.close()
        if self._books:
            await self._books.close()
        for transport in (*self._transports.values(), self._supervisor):
            await transport.close()

    def _transport_to(self, endpoint: Endpoint) -> Transport:
        transport = self._transports.get(endpoint.address)
        if transport is None:
            transport = self._transports[endpoint.address] = make_transport(endpoint.address)
        return transport


def _prepare(config: Config) -> None:
    """Import what requests will need, so that none has to wait for it."""
    providers.prepare(config)
    caching.prepare(config)
    if any(e.base_url.startswith("https:") for model in config.models.values() for e in model.endpoints):
        importlib.import_module("proxy.transport.cloud")


def make_books(config: Config, folder: Path, prices: Callable[[], list[Price]]) -> Books | None:
    """Return a worker's way to the ledger, None for a server that keeps none."""
    settings = config.ledger_settings()
    return Books(Place(settings, folder), prices) if settings else None


def make_admission(config: Config, balancer: Balancer, sink: Sink) -> Admission:
    """Make what lets requests in, with the queue of each model."""
    return Admission(balancer, queues_of(config), sink)


def queues_of(config: Config) -> dict[str, Queue]:
    """Return the queue of each model."""
    return {name: model.queue for name, model in config.models.items()}


def make_balancer(config: Config, board: Board) -> Balancer:
    """Return the balancer of a configuration's endpoints."""
    return Balancer(config.endpoint_names(), policies_of(config), board)


def policies_of(config: Config) -> dict[str, Balance]:
    """Return how the endpoints of each model are chosen."""
    return {name: model.balance for name, model in config.models.items()}


def make_transport(address: str) -> Transport:
    """Return a way to an address: `unix:/path` or `scheme://host:port`."""
    if address.startswith("https:"):
        # Imported here because most servers call no cloud, and it takes longer than the rest of the start.
        from proxy.transport.cloud import CloudTransport

        return CloudTransport(address)
    return LocalTransport(address)
