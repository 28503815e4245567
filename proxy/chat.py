"""The story of one request: what it asks for, who answers it, and how the answer comes back."""

from collections.abc import Callable

import msgspec

from proxy import failures, forbidden, limits, providers, relay, wire
from proxy.admission import Admission
from proxy.balancer import Lease, Prompt
from proxy.deadline import Deadline
from proxy.errors import EngineStopped, NotReady, RequestError
from proxy.limits import Limits
from proxy.probe import LiveRegistry
from proxy.providers import Asked
from proxy.registry import Endpoint, Model
from proxy.relay import Exchange, Reply
from proxy.transport import Timeouts, Transport

Headers = list[tuple[bytes, bytes]]

_FORMS = frozenset(("/v1/audio/transcriptions", "/v1/audio/translations"))


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
        provider = providers.named(endpoint.provider)
        question = _question(request, envelope, form=form)
        sent = provider.request(question, endpoint)
        exchange.begin(endpoint.name, lease)
        answer = await self._transport_to(endpoint).send(
            request.method.encode(),
            sent.path,
            sent.headers if request.deadline is None else _with_deadline(sent.headers, request.deadline, endpoint),
            sent.body,
            _timeouts(model),
        )
        exchange.answered(answer)
        if answer.status >= 300:
            failures.check(answer, endpoint)
        answer = provider.answer(answer, question, endpoint)
        renamed = endpoint.base_path is not None or envelope.model != endpoint.serves
        name = envelope.model if renamed else None
        reply = await relay.reply(answer, exchange, name, hide_usage=sent.hide_usage)
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


def _question(request: Incoming, envelope: wire.Envelope, *, form: bool) -> Asked:
    return Asked(
        request.path, request.query, request.headers, request.body, envelope, request.request_id, form, request.salt
    )


def _with_deadline(headers: Headers, deadline: Deadline, endpoint: Endpoint) -> Headers:
    return [*headers, deadline.header()] if endpoint.pass_timeout else headers


def _timeouts(model: Model) -> Timeouts:
    t = model.timeouts
    return Timeouts(connect=t.connect, first_byte=t.first_byte, between_bytes=t.between_bytes)


def _our_headers(model: Model, endpoint: Endpoint) -> Headers:
    return [
        (b"x-polyvox-model", model.name.encode()),
        (b"x-polyvox-endpoint", endpoint.name.encode()),
    ]
