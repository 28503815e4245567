"""Every server with OpenAI's API: OpenAI, Ollama, LM Studio, Hugging Face's router, vLLM elsewhere, our own engines.

A request keeps its bytes but for the model's name, a wish for usage and, for an engine of ours, the salt. An answer
is not touched.
"""

import hashlib

import msgspec

from proxy import accounting, wire
from proxy.config import EndpointSettings
from proxy.errors import PathNotServed, WrongSetting
from proxy.providers import Asked, Outgoing
from proxy.providers.headers import authorization, upstream_headers
from proxy.registry import Endpoint
from proxy.transport import Answer, Headers, content_type

# The paths of vLLM whose requests take a cache_salt.
_SALTED = frozenset(
    ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/rerank",
     "/v2/rerank", "/rerank", "/v1/score", "/score", "/classify", "/pooling")
)  # fmt: skip
_TELLS_USAGE = frozenset(("/v1/chat/completions", "/v1/completions"))
# OpenAI's own; the others are vLLM's, and of those who have taken them over.
_EVERYWHERE = frozenset(
    ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/audio/transcriptions",
     "/v1/audio/translations")
)  # fmt: skip


class OpenAI:
    """See the module."""

    def __repr__(self) -> str:
        return "<OpenAI>"

    def check(self, settings: EndpointSettings) -> None:
        if settings.api_version is not None:
            raise WrongSetting(("api_version",), "provider openai takes none; it is for azure and anthropic")
        if settings.options:
            raise WrongSetting(("options",), "provider openai takes none")

    def request(self, asked: Asked, endpoint: Endpoint) -> Outgoing:
        headers = upstream_headers(asked) + authorization(endpoint)
        path = endpoint.path(asked.path).encode()
        return outgoing(asked, endpoint, path + b"?" + asked.query if asked.query else path, headers)

    def answer(self, answer: Answer, asked: Asked, endpoint: Endpoint) -> Answer:
        if answer.status == 404 and endpoint.base_path is not None and asked.path not in _EVERYWHERE:
            raise PathNotServed(
                asked.path, "openai: only vLLM and servers like it have this path, and this one has not"
            )
        return answer


def outgoing(asked: Asked, endpoint: Endpoint, path: bytes, headers: Headers) -> Outgoing:
    """Return the request with the body that a server with OpenAI's API is to get."""
    body = asked.body
    envelope = asked.envelope
    if envelope.model != endpoint.serves:
        body = _named(body, asked, endpoint.serves)
    if asked.salt and endpoint.base_path is None and asked.path in _SALTED:
        body = _salted(body, asked.salt, envelope.fields.get("cache_salt"))
    if envelope.stream and endpoint.stream_usage and asked.path in _TELLS_USAGE:
        asking = accounting.ask_usage(body, bytes(envelope.fields.get("stream_options", b"")))
        if asking is not None:
            return Outgoing(path, headers, asking, True)
    return Outgoing(path, headers, body)


def _named(body: bytes, asked: Asked, name: str) -> bytes:
    return wire.set_form_model(body, content_type(asked.headers), name) if asked.form else wire.set_model(body, name)


def _salted(body: bytes, ours: str, theirs: msgspec.Raw | None) -> bytes:
    """A client may divide its own part of the cache among its users, and reach nobody else's."""
    if theirs is None:
        return wire.add_field(body, "cache_salt", ours)
    return wire.replace_field(body, "cache_salt", f"{ours}.{hashlib.sha256(bytes(theirs)).hexdigest()}")
