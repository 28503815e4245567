"""Vectors of texts, for the semantic cache: from a model of ours, or from a server elsewhere."""

import random
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple
from urllib.parse import urlsplit

from proxy import wire
from proxy.cache import vectors
from proxy.cache.settings import Embeddings
from proxy.cache.vectors import Vector
from proxy.errors import BadGateway
from proxy.fallback import Walk
from proxy.prices import Prices
from proxy.providers import Asked
from proxy.providers.headers import authorization
from proxy.registry import Endpoint
from proxy.relay import Exchange
from proxy.route import Ways
from proxy.routing.placing import Placing
from proxy.telemetry import Sink
from proxy.transport import Headers, Timeouts, Transport

_PATH = "/v1/embeddings"
_JSON: Headers = [(b"content-type", b"application/json")]
_LONGEST = 1024 * 1024  # bytes of an answer


class Means(NamedTuple):
    """What a request for a vector is made with."""

    ways: Ways
    placing: Placing
    prices: Prices | None


class OfModel:
    """Has a model of ours make vectors, as a client would: each is in the metrics, and in the ledger."""

    def __init__(self, name: str, means: Callable[[], Means], sink: Sink) -> None:
        """name: of a model or alias. means: returns the newest."""
        self._name = name
        self._means = means
        self._sink = sink

    def __repr__(self) -> str:
        return f"<OfModel {self._name}>"

    async def __call__(self, text: str, key_id: str) -> Vector | None:
        """Return the vector of a text, for the account of a key. Raises what Walk.answer does."""
        ways, placing, prices = self._means()
        body = wire.encode({"model": self._name, "input": text})
        request_id = b"%032x" % random.getrandbits(128)
        asked = Asked(_PATH, b"", _JSON, body, wire.read_json(body), request_id)
        placed = placing.called(ways.live.current, self._name, asked)
        exchange = Exchange(self._sink, "embeddings", monotonic, prices, request_id)
        exchange.model, exchange.alias, exchange.key_id = placed.model.name, self._name, key_id
        try:  # without the chain: vectors of two models are not to be compared
            reply = await Walk(ways, placed.asked, placed.model, (), exchange).answer()
            exchange.complete()
        finally:
            await exchange.close()
        return vectors.read(reply.document) if reply.status == 200 else None


class Elsewhere:
    """Asks any server with /v1/embeddings."""

    def __init__(self, name: str, settings: Embeddings, transport_to: Callable[[Endpoint], Transport]) -> None:
        """name: of the alias that it is for."""
        parts = urlsplit(settings.url)
        self._transport_to = transport_to
        self._model = settings.model
        self._endpoint = Endpoint(
            name=f"{name}/embeddings",
            model=settings.model,
            address=f"{parts.scheme}://{parts.netloc}",
            serves=settings.model,
            base_path=parts.path.rstrip("/"),
            api_key=settings.api_key,
        )

    def __repr__(self) -> str:
        return f"<Elsewhere {self._endpoint.name}>"

    async def __call__(self, text: str, key_id: str) -> Vector | None:
        """Return the vector of a text. Raises UpstreamError, BadGateway."""
        endpoint = self._endpoint
        headers = _JSON + authorization(endpoint)
        body = wire.encode({"model": self._model, "input": text})
        path = endpoint.path(_PATH).encode()
        answer = await self._transport_to(endpoint).send(b"POST", path, headers, body, Timeouts())
        try:
            document = await answer.read(_LONGEST)
        finally:
            await answer.close()
        if answer.status != 200:
            raise BadGateway(f"embeddings are refused with status {answer.status}")
        return vectors.read(document)
