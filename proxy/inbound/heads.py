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
_VERSIONS = frozenset(("1.0", "1.1"))
_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}


def check(method: bytes, version: str, headers: Headers) -> None:
    """Raise ValueError for the head of a request that has two readings, or is not for us. Names are lower-case."""
    names = [name for name, _ in headers]
    hosts, codings = names.count(b"host"), names.count(b"transfer-encoding")
    if version not in _VERSIONS or method == b"CONNECT" or hosts > 1 or (hosts == 0 and version == "1.1"):
        raise ValueError("not HTTP/1.1")
    if codings and (codings > 1 or version != "1.1" or not _chunked(headers)):
        raise ValueError("a coding that we do not read")


def _chunked(headers: Headers) -> bool:
    return dict(headers)[b"transfer-encoding"].strip().lower() == b"chunked"


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
    head = b"".join([_status_line(status), *[b"%b: %b\r\n" % header for header in headers], b"\r\n"])
    if not head.count(b"\n") == head.count(b"\r") == len(headers) + 2:
        raise ValueError("a header of an answer has a line break")
    return head


def refusal(error: RequestError) -> bytes:
    """Return a whole answer that tells an error, and that the connection ends."""
    body = error.envelope()
    headers = [*error.headers(), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return encode(error.status, [*headers, (b"connection", b"close")]) + body


@lru_cache(maxsize=64)
def _status_line(status: int) -> bytes:
    return b"HTTP/1.1 %d %b\r\n" % (status, _PHRASES.get(status, b""))
