"""What an endpoint is sent, and what it holds while it answers."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from engines.spec import EngineSettings, FleetStatus, Simulation
from proxy.app import make_admission, make_balancer
from proxy.balancer import Board
from proxy.chat import Chat, Incoming
from proxy.config import Config, EndpointSettings, ModelSettings
from proxy.deadline import HEADER, Deadline
from proxy.endpoints import Endpoints
from proxy.errors import DeadlinePassed
from proxy.limits import Limits
from proxy.live import LiveRegistry
from proxy.metrics import Metrics
from proxy.registry import build
from proxy.relay import Exchange
from proxy.route import Ways
from proxy.shared import slots_of

END = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'


class FakeTransport:
    """Remembers the bodies it is given, and answers with a stream of an end and usage."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[tuple[bytes, bytes]] = []

    async def send(
        self, method: bytes, path: bytes, headers: list[tuple[bytes, bytes]], body: bytes, timeouts: object
    ) -> "FakeAnswer":
        self.bodies.append(body)
        self.headers = headers
        return FakeAnswer()

    async def close(self) -> None:
        pass


class FakeAnswer:
    status = 200

    def __init__(self) -> None:
        self.headers = [(b"content-type", b"text/event-stream")]
        self._chunks = self._pieces()

    def __aiter__(self) -> "FakeAnswer":
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._chunks)

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield END
        yield USAGE

    async def close(self) -> None:
        pass


def asked(path: str, body: dict[str, object], *, stream_usage: bool = True) -> tuple[bytes, bytes]:
    """Return what the endpoint of a remote model was sent, and what its client gets."""
    transport, got = answered(path, body, EndpointSettings(base_url="http://x/v1", stream_usage=stream_usage))
    return transport.bodies[0], got


def answered(
    path: str, body: dict[str, object], endpoint: EndpointSettings, deadline: Deadline | None = None
) -> tuple[FakeTransport, bytes]:
    """Send a request through, and return the transport that it went by and what its client gets."""
    config = Config(models={"m": ModelSettings(endpoints=(endpoint,))})
    transport = FakeTransport()
    live = LiveRegistry(build(config, FleetStatus(version=0)))
    metrics = Metrics(config)
    admission = make_admission(config, make_balancer(config, Board(slots_of(config))), metrics)
    ways = Ways(live, Endpoints(metrics), lambda endpoint: transport, 1.0, Limits(), admission)  # type: ignore[arg-type, return-value]
    chat = Chat(ways)
    request = Incoming(path, b"", [], json.dumps(body).encode(), b"id", None, deadline)

    async def story() -> bytes:
        exchange = Exchange(metrics, "chat" if "chat" in path else "responses")
        reply = await chat.answer(request, exchange)
        assert reply.body
        passed = [reply.opening, *[reply.read(data) async for data in reply.body]]
        await exchange.close()
        return b"".join([*passed, reply.end()])

    return transport, asyncio.run(story())


def test_an_endpoint_is_asked_what_a_stream_used_and_the_client_does_not_see_it():
    sent, got = asked("/v1/chat/completions", {"model": "m", "stream": True})
    assert json.loads(sent)["stream_options"] == {"include_usage": True}
    assert got == END


@pytest.mark.parametrize(
    ("path", "body", "stream_usage"),
    [
        ("/v1/chat/completions", {"model": "m", "stream": True}, False),
        ("/v1/chat/completions", {"model": "m", "stream": True, "stream_options": {"include_usage": True}}, True),
        ("/v1/chat/completions", {"model": "m"}, True),
        ("/v1/responses", {"model": "m", "stream": True}, True),
    ],
)
def test_no_endpoint_is_asked_that_refuses_or_tells_by_itself(path, body, stream_usage):
    sent, got = asked(path, body, stream_usage=stream_usage)
    assert sent == json.dumps(body).encode()
    assert got == END + USAGE


@pytest.mark.parametrize("pass_timeout", [True, False])
def test_a_deadline_is_passed_on_to_those_who_know_it(pass_timeout):
    endpoint = EndpointSettings(base_url="http://x/v1", pass_timeout=pass_timeout)
    deadline = Deadline.of({HEADER: b"30"})
    transport, _ = answered("/v1/chat/completions", {"model": "m"}, endpoint, deadline)
    told = [float(value) for name, value in transport.headers if name == HEADER]
    assert len(told) == pass_timeout
    assert all(0 < seconds <= 30 for seconds in told)


def test_a_deadline_ends_the_wait_for_an_engine_that_starts():
    config = Config(models={"m": ModelSettings(engine=EngineSettings(simulator=Simulation()))})
    live = LiveRegistry(build(config, FleetStatus(version=0)))
    metrics = Metrics(config)
    admission = make_admission(config, make_balancer(config, Board(slots_of(config))), metrics)
    chat = Chat(Ways(live, Endpoints(metrics), FakeTransport, 60.0, Limits(), admission))  # type: ignore[arg-type]
    deadline = Deadline.of({HEADER: b"0.01"})
    request = Incoming("/v1/chat/completions", b"", [], b'{"model":"m"}', b"id", None, deadline)
    assert deadline
    with pytest.raises(DeadlinePassed):
        asyncio.run(deadline.bound(chat.answer(request, Exchange(metrics, "chat"))))
    assert "0 waiting" in repr(live)
