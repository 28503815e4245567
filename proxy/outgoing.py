"""A request as a client sent it, and as one endpoint gets it. Pure."""

import hashlib

import msgspec

from proxy import accounting, wire
from proxy.registry import Endpoint
from proxy.wire import Envelope

Headers = list[tuple[bytes, bytes]]

# What reaches an upstream of what a client sent. Everything else, its key above all, stays here.
_PASSED = frozenset(
    (b"accept", b"anthropic-beta", b"anthropic-version", b"content-type", b"traceparent", b"tracestate")
)

# The paths of vLLM whose requests take a cache_salt.
_SALTED = frozenset(
    ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/rerank",
     "/v2/rerank", "/rerank", "/v1/score", "/score", "/classify", "/pooling")
)  # fmt: skip


class Incoming(msgspec.Struct, frozen=True):
    """A request as it reached us, its body whole. salt: see auth.Caller."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    request_id: bytes
    salt: str | None = None


class Asked(msgspec.Struct, frozen=True, gc=False):
    """A request, what was read of it, and what it asks for. form: its body is multipart/form-data."""

    request: Incoming
    envelope: Envelope
    operation: str
    form: bool


class Outgoing(msgspec.Struct, frozen=True, gc=False):
    """A request ready for one endpoint.

    rename: the `model` that its answer must have, None to leave it. hides_usage: only we ask what a stream used.
    """

    method: bytes
    path: bytes
    headers: Headers
    body: bytes
    rename: str | None
    hides_usage: bool


def outgoing(asked: Asked, endpoint: Endpoint) -> Outgoing:
    """Return what an endpoint is sent."""
    request, envelope = asked.request, asked.envelope
    body = _body(asked, endpoint)
    asking = _asking_for_usage(body, asked) if endpoint.stream_usage else None
    renamed = endpoint.base_path is not None or envelope.model != endpoint.serves
    return Outgoing(
        request.method.encode(),
        endpoint.path(request.path).encode() + (b"?" + request.query if request.query else b""),
        _headers(request, endpoint),
        body if asking is None else asking,
        envelope.model if renamed else None,
        asking is not None,
    )


def content_type(request: Incoming) -> bytes:
    """Return the value of Content-Type as it was sent, or b""."""
    return next((value for name, value in request.headers if name == b"content-type"), b"")


def _headers(request: Incoming, endpoint: Endpoint) -> Headers:
    headers = [(name, value) for name, value in request.headers if name in _PASSED]
    headers.append((b"x-request-id", request.request_id))
    headers.extend(credentials(endpoint))
    return headers


def credentials(endpoint: Endpoint) -> Headers:
    """Return the headers with which an endpoint knows us."""
    return [(b"authorization", b"Bearer " + endpoint.api_key.reveal().encode())] if endpoint.api_key else []


def _body(asked: Asked, endpoint: Endpoint) -> bytes:
    request, envelope = asked.request, asked.envelope
    body = request.body
    if envelope.model != endpoint.serves and asked.form:
        body = wire.set_form_model(body, content_type(request), endpoint.serves)
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


def _asking_for_usage(body: bytes, asked: Asked) -> bytes | None:
    """Return the body with a wish for usage, None where there is no need: no stream, or one that tells by itself."""
    if not asked.envelope.stream or asked.operation not in ("chat", "text_completion"):
        return None
    return accounting.ask_usage(body, bytes(asked.envelope.fields.get("stream_options", b"")))
