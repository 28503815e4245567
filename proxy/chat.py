"""The story of one request: what it asks for, who answers it, and how the answer comes back."""

import hashlib
from collections.abc import Callable

import msgspec

from proxy import accounting, failures, forbidden, limits, relay, wire
from proxy.admission import Admission
from proxy.balancer import Lease, Prompt
from proxy.deadline import Deadline
from proxy.errors import EngineStopped, NotReady, RequestError
from proxy.limits import Limits
from proxy.probe import LiveRegistry
from proxy.registry import Endpoint, Model
from proxy.relay import Exchange, Reply
from proxy.transport import Timeouts, Transport

Headers = list[tuple[bytes, bytes]]

# What reaches an upstream of what a client sent. Everything else, its key above all, stays here.
_PASSED = frozenset(
    (b"accept", b"anthropic-beta", b"anthropic-version", b"content-type", b"traceparent", b"tracestate")
)

_FORMS = frozenset(("/v1/audio/transcriptions", "/v1/audio/translations"))
# The paths of vLLM whose requests take a cache_salt.
_SALTED = frozenset(
    ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/rerank",
     "/v2/rerank", "/rerank", "/v1/score", "/score", "/classify", "/pooling")
)  # fmt: skip


class Incoming(msgspec.Struct, frozen=True):
    """A request as it reached us, its body whole. salt: see auth.Caller. deadline: when its client will be gone."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    request_id: bytes
    salt: str | None = None
    deadline: Deadline | None = None


class Chat:
    """Answers requests for models."""

    def __init__(
        self,
        live: LiveRegistry,
        transport_to: Callable[[Endpoint], Transport],
        start_wait: float,
        most: Limits,
        admission: Admission,
    ) -> None:
        self._live = live
        self._transport_to = transport_to
        self._start_wait = start_wait
        self._limits = most
        self._admission = admission

    def __repr__(self) -> str:
        return f"<Chat {self._admission!r}>"

    async def answer(self, request: Incoming, exchange: Exchange) -> Reply:
        """Answer one request. Whatever is taken for it is given back when the exchange is closed.

        1. Read the few fields that decide where it goes.
        2. Find the model behind the name, refuse what it may not be asked; wait while its engine starts.
        3. Pick an endpoint, take a lease, both perhaps after a wait, send.
        4. Give back the answer, under the name that was asked for.
        """
        form = request.path in _FORMS and relay.content_type(request.headers).startswith(b"multipart/form-data")
        envelope = wire.read_form(request.body, _content_type(request)) if form else wire.read_json(request.body)
        asked = self._live.current.resolve(envelope.model)
        limits.check(request.path, b"" if form else request.body, envelope.fields, self._limits)
        forbidden.check(envelope.fields, asked.policy, self._limits)
        model = await self._ready(asked, exchange)
        prompt = self._admission.prompt(model.name, envelope.fields, request.salt) if len(model.endpoints) > 1 else None
        picked = self._admission.pick(model.name, model.ready(), prompt, envelope.stream)
        endpoint, lease = picked or await self._wait(model.name, prompt, envelope, exchange)
        exchange.hold(lease)
        body = _upstream_body(request, envelope, endpoint, form=form)
        asking = _asking_for_usage(body, envelope, exchange.operation) if endpoint.stream_usage else None
        headers = _upstream_headers(request, endpoint)
        exchange.begin(endpoint.name, lease)
        answer = await self._transport_to(endpoint).send(
            request.method.encode(),
            endpoint.path(request.path).encode() + (b"?" + request.query if request.query else b""),
            headers,
            body if asking is None else asking,
            _timeouts(model),
        )
        exchange.answered(answer)
        if answer.status >= 300:
            failures.check(answer, endpoint)
        renamed = endpoint.base_path is not None or envelope.model != endpoint.serves
        name = envelope.model if renamed else None
        reply = await relay.reply(answer, exchange, name, hide_usage=asking is not None)
        if reply.status >= 400:
            failures.mask(reply, endpoint)
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
        raise _unavailable(model)

    async def _wait(
        self, name: str, prompt: Prompt | None, envelope: wire.Envelope, exchange: Exchange
    ) -> tuple[Endpoint, Lease]:
        """Return an endpoint and a lease on it once there is room. Raises TooBusy where that takes too long."""
        picked = await self._admission.wait(name, lambda: self._candidates(name), prompt, envelope.stream)
        exchange.waited()
        return picked

    def _candidates(self, name: str) -> tuple[Endpoint, ...]:
        """Return the endpoints that take requests now. Raises NotReady or EngineStopped where none does."""
        model = self._live.current.resolve(name)
        if not model.ready():
            raise _unavailable(model)
        return model.ready()


def _unavailable(model: Model) -> RequestError:
    if model.state == "starting":
        return NotReady(model.name, model.state, model.detail)
    # Why it failed is for whoever runs the server (`polyvox engines list`): a log's tail may hold paths.
    return EngineStopped(model.name, model.state)


def _settled(model: Model) -> bool:
    return bool(model.ready()) or model.state in ("stopped", "failed")


def _content_type(request: Incoming) -> bytes:
    return next((value for name, value in request.headers if name == b"content-type"), b"")


def _upstream_headers(request: Incoming, endpoint: Endpoint) -> Headers:
    headers = [(name, value) for name, value in request.headers if name in _PASSED]
    headers.append((b"x-request-id", request.request_id))
    if request.deadline is not None and endpoint.pass_timeout:
        headers.append(request.deadline.header())
    if endpoint.api_key:
        headers.append((b"authorization", b"Bearer " + endpoint.api_key.reveal().encode()))
    return headers


def _upstream_body(request: Incoming, envelope: wire.Envelope, endpoint: Endpoint, *, form: bool) -> bytes:
    body = request.body
    if envelope.model != endpoint.serves and form:
        body = wire.set_form_model(body, _content_type(request), endpoint.serves)
    elif envelope.model != endpoint.serves:
        body = wire.set_model(body, endpoint.serves)
    if request.salt and endpoint.base_path is None and request.path in _SALTED:
        body = _salted(body, request.salt, envelope.fields.get("cache_salt"))
    return body


def _salted(body: bytes, ours: str, theirs: msgspec.Raw | None) -> bytes:
    """A client may divide its own part of the cache among its users, and reach nobody else's."""
    if theirs is None:
        return wire.add_field(body, "cache_salt", ours)
    return wire.replace_field(body, "cache_salt", f"{ours}.{hashlib.sha256(bytes(theirs)).hexdigest()}")


def _asking_for_usage(body: bytes, envelope: wire.Envelope, operation: str) -> bytes | None:
    """Return the body with a wish for usage, None where there is no need: no stream, or one that tells by itself."""
    if not envelope.stream or operation not in ("chat", "text_completion"):
        return None
    return accounting.ask_usage(body, bytes(envelope.fields.get("stream_options", b"")))


def _timeouts(model: Model) -> Timeouts:
    t = model.timeouts
    return Timeouts(connect=t.connect, first_byte=t.first_byte, between_bytes=t.between_bytes)


def _our_headers(model: Model, endpoint: Endpoint) -> Headers:
    return [
        (b"x-polyvox-model", model.name.encode()),
        (b"x-polyvox-endpoint", endpoint.name.encode()),
    ]
