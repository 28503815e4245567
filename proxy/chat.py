"""The story of one request: what it asks for, who answers it, and how the answer comes back."""

import msgspec

from proxy import accounting, forbidden, limits, wire
from proxy.deadline import Deadline
from proxy.ensemble import Ensemble
from proxy.ensembles.settings import EnsembleSettings
from proxy.fallback import Walk
from proxy.providers import Asked
from proxy.relay import Exchange
from proxy.reply import Reply
from proxy.route import Ways
from proxy.transport import content_type

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

    def __init__(self, ways: Ways) -> None:
        self._ways = ways

    def __repr__(self) -> str:
        return f"<Chat {self._ways.endpoints!r}>"

    async def answer(self, request: Incoming, exchange: Exchange) -> Reply:
        """Answer one request. Whatever is taken for it is given back when the exchange is closed.

        1. Read the few fields that decide where it goes.
        2. Find the model behind the name, refuse what it may not be asked. Behind an ensemble's there are several.
        3. Walk from endpoint to endpoint until one answers, under the name that was asked for.
        """
        kind = content_type(request.headers) if request.path in _FORMS else b""
        form = kind.lower().startswith(b"multipart/form-data")
        envelope = wire.read_form(request.body, kind) if form else wire.read_json(request.body)
        registry = self._ways.live.current
        behind = registry.ensembles.get(envelope.model) or registry.resolve(envelope.model)
        limits.check(request.path, b"" if form else request.body, envelope.fields, self._ways.limits)
        exchange.alias = envelope.model
        asked = _asked(request, envelope, form=form)
        if envelope.stream and (options := envelope.fields.get("stream_options")):
            asked, exchange.shows_cost = _without_cost(asked, bytes(options))
        if isinstance(behind, EnsembleSettings):
            exchange.model = envelope.model
            return await Ensemble(self._ways, behind, asked, exchange, request.deadline).answer()
        forbidden.check(envelope.fields, behind.policy, self._ways.limits)
        exchange.model = behind.name
        chain = registry.chains.get(envelope.model, ())
        return await Walk(self._ways, asked, behind, chain, exchange, request.deadline).answer()


def _asked(request: Incoming, envelope: wire.Envelope, *, form: bool) -> Asked:
    return Asked(
        request.path, request.query, request.headers, request.body, envelope, request.request_id, form, request.salt
    )


def _without_cost(asked: Asked, stream_options: bytes) -> tuple[Asked, bool]:
    """Take the wish for the cost of a stream out of a request; say whether it is one."""
    taken = accounting.take_cost(stream_options)
    if taken is None:
        return asked, False
    options, wish = msgspec.Raw(taken[0]), taken[1]
    fields = {**asked.envelope.fields, "stream_options": options}
    envelope = msgspec.structs.replace(asked.envelope, fields=fields)
    body = wire.replace_field(asked.body, "stream_options", options)
    return msgspec.structs.replace(asked, body=body, envelope=envelope), wish
