"""The headers that an endpoint gets."""

from proxy.providers import Asked
from proxy.registry import Endpoint
from proxy.transport import Headers

# What reaches an upstream of what a client sent. Everything else, its key above all, stays here.
_PASSED = frozenset(
    (b"accept", b"anthropic-beta", b"anthropic-version", b"content-type", b"traceparent", b"tracestate")
)


def upstream_headers(asked: Asked) -> Headers:
    """Return what passes of a client's headers, and the request's id; a provider adds its key."""
    headers = [header for header in asked.headers if header[0] in _PASSED]
    headers.append((b"x-request-id", asked.request_id))
    return headers


def authorization(endpoint: Endpoint) -> Headers:
    """Return the header with which most servers take an endpoint's key, none where it has none."""
    return [(b"authorization", b"Bearer " + endpoint.api_key.reveal().encode())] if endpoint.api_key else []
