"""The story of one request: what it asks for, who answers it, and how the answer comes back."""

from collections.abc import Callable

import msgspec

from proxy import accounting, balancer, relay, wire
from proxy.balancer import Load
from proxy.errors import EngineStopped, NotReady
from proxy.probe import LiveRegistry
from proxy.registry import Endpoint, Model
from proxy.relay import Exchange, Reply
from proxy.transport import Timeouts, Transport

Headers = list[tuple[bytes, bytes]]

# What reaches an upstream of what a client sent. Everything else, its key above all, stays here.
_PASSED = frozenset(
    (b"accept", b"anthropic-beta", b"anthropic-version", b"content-type", b"traceparent", b"tracestate")
)


class Incoming(msgspec.Struct, frozen=True):
    """A request as it reached us, its body whole."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    request_id: bytes


class Chat:
    """Answers requests for models."""

    def __init__(self, live: LiveRegistry, transport_to: Callable[[Endpoint], Transport], start_wait: float) -> None:
        self._live = live
        self._transport_to = transport_to
        self._start_wait = start_wait
        # All mutable state: the load of every endpoint ever used, by its name.
        self._loads: dict[str, Load] = {}

    def __repr__(self) -> str:
        return f"<Chat {self._loads!r}>"

    async def answer(self, request: Incoming, exchange: Exchange) -> Reply:
        """Answer one request. Whatever is taken for it is given back when the exchange is closed.

        1. Read the few fields that decide where it goes.
        2. Find the model behind the name; wait for it while its engine starts.
        3. Pick an endpoint, take a lease, send.
        4. Give back the answer, under the name that was asked for.
        """
        form = relay.content_type(request.headers).startswith(b"multipart/form-data")
        envelope = wire.read_form(request.body, _content_type(request)) if form else wire.read_json(request.body)
        model = await self._ready(self._live.current.resolve(envelope.model), exchange)
        endpoints = model.ready()
        loads = [self._load(e) for e in endpoints]
        chosen = balancer.least_loaded(loads)
        endpoint = endpoints[chosen]
        body = _upstream_body(request, envelope.model, endpoint, form=form)
        asking = _asking_for_usage(body, envelope, exchange.operation) if endpoint.stream_usage else None
        headers = _upstream_headers(request, endpoint)
        exchange.begin(endpoint.name, loads[chosen].lease())
        answer = await self._transport_to(endpoint).send(
            request.method.encode(),
            endpoint.path(request.path).encode() + (b"?" + request.query if request.query else b""),
            headers,
            body if asking is None else asking,
            _timeouts(model),
        )
        exchange.answered(answer)
        renamed = endpoint.base_path is not None or envelope.model != endpoint.serves
        name = envelope.model if renamed else None
        reply = await relay.reply(answer, exchange, name, hide_usage=asking is not None)
        reply.headers = [*reply.headers, *_our_headers(model, endpoint)]
        return reply

    async def _ready(self, model: Model, exchange: Exchange) -> Model:
        """Return the model once it takes requests. Raises NotReady when that takes too long, or never comes."""
        name = exchange.model = model.name
        if not model.ready():
            await self._live.until(
                lambda registry: name not in registry.models or _settled(registry.models[name]),
                self._start_wait,
            )
            exchange.waited()
            model = self._live.current.resolve(name)
        if model.ready():
            return model
        if model.state == "starting":
            raise NotReady(name, model.state, model.detail)
        # Why it failed is for whoever runs the server (`polyvox engines list`): a log's tail may hold paths.
        raise EngineStopped(name, model.state)

    def _load(self, endpoint: Endpoint) -> Load:
        load = self._loads.get(endpoint.name)
        if load is None:
            load = self._loads[endpoint.name] = Load()
        return load


def _settled(model: Model) -> bool:
    return bool(model.ready()) or model.state in ("stopped", "failed")


def _content_type(request: Incoming) -> bytes:
    return next((value for name, value in request.headers if name == b"content-type"), b"")


def _upstream_headers(request: Incoming, endpoint: Endpoint) -> Headers:
    headers = [(name, value) for name, value in request.headers if name in _PASSED]
    headers.append((b"x-request-id", request.request_id))
    if endpoint.api_key:
        headers.append((b"authorization", b"Bearer " + endpoint.api_key.reveal().encode()))
    return headers


def _upstream_body(request: Incoming, asked: str, endpoint: Endpoint, *, form: bool) -> bytes:
    if asked == endpoint.serves:
        return request.body
    if form:
        return wire.set_form_model(request.body, _content_type(request), endpoint.serves)
    return wire.set_model(request.body, endpoint.serves)


def _asking_for_usage(body: bytes, envelope: wire.Envelope, operation: str) -> bytes | None:
    """Return the body with a wish for usage, None where there is no need: no stream, or one that tells by itself."""
    if not envelope.stream or operation not in ("chat", "text_completion"):
        return None
    return accounting.ask_usage(body, envelope.stream_options)


def _timeouts(model: Model) -> Timeouts:
    t = model.timeouts
    return Timeouts(connect=t.connect, first_byte=t.first_byte, between_bytes=t.between_bytes)


def _our_headers(model: Model, endpoint: Endpoint) -> Headers:
    return [
        (b"x-polyvox-model", model.name.encode()),
        (b"x-polyvox-endpoint", endpoint.name.encode()),
    ]
