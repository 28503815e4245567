"""The heads of requests and answers: which of the former we take, and how the latter are written.

httptools refuses what could smuggle a request: two lengths, a length with a coding, chunk sizes that are no numbers,
folded or broken header lines. What it leaves open is closed here.
"""

from functools import lru_cache
from http import HTTPStatus
from urllib.parse import unquote

import httptools

from proxy.errors import RequestError

Headers = list[tuple[bytes, bytes]]

LIMIT = 128 * 1024  # bytes of a request's head
_ONCE = (b"host", b"transfer-encoding")
_VERSIONS = frozenset(("1.0", "1.1"))
_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}


def check(method: bytes, version: str, headers: Headers) -> None:
    """Raise ValueError for the head of a request that has two readings, or is not for us. Names are lower-case."""
    given = dict(headers)
    if version not in _VERSIONS or method == b"CONNECT" or (b"host" not in given and version == "1.1"):
        raise ValueError("not HTTP/1.1")
    if b"transfer-encoding" in given and (version != "1.1" or not _is_chunked(given[b"transfer-encoding"])):
        raise ValueError("a coding that we do not read")
    if len(given) < len(headers) and any(sum(name == once for name, _ in headers) > 1 for once in _ONCE):
        raise ValueError("a header that there can be one of, twice")


def _is_chunked(coding: bytes) -> bool:
    return coding.strip().lower() == b"chunked"


@lru_cache(maxsize=256)
def split_target(target: bytes) -> tuple[bytes, str, bytes]:
    """Return the raw path, the path with its escapes resolved, and the query of a request's target.

    Raise ValueError or httptools' own error for a target without a path.
    """
    url = httptools.parse_url(target)
    if not url.path:
        raise ValueError("a target without a path")
    path = url.path.decode("ascii")
    return url.path, unquote(path) if "%" in path else path, url.query or b""


def encode(status: int, headers: Headers) -> bytes:
    """Return the head of an answer. Raise ValueError where a header would be more than one line."""
    lines = list(map(b": ".join, headers))
    text = b"".join(lines)
    if b"\n" in text or b"\r" in text:
        raise ValueError("a header of an answer has a line break")
    return b"\r\n".join((_status_line(status), *lines, b"\r\n"))


def refusal(error: RequestError) -> bytes:
    """Return a whole answer that tells an error, and that the connection ends."""
    body = error.envelope()
    headers = [*error.headers(), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return encode(error.status, [*headers, (b"connection", b"close")]) + body


@lru_cache(maxsize=64)
def _status_line(status: int) -> bytes:
    return b"HTTP/1.1 %d %b" % (status, _PHRASES.get(status, b""))
