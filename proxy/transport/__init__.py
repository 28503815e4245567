"""How requests reach an endpoint: the protocol, and what both implementations agree on about headers."""

import re
from collections.abc import AsyncIterator
from functools import lru_cache
from typing import Protocol, Self

import msgspec

from proxy.errors import InvalidRequest, MalformedAnswer

Header = tuple[bytes, bytes]
Headers = list[Header]
Body = bytes | AsyncIterator[bytes]

_PROXY = frozenset((b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"proxy-authentication-info"))
_HOP_BY_HOP = _PROXY | {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
_SET_BY_US = _HOP_BY_HOP | {b"host", b"content-length"}
_FRAMING = frozenset((b"transfer-encoding", b"content-length"))
_LOOKED_AT = _FRAMING | {b"connection"}
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
_FORBIDDEN = re.compile(rb"[\r\n\0]").search
_TARGET = re.compile(rb"/[!-~\x80-\xff]*").fullmatch
_BROKEN = "the value of a header has a line break or NUL"
_LONG = 256  # bytes of a value; longer ones are not kept
_LENGTH = re.compile(rb"[0-9]{1,18}").fullmatch


class Timeouts(msgspec.Struct, frozen=True):
    """Seconds; None means no limit.

    connect: to have a connection, waiting for a free one included.
    first_byte: from the request being sent to the head of the answer being whole.
    between_bytes: the longest pause inside an answer while somebody waits for it.
    first_chunk: from the head to the first bytes of the body; None means between_bytes. vLLM sends the head of a stream
    at once: there it is the wait for the first token.
    """

    connect: float | None = 5.0
    first_byte: float | None = 600.0
    between_bytes: float | None = 60.0
    first_chunk: float | None = None


class Answer(Protocol):
    """One answer. Whoever gets it closes it, on every path: a connection belongs to it until then.

    Iterating yields body bytes as they come, never b"". Names in `headers` are lower-case; hop-by-hop
    headers are gone.
    """

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Headers: ...

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> bytes:
        """Return the next bytes of the body; raise an UpstreamError if the body cannot be completed."""
        ...

    async def read(self, limit: int) -> bytes:
        """Return the rest of the body; MalformedAnswer if it is longer than `limit` bytes."""
        ...

    def abort(self) -> None:
        """End the exchange now. An incomplete body takes its connection along: so the endpoint notices."""
        ...

    async def close(self) -> None:
        """abort(), and wait until its resources are free."""
        ...


class Transport(Protocol):
    """A way to one endpoint, with its pool of connections."""

    async def send(self, method: bytes, path: bytes, headers: Headers, body: Body, timeouts: Timeouts) -> Answer:
        """Send a request and return its answer once the head is there; raise an UpstreamError otherwise.

        `path` is the target with its query. The transport sets host, content-length and hop-by-hop headers.
        """
        ...

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        ...

    async def close(self) -> None:
        """End all connections; answers still being read fail."""
        ...


class Head(msgspec.Struct, frozen=True, gc=False):
    """The checked head of an answer.

    headers: lower-case names, no hop-by-hop ones. length, chunked: how the end of the body is known;
    with neither it is the end of the connection.
    """

    status: int
    headers: Headers
    length: int | None
    chunked: bool


def content_type(headers: Headers) -> bytes:
    """Return the value of Content-Type as it was sent, or b"". Names in `headers` are lower-case."""
    for name, value in headers:
        if name == b"content-type":
            return value
    return b""


def check_target(method: bytes, path: bytes) -> None:
    """Raise InvalidRequest unless the two fit on a request line."""
    if not _TOKEN(method):
        raise InvalidRequest("the method is not a token")
    if not _TARGET(path):
        raise InvalidRequest("the path has a space or control character, or does not begin with a slash")


def forwardable(headers: Headers) -> Headers:
    """Return the request headers that go to an endpoint: no hop-by-hop ones, and none that we set ourselves.

    Raise InvalidRequest for a name that is no token, or a value with CR, LF or NUL.
    """
    kept = [(lower, value) for name, value in headers if (lower := _request_name(name))]
    if _FORBIDDEN(b"".join([value for _, value in kept])):
        raise InvalidRequest(_BROKEN)
    connection = [value for name, value in headers if len(name) == 10 and name.lower() == b"connection"]
    return _without(kept, connection) if connection else kept


def request_lines(headers: Headers) -> list[bytes]:
    """Return what `forwardable` does, as lines without their ends. Most come again with every request, and are kept."""
    lines = [_line(name, value) if len(value) < _LONG else _make_line(name, value) for name, value in headers]
    if None in lines:  # Connection names headers that do not go
        return list(map(b": ".join, forwardable(headers)))
    return [line for line in lines if line]


def _make_line(name: bytes, value: bytes) -> bytes | None:
    """Return b"" for a header that is not sent, None for Connection."""
    lower = _request_name(name)
    if not lower:
        return None if name.lower() == b"connection" else b""
    if _FORBIDDEN(value):
        raise InvalidRequest(_BROKEN)
    return b"%b: %b" % (lower, value)


_line = lru_cache(maxsize=1024)(_make_line)


def check_head(status: int, raw: Headers) -> Head:
    """Return the head of a final answer, from its status and all its headers with lower-case names.

    Raise MalformedAnswer where two readers could disagree on where the body ends: content-length together
    with transfer-encoding, more than one of either, a length that is no number, a coding but chunked.
    """
    if not 200 <= status <= 599:
        raise MalformedAnswer(f"status {status}")
    headers: Headers = []
    framing: Headers = []
    connection: list[bytes] = []
    for header in raw:
        name = header[0]
        if name in _FRAMING:
            framing.append(header)
        elif name == b"connection":
            connection.append(header[1])
        if name not in _HOP_BY_HOP:
            headers.append(header)
    if connection:
        headers = _without(headers, connection)
    return Head(status, headers, *_framing(framing))


def _framing(headers: Headers) -> tuple[int | None, bool]:
    if not headers:
        return None, False
    if len(headers) > 1:
        raise MalformedAnswer("more than one content-length or transfer-encoding")
    name, value = headers[0]
    if name == b"transfer-encoding":
        if value.lower() != b"chunked":
            raise MalformedAnswer("transfer-encoding is not chunked")
        return None, True
    if not _LENGTH(value):
        raise MalformedAnswer("content-length is not a number")
    return int(value), False


def _without(headers: Headers, connection: list[bytes]) -> Headers:
    """Drop the headers that Connection named. It cannot name the length: that would hide the body's end."""
    named = {token.strip().lower() for value in connection for token in value.split(b",")} - _LOOKED_AT
    return [header for header in headers if header[0] not in named]


@lru_cache(maxsize=1024)
def _request_name(name: bytes) -> bytes:
    """Lower-case the name of a request header; b"" if it is not to be sent."""
    if not _TOKEN(name):
        raise InvalidRequest("the name of a header is not a token")
    lower = name.lower()
    return b"" if lower in _SET_BY_US else lower
