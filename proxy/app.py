"""The composition root of a proxy worker: builds everything, and closes it in reverse order."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from litestar.types import ASGIApp

from engines.spec import FleetStatus
from proxy import gauging, market, providers, registry
from proxy.admission import Admission
from proxy.api import Api, build_app
from proxy.balancer import Balancer, Board
from proxy.chat import Chat
from proxy.config import Config
from proxy.endpoints import Endpoints
from proxy.ledger.books import Books, Place
from proxy.metrics import Metrics
from proxy.prices import Prices
from proxy.probe import LiveRegistry, watch_fleet
from proxy.recovery import Recovery
from proxy.registry import Endpoint
from proxy.route import Ways
from proxy.shared import Slot, Slots
from proxy.telemetry import Sink
from proxy.transport import Transport
from proxy.transport.local import LocalTransport


class Worker:
    """What one worker process holds."""

    def __init__(self, config: Config, control_socket: Path, metrics: Metrics, board: Board, ledger: Path) -> None:
        """ledger: the folder of a server that keeps one."""
        providers.prepare(config)
        self._config = config
        self._metrics = metrics
        self._board = board
        self._balancer = make_balancer(config, board)
        self._supervisor = LocalTransport(f"unix:{control_socket}")
        self._live = LiveRegistry(registry.build(config, FleetStatus(version=0)))
        self._prices = Prices(config, metrics.throughput)
        self._books = make_books(config, ledger, self._prices)
        self._endpoints = Endpoints(metrics)
        self._recovery = Recovery(self._live, self._endpoints, self._transport_to)
        # All mutable state: a transport for each address in use, and the tasks that go on beside the requests.
        self._transports: dict[str, Transport] = {}
        self._following: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<Worker {self._live!r} {len(self._transports)} transports>"

    def app(self) -> ASGIApp:
        """Return the ASGI application; it starts and stops with this worker."""
        server = self._config.server
        admission = make_admission(self._config, self._balancer, self._metrics)
        ways = Ways(self._live, self._endpoints, self._transport_to, server.start_wait, self._config.limits, admission)
        api = Api(Chat(ways), self._live, self._metrics, server, self._prices, self._books)
        return build_app(api, on_startup=[self._start], on_shutdown=[self._stop])

    async def _start(self) -> None:
        if self._config.engines():
            watching = watch_fleet(self._live, self._config, self._supervisor)
            self._following.append(asyncio.create_task(watching))
        if names := self._board.mine():
            gauged = gauging.follow(names, self._live, self._transport_to, self._balancer)
            self._following.append(asyncio.create_task(gauged))

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
        if self._books:
            await self._books.close()
        for transport in (*self._transports.values(), self._supervisor):
            await transport.close()

    def _transport_to(self, endpoint: Endpoint) -> Transport:
        transport = self._transports.get(endpoint.address)
        if transport is None:
            transport = self._transports[endpoint.address] = _make_transport(endpoint.address)
        return transport


def make_books(config: Config, folder: Path, prices: Prices) -> Books | None:
    """Return a worker's way to the ledger, None for a server that keeps none."""
    settings = config.ledger_settings()
    return Books(Place(settings, folder), prices.known) if settings else None


def slots_of(config: Config, given: Sequence[Slot] = ()) -> Slots:
    """Return what has room in shared memory: what was given some before, and the models of a configuration."""
    names = config.endpoint_names()
    learning = [name for name in names if len(names[name]) > 1 and config.models[name].balance == "predicted_ttft"]
    return Slots.of(names, learning, given)


def make_board(config: Config, worker: int = 0, memory: int = -1, given: Sequence[Slot] = ()) -> Board:
    """Return the part of a worker in the memory behind a descriptor, in which all see each other's load."""
    return Board(slots_of(config, given), config.server.workers, worker, memory)


def make_admission(config: Config, balancer: Balancer, sink: Sink) -> Admission:
    """Make what lets requests in, with the queue of each model."""
    return Admission(balancer, {name: model.queue for name, model in config.models.items()}, sink)


def make_balancer(config: Config, board: Board) -> Balancer:
    """Return the balancer of a configuration's endpoints."""
    return Balancer(config.endpoint_names(), {name: model.balance for name, model in config.models.items()}, board)


def _make_transport(address: str) -> Transport:
    if address.startswith("https:"):
        # Imported here because most servers call no cloud, and it takes longer than the rest of the start.
        from proxy.transport.cloud import CloudTransport

        return CloudTransport(address)
    return LocalTransport(address)
