"""A proxy of ours in this process, before scripted upstreams on real sockets."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import uvicorn

from engines.spec import FleetStatus
from proxy import inbound, registry
from proxy.api import Api, build_app
from proxy.app import make_admission, make_balancer
from proxy.balancer import Board
from proxy.cache.bulletin import Bulletin
from proxy.caching import make_cached
from proxy.chat import Chat
from proxy.config import Config
from proxy.embedding import Means
from proxy.endpoints import Endpoints
from proxy.live import LiveRegistry
from proxy.metrics import Metrics
from proxy.prices import Prices
from proxy.recovery import Recovery
from proxy.registry import Endpoint
from proxy.route import Ways
from proxy.routing.dispatch import Dispatcher
from proxy.routing.placing import Placing
from proxy.shared import slots_of
from proxy.transport.local import LocalTransport
from tests.scraping import Page

CLOSE = b"connection: close"
EVENTS = b"content-type: text/event-stream"
JSON = b"content-type: application/json"


class Proxy:
    """A running proxy: a client of it, and what it knows."""

    def __init__(self, config: Config) -> None:
        self.metrics = Metrics(config)
        self.endpoints = Endpoints(self.metrics, chance=lambda: 0.5)
        self.live = LiveRegistry(registry.build(config, FleetStatus(version=0)))
        self.transports: dict[str, LocalTransport] = {}
        self.recovery = Recovery(self.live, self.endpoints, self.transport_to, interval=0.01)
        self.models = tuple(config.models)
        self.balancer = make_balancer(config, Board(slots_of(config)))
        admission = make_admission(config, self.balancer, self.metrics)
        server = config.server
        ways = Ways(self.live, self.endpoints, self.transport_to, server.start_wait, config.limits, admission)
        bulletin = Bulletin()
        prices = Prices(config, self.metrics.throughput)
        dispatcher = Dispatcher(self.endpoints, config.limits, prices, self.metrics.tokens_per_second)
        means = Means(ways, Placing(dispatcher, config.limits), prices)
        self.cached = make_cached(config, lambda: means, bulletin, self.metrics, self.metrics)
        self.metrics.stores = self.cached.sums if self.cached else None
        chat = Chat(ways, dispatcher, self.cached)
        api = Api(chat, self.live, self.metrics, config.server, prices)
        self.app = build_app(api, [], [])
        self.client = httpx2.AsyncClient()
        self.port = 0

    def transport_to(self, endpoint: Endpoint) -> LocalTransport:
        if endpoint.address not in self.transports:
            self.transports[endpoint.address] = LocalTransport(endpoint.address)
        return self.transports[endpoint.address]

    def page(self) -> Page:
        return Page.of(self.metrics.page("")[1].decode())

    def running(self) -> float:
        return self.page().value("polyvox_num_requests_running")

    def in_flight(self) -> float:
        return sum(load.in_flight for model in self.models for load in self.balancer.loads(model))

    def state(self, endpoint: str) -> str:
        return self.endpoints._standings[endpoint].breaker.state.value

    async def ask(self, model: str = "m", *, stream: bool = False, **fields: object) -> httpx2.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields}
        return await self.client.post("/v1/chat/completions", json=body)


class _Server(uvicorn.Server):
    """uvicorn without its waits: it looks each 0.1 s whether it is to end, and gives all connections 0.1 s for it."""

    def __init__(self, settings: uvicorn.Config) -> None:
        super().__init__(settings)
        self.ending = asyncio.Event()

    def install_signal_handlers(self) -> None:
        pass

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.ending.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listening in self.servers:
            listening.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                while self.server_state.connections or self.server_state.tasks:
                    await asyncio.sleep(0.001)
        for task in self.server_state.tasks:
            task.cancel()


@asynccontextmanager
async def proxying(config: Config) -> AsyncIterator[Proxy]:
    """Serve a configuration on a free port of the loopback."""
    proxy = Proxy(config)
    settings = uvicorn.Config(
        proxy.app, interface="asgi3", port=0, http=inbound.protocol(config.server), ws="none", lifespan="off",
        log_level="error", access_log=False, proxy_headers=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = _Server(settings)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    proxy.port = server.servers[0].sockets[0].getsockname()[1]
    proxy.client = httpx2.AsyncClient(base_url=f"http://127.0.0.1:{proxy.port}", timeout=60, trust_env=False)
    looking = asyncio.create_task(proxy.cached.run()) if proxy.cached else None
    try:
        yield proxy
    finally:
        if looking:
            looking.cancel()
        await proxy.client.aclose()
        await proxy.recovery.close()
        if proxy.cached:
            await proxy.cached.close()
        server.ending.set()
        await serving
        for transport in proxy.transports.values():
            await transport.close()


def event(**delta: object) -> bytes:
    """An event of a chat, as vLLM makes them; `finish` ends it."""
    finish = delta.pop("finish", None)
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
ROLE = event(role="assistant", content="")


def events(*texts: str) -> list[bytes]:
    """All events of a chat that says these pieces."""
    return [ROLE, *(event(content=text) for text in texts), event(finish="stop"), DONE]


def document(text: str) -> bytes:
    """A chat that says something, at once."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    return json.dumps(
        {"id": "chatcmpl-1", "model": "m", "choices": [choice], "usage": usage}, ensure_ascii=False
    ).encode()


def text_of(stream: str) -> str:
    """What the events of a stream say, joined; fail where it is not one stream from its role to its end."""
    data = [line.removeprefix("data: ") for line in stream.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]", stream
    chunks = [json.loads(d) for d in data[:-1]]
    choices = [c for chunk in chunks for c in chunk["choices"]]
    assert [c["delta"]["role"] for c in choices if c["delta"].get("role")] == ["assistant"], stream
    assert len([c for c in choices if c["finish_reason"]]) == 1, stream
    assert len({chunk["id"] for chunk in chunks}) == 1, stream
    return "".join(c["delta"].get("content") or "" for c in choices)
