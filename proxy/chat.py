"""The story of one request: what it asks for, who answers it, and how the answer comes back."""

from collections.abc import Awaitable
from functools import partial
from typing import Any

import msgspec

from proxy import accounting, limits, wire
from proxy.cache import key, wish
from proxy.cache.replies import Client
from proxy.cached import Cached
from proxy.deadline import Deadline
from proxy.ensemble import FanOut
from proxy.errors import BadRequest
from proxy.fallback import Walk
from proxy.providers import Asked
from proxy.registry import Ensemble, Preset
from proxy.relay import Exchange
from proxy.reply import Reply
from proxy.route import Ways
from proxy.routing import explanation, presets, wishes
from proxy.routing.dispatch import Dispatcher, Inquiry
from proxy.routing.placing import Placed, Placing
from proxy.transport import content_type

Headers = list[tuple[bytes, bytes]]

_FORMS = frozenset(("/v1/audio/transcriptions", "/v1/audio/translations"))
TELLING = wishes.NAMES | wish.NAMES | key.HEADERS  # headers from which the cache or the routing learn something
# By what a request has that is only to be explained: the path that it would be sent to.
_TALKS = {"messages": "/v1/chat/completions", "input": "/v1/responses", "prompt": "/v1/completions"}


class Incoming(msgspec.Struct, frozen=True):
    """A request as it reached us, its body whole.

    salt, models: see auth.Caller. deadline: when its client will be gone. ordinary: it has none of TELLING, as most.
    """

    path: str
    query: bytes
    headers: Headers
    body: bytes
    request_id: bytes
    salt: str | None = None
    deadline: Deadline | None = None
    models: frozenset[str] | None = None
    client: Client | None = None
    ordinary: bool = False


class Chat:
    """Answers requests for models."""

    def __init__(self, ways: Ways, dispatcher: Dispatcher | None = None, cached: Cached | None = None) -> None:
        """cached: of a server that keeps answers."""
        self._ways = ways
        self._dispatcher = dispatcher or Dispatcher(ways.endpoints, ways.limits)
        self._placing = Placing(self._dispatcher, ways.limits)
        self.cached = cached

    def __repr__(self) -> str:
        return f"<Chat {self._ways.endpoints!r}>"

    async def answer(self, request: Incoming, exchange: Exchange) -> Reply:
        """Answer one request. Whatever is taken for it is given back when the exchange is closed.

        1. Read the few fields that decide where it goes.
        2. Find its place: the model, and who answers instead. An ensemble does so, and 4, for each of its members.
        3. Give an answer that is kept, or that others wait for.
        4. Walk from endpoint to endpoint until one answers, under the name that was asked for.
        """
        kind = content_type(request.headers) if request.path in _FORMS else b""
        form = kind.lower().startswith(b"multipart/form-data")
        envelope = wire.read_form(request.body, kind) if form else wire.read_json(request.body)
        registry = self._ways.live.current
        target = registry.resolve(envelope.model, request.models)
        plain = limits.check(request.path, b"" if form else request.body, envelope.fields, self._ways.limits)
        exchange.alias = envelope.model
        asked = _asked(request, envelope, plain, form=form)
        if isinstance(target, Ensemble):
            return await self._together(target, asked.without(wish.FIELD), request, exchange)
        placed = self._placing.place(registry, envelope.model, target, asked, request.models)
        exchange.model, exchange.on_prompt = placed.model.name, placed.learn
        reply = await self._reply(placed, request, exchange)
        if placed.why is not None:
            reply.headers += ((b"x-polyvox-route", placed.why),)
        return reply

    def _reply(self, placed: Placed, request: Incoming, exchange: Exchange) -> Awaitable[Reply]:
        """Answer from the cache, or as the cache is told to; without one, as if it had not been spoken of."""
        asked, model, chain = _without_cost(placed.asked, exchange), placed.model, placed.chain
        field = None if asked.form else asked.envelope.fields.get(wish.FIELD)
        if field is not None:
            asked = asked.without(wish.FIELD)
        if self.cached is None:
            return Walk(self._ways, asked, model, chain, exchange, request.deadline, chosen=placed.chosen).answer()
        walk = partial(Walk, self._ways, asked, model, chain, exchange, chosen=placed.chosen)
        said = wish.NONE if request.ordinary and field is None else wish.read(request.headers, field)
        return self.cached.answer(asked, model, chain, exchange, walk, said, request.deadline, request.client)

    async def _together(self, target: Ensemble, asked: Asked, request: Incoming, exchange: Exchange) -> Reply:
        """Answer a request with several models."""
        exchange.model = target.name
        asked = _without_cost(asked, exchange)
        return await FanOut(self._ways, target.settings, asked, exchange, self._place, request.deadline).answer()

    def _place(self, name: str, asked: Asked) -> Placed:
        """Find the place of a request that an ensemble makes. Raises RequestError."""
        return self._placing.called(self._ways.live.current, name, asked)

    def explain(self, request: Incoming) -> dict[str, Any]:
        """Return how a request would be routed, which is not sent. `model` is auto where it is left out."""
        envelope = wire.read_json(request.body, model="auto")
        path = next((path for field, path in _TALKS.items() if field in envelope.fields), None)
        if path is None:
            raise BadRequest(f"give one of {', '.join(_TALKS)}, as in a request for an answer.", param="messages")
        registry = self._ways.live.current
        target = registry.resolve(envelope.model, request.models)
        limits.check(path, request.body, envelope.fields, self._ways.limits)
        if isinstance(target, Preset):
            fields = presets.applied(target, path, dict(envelope.fields))
            envelope, target = msgspec.structs.replace(envelope, fields=fields), target.of
        if isinstance(target, Ensemble):
            raise BadRequest(
                f"model: {target.name!r} is an ensemble, which asks all its members: "
                f"{', '.join(target.settings.members)}.",
                param="model",
            )
        inquiry = Inquiry(path, envelope.fields, request.headers, envelope.model, request.models)
        routed = self._dispatcher.consider(registry, target, inquiry)
        return explanation.full(routed.plan, routed.models, envelope.model)


def _asked(request: Incoming, envelope: wire.Envelope, plain: msgspec.Raw | None, *, form: bool) -> Asked:
    r = request
    return Asked(r.path, r.query, r.headers, r.body, envelope, r.request_id, form, r.salt, plain, r.ordinary)


def _without_cost(asked: Asked, exchange: Exchange) -> Asked:
    """Take the wish for the cost of a stream out of a request, and have the exchange know of it."""
    options = asked.envelope.fields.get("stream_options") if asked.envelope.stream else None
    taken = accounting.take_cost(bytes(options)) if options else None
    if taken is None:
        return asked
    exchange.shows_cost = taken[1]
    return asked.with_fields({**asked.envelope.fields, "stream_options": msgspec.Raw(taken[0])})
