"""One frozen event for each fact about a request, and the sink that takes them. Every backend is an adapter.

All values that become labels are from fixed sets: nothing that a client writes is among them.
"""

import asyncio
import re
from typing import Protocol

import msgspec

from proxy.errors import RequestError, UpstreamError

CACHE_RESULTS = ("hit", "miss", "bypass", "joined")
UNKNOWN = "unknown"  # the model of a request that named none of ours

# What a request asks for, by its path. The first names are those of OpenTelemetry's gen_ai.operation.name.
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "count_tokens",
    "/v1/audio/transcriptions": "transcription",
    "/v1/audio/translations": "translation",
    "/v1/rerank": "rerank",
    "/v2/rerank": "rerank",
    "/rerank": "rerank",
    "/v1/score": "score",
    "/score": "score",
    "/classify": "classify",
    "/pooling": "pooling",
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
}
OTHER = "other"

# What the event of the first token has, and none before it. The others begin with their first token.
FIRST_TOKEN = {
    "chat": b'"choices"',
    "text_completion": b'"choices"',
    "responses": b'.delta"',
    "messages": b"content_block_delta",
}

# What every event has that is part of an answer: comments and pings, which keep a connection open, have it not.
TELLS = {
    "chat": b'"choices"',
    "text_completion": b'"choices"',
    "responses": b'"response.',
    "messages": b"content_block",
}


class RequestStarted(msgspec.Struct, frozen=True, gc=False):
    """A request was sent to an endpoint."""

    model: str
    endpoint: str


class RequestQueued(msgspec.Struct, frozen=True, gc=False):
    """A request waits, because every endpoint of its model has as many as it may have; or it does no longer."""

    model: str
    waits: bool


class AttemptFailed(msgspec.Struct, frozen=True, gc=False):
    """A request that was sent to an endpoint is over there, and may go on elsewhere. error: one of ERROR_TYPES."""

    model: str
    endpoint: str
    error: str


class BreakerChanged(msgspec.Struct, frozen=True, gc=False):
    """The breaker of an endpoint is in another state. until: when it may be tried again, by the monotonic clock."""

    model: str
    endpoint: str
    state: str
    until: float


class RequestFinished(msgspec.Struct, frozen=True, gc=False):
    """A request is over.

    model: a configured one, or UNKNOWN. endpoint: the one it was sent to, "" for none. status: 0 where the client had
    gone before there was one. error: one of ERROR_TYPES, or None. finish_reason: one of accounting.FINISH_REASONS;
    "abort" if the client did not stay to the end. Times are in seconds from the request being here; None where there
    was nothing to time. per_token: for each token after the first. overhead: what we took ourselves. under_way: it was
    at the endpoint until now. level: how many models of the chain were passed over. resumed: how often a stream went on
    elsewhere. usd: what it cost, None if that is not known. attempts: how often it was sent. alias: the name that it
    asked for, one of ours as well. key_id: see auth.Caller. cache: what the cache did, one of CACHE_RESULTS, "" without
    one; saved: what the answer would have cost without it, in USD. No label is made of request_id, which a client may
    choose.
    """

    model: str
    endpoint: str
    operation: str
    status: int
    error: str | None
    finish_reason: str
    seconds: float
    to_first_token: float | None
    per_token: float | None
    overhead: float | None
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    under_way: bool = True
    level: int = 0
    resumed: int = 0
    usd: float | None = None
    attempts: int = 0
    alias: str = ""
    key_id: str = ""
    request_id: bytes = b""
    cache: str = ""
    saved: float | None = None


class Sink(Protocol):
    """Takes events. Called on the request path: it must not wait, and must not raise."""

    def started(self, event: RequestStarted) -> None: ...

    def failed(self, event: AttemptFailed) -> None: ...

    def queued(self, event: RequestQueued) -> None: ...

    def finished(self, event: RequestFinished) -> None: ...

    def changed(self, event: BreakerChanged) -> None: ...


def _type_name(kind: type[BaseException]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


def _all_below(kind: type[BaseException]) -> list[type[BaseException]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _all_below(child))]


_NAMES = {kind: _type_name(kind) for root in (RequestError, UpstreamError) for kind in _all_below(root)}
_INTERNAL = "internal_error"
ERROR_TYPES = tuple(
    sorted({*_NAMES.values(), _INTERNAL, "upstream_4xx", "upstream_error_event"}),
)


def error_type(error: BaseException) -> str | None:
    """Return the name of an error, one of ERROR_TYPES; None for the end of a request that nobody waits for."""
    if isinstance(error, asyncio.CancelledError):
        return None
    return next((_NAMES[kind] for kind in type(error).__mro__ if kind in _NAMES), _INTERNAL)
