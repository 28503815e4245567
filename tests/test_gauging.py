"""Engines are asked how they are, and what they say decides who gets the next request."""

import asyncio
from collections.abc import Callable

import pytest

from engines.spec import FleetStatus
from proxy import gauging
from proxy.app import make_balancer
from proxy.balancer import Balancer, Board
from proxy.config import Config, EndpointSettings, ModelSettings, Secret
from proxy.errors import ConnectFailed
from proxy.live import LiveRegistry
from proxy.registry import Endpoint, build
from proxy.shared import slots_of

CONFIG = Config(
    models={
        "m": ModelSettings(
            endpoints=tuple(EndpointSettings(base_url=f"http://{i}/v1", api_key=Secret("sk-secret")) for i in (0, 1))
        )
    }
)


class Page:
    """An answer with a page of metrics."""

    def __init__(self, status: int, text: str) -> None:
        self.status, self._text = status, text
        self.closed = False

    async def read(self, limit: int) -> bytes:
        return self._text.encode()

    async def close(self) -> None:
        self.closed = True


class Engine:
    """A transport to an engine that gives the same page each time, or does not answer."""

    def __init__(self, page: Page | None) -> None:
        self._page = page
        self.asked: list[tuple[bytes, bytes, list[tuple[bytes, bytes]]]] = []
        self.twice = asyncio.Event()

    async def send(self, method: bytes, path: bytes, headers: list[tuple[bytes, bytes]], *rest: object) -> Page:
        self.asked.append((method, path, headers))
        if len(self.asked) == 2:
            self.twice.set()
        if self._page is None:
            raise ConnectFailed
        return self._page

    async def close(self) -> None:
        pass


def watched(page: Callable[[], Page | None]) -> tuple[Balancer, LiveRegistry, list[Engine]]:
    """Follow two engines, the first with a page and the second idle, until each was asked."""
    balancer, live = make_balancer(CONFIG, Board(slots_of(CONFIG))), LiveRegistry(build(CONFIG, FleetStatus(version=0)))

    async def story() -> list[Engine]:
        engines = [Engine(page()), Engine(Page(200, "vllm:num_requests_running 0.0\n"))]

        def transport_to(endpoint: Endpoint) -> Engine:
            return engines[int(endpoint.name[-1])]

        names = {"m": ["m/0", "m/1"]}
        task = asyncio.create_task(
            gauging.follow(names, live, transport_to, balancer, pause=0.0)  # type: ignore[arg-type, return-value]
        )
        await asyncio.wait_for(engines[1].twice.wait(), 10)
        task.cancel()
        await asyncio.wait((task,))
        return engines

    return balancer, live, asyncio.run(story())


def test_an_engine_that_others_keep_busy_gets_nothing():
    balancer, live, engines = watched(lambda: Page(200, "vllm:num_requests_running 500.0\n"))
    candidates = live.current.models["m"].ready()
    prompt = balancer.prompt("m", {"messages": b"x" * 1000})
    assert balancer.pick("m", candidates, prompt, 1.0)[0].name == "m/1"
    assert engines[0].asked[0] == (b"GET", b"/metrics", [(b"authorization", b"Bearer sk-secret")])


@pytest.mark.parametrize("page", [lambda: None, lambda: Page(404, "not here"), lambda: Page(200, "something else")])
def test_a_server_without_gauges_is_asked_rarely_and_used_as_before(page):
    balancer, live, engines = watched(page)
    assert len(engines[0].asked) == 1
    candidates = live.current.models["m"].ready()
    used = set()
    for i in range(40):
        used.add(balancer.pick("m", candidates, balancer.prompt("m", {"messages": b"%04d" % i * 250}), 1.0)[0].name)
    assert used == {"m/0", "m/1"}
