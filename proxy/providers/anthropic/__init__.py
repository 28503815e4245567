"""Anthropic's Messages API: /v1/messages as it is, and /v1/chat/completions translated both ways.

From the public reference of the API, version 2023-06-01, and the types of its SDK.
"""

import time
from collections.abc import Callable

import msgspec

from proxy import accounting, wire
from proxy.config import EndpointSettings
from proxy.errors import PathNotServed, WrongSetting
from proxy.providers import Asked, Outgoing
from proxy.providers.anthropic.document import completion, error
from proxy.providers.anthropic.request import Options, messages_request
from proxy.providers.anthropic.stream import Stream
from proxy.providers.headers import upstream_headers
from proxy.providers.translated import Document, Translated, Translation
from proxy.registry import Endpoint
from proxy.transport import Answer, Headers, content_type

_VERSION = "2023-06-01"
_CHAT = "/v1/chat/completions"
_NATIVE = ("/v1/messages", "/v1/messages/count_tokens")
_KEPT = (b"retry-after", b"x-should-retry")


class Anthropic:
    """See the module."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock

    def __repr__(self) -> str:
        return "<Anthropic>"

    def check(self, settings: EndpointSettings) -> None:
        try:
            msgspec.convert(settings.options, Options, strict=False)
        except msgspec.ValidationError as e:
            raise WrongSetting(("options",), f"{e}; known: {', '.join(Options.__struct_fields__)}") from None

    def request(self, asked: Asked, endpoint: Endpoint) -> Outgoing:
        headers = _headers(asked, endpoint)
        if asked.path in _NATIVE:
            query = b"?" + asked.query if asked.query else b""
            body = wire.set_model(asked.body, endpoint.serves)
            return Outgoing(_path(asked.path, endpoint) + query, headers, body)
        if asked.path != _CHAT:
            raise PathNotServed(asked.path, "anthropic", (_CHAT, *_NATIVE))
        options = msgspec.convert(endpoint.options, Options, strict=False)
        body = messages_request(asked.body, endpoint.serves, options)
        wanted = accounting.asks_usage(bytes(asked.envelope.fields.get("stream_options", b"")))
        return Outgoing(_path("/v1/messages", endpoint), headers, body, asked.envelope.stream and not wanted)

    def answer(self, answer: Answer, asked: Asked, endpoint: Endpoint) -> Answer:
        if asked.path != _CHAT:
            return answer
        kind, translation = self._translation(answer)
        kept = [header for header in answer.headers if header[0] in _KEPT]
        return Translated(answer, [(b"content-type", kind), *kept], translation)

    def _translation(self, answer: Answer) -> tuple[bytes, Translation]:
        created = int(self._clock())
        if answer.status >= 400:
            return b"application/json", Document(lambda body: error(body, answer.status))
        if content_type(answer.headers).lower().startswith(b"text/event-stream"):
            return b"text/event-stream; charset=utf-8", Stream(created)
        return b"application/json", Document(lambda body: completion(body, created))


def _headers(asked: Asked, endpoint: Endpoint) -> Headers:
    headers = upstream_headers(asked)
    if endpoint.api_key:
        headers.append((b"x-api-key", endpoint.api_key.reveal().encode()))
    if not any(name == b"anthropic-version" for name, _ in headers):
        headers.append((b"anthropic-version", (endpoint.api_version or _VERSION).encode()))
    return headers


def _path(native: str, endpoint: Endpoint) -> bytes:
    return ((endpoint.base_path or "").removesuffix("/v1") + native).encode()
