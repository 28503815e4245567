"""HTTP/1.1 or HTTP/2 to an endpoint that somebody else runs: TLS, and proxies from the environment, by httpx2.

Addresses, trust and proxies are httpx2's; requests go straight to its core's pool (httpcore2), which is filled with
connections of ours: proxy.transport.dialing makes them, http2 and strict serve on them.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Self, cast
from urllib.parse import quote_from_bytes

import httpcore2
import httpx2

from proxy.errors import (
    BetweenBytesTimeout,
    ConnectFailed,
    ConnectTimeout,
    FirstByteTimeout,
    InvalidRequest,
    MalformedAnswer,
    PoolTimeout,
    TruncatedAnswer,
    UpstreamError,
)
from proxy.transport import Body, Headers, Timeouts, check_head, check_target, forwardable
from proxy.transport.dialing import CloudLimits, Pool
from proxy.transport.environment import proxy_for

_ENDED = re.compile("disconnected|closed", re.IGNORECASE).search
_IDENTITY = (b"accept-encoding", b"identity")
_CHUNKED = (b"transfer-encoding", b"chunked")
_SAFE = "".join(map(chr, range(0x21, 0x7F)))
_PORTS = {"http": 80, "https": 443}
_FOREIGN = (
    httpcore2.TimeoutException,
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.ProxyError,
    httpcore2.UnsupportedProtocol,
)


Clock = dict[str, float | None]  # httpcore2's timeouts, in seconds


class CloudAnswer:
    """See proxy.transport.Answer."""

    def __init__(
        self, transport: "CloudTransport", response: httpcore2.Response, clock: Clock, between_bytes: float | None
    ) -> None:
        # Mutable state: the iterator over the body, the clock of its reads, and whether the response was closed.
        raw = [(name.lower(), value) for name, value in response.headers]
        head = check_head(response.status, raw)
        self.status, self.headers = head.status, head.headers
        self._transport = transport
        self._response = response
        self._chunks = cast(AsyncIterator[bytes], response.aiter_stream())
        self._clock = clock
        self._between_bytes = between_bytes
        self._closed = False

    def __repr__(self) -> str:
        return f"<CloudAnswer {self.status} {'closed' if self._closed else 'open'}>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._closed:
            raise TruncatedAnswer("it was abandoned by us", address=self._transport.address)
        try:
            with _mapped(BetweenBytesTimeout, self._transport.address):
                chunk = await anext(self._chunks)
            self._clock["read"] = self._between_bytes
            return chunk
        except (UpstreamError, asyncio.CancelledError):
            await self.close()
            raise

    async def read(self, limit: int) -> bytes:
        parts: list[bytes] = []
        async for chunk in self:
            parts.append(chunk)
            limit -= len(chunk)
            if limit < 0:
                await self.close()
                raise MalformedAnswer("the body is larger than it may be", address=self._transport.address)
        return b"".join(parts)

    def abort(self) -> None:
        if not self._closed:
            self._transport.close_later(self)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._response.aclose()


class CloudTransport:
    """proxy.transport.Transport to one origin, `https://host[:port]` or `http://host[:port]`.

    Over TLS it speaks HTTP/2 where the endpoint does, unless `limits` say otherwise. ValueError for an address, or a
    proxy in the environment, that is none.
    """

    def __init__(self, address: str, limits: CloudLimits | None = None) -> None:
        # Mutable state: the pool; the closings that abort() has begun.
        self.address = address
        base = httpx2.URL(address)
        if base.scheme not in _PORTS or not base.host:
            raise ValueError(f"address {address!r}: expected https://host or http://host:port")
        port = base.port or _PORTS[base.scheme]
        self._base = base
        origin = httpcore2.Origin(base.raw_scheme, base.raw_host, port)
        proxy = proxy_for(base.scheme, base.host, port)
        self._pool = Pool(origin, proxy, limits or CloudLimits())
        self._closings: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<CloudTransport {self.address}: {len(self._pool.connections)} open, {len(self._closings)} closing>"

    async def send(self, method: bytes, path: bytes, headers: Headers, body: Body, timeouts: Timeouts) -> CloudAnswer:
        clock: Clock = {
            "connect": timeouts.connect,
            "pool": timeouts.connect,
            "read": timeouts.first_byte,
            "write": timeouts.first_byte,
        }
        request = self._request(method, path, headers, body, clock)
        async with AsyncExitStack() as undo:
            with _mapped(FirstByteTimeout, self.address):
                response = await self._pool.handle_async_request(request)
                undo.push_async_callback(response.aclose)
                # It is looked at again before each read.
                clock["read"] = timeouts.between_bytes if timeouts.first_chunk is None else timeouts.first_chunk
                answer = CloudAnswer(self, response, clock, timeouts.between_bytes)
            undo.pop_all()
            return answer

    @property
    def is_idle(self) -> bool:
        return not self._closings and all(c.is_idle() or c.is_closed() for c in self._pool.connections)

    async def close(self) -> None:
        await asyncio.gather(*self._closings, return_exceptions=True)
        await self._pool.aclose()

    def close_later(self, answer: CloudAnswer) -> None:
        """Close an answer from where nobody can wait."""
        closing = asyncio.get_running_loop().create_task(answer.close())
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)

    def _request(self, method: bytes, path: bytes, headers: Headers, body: Body, clock: Clock) -> httpcore2.Request:
        check_target(method, path)
        kept = [header for header in forwardable(headers) if header[0] != b"accept-encoding"]
        whole = isinstance(body, bytes)
        framing = (b"content-length", b"%d" % len(body)) if isinstance(body, bytes) else _CHUNKED
        at = self._base
        target = path if path.isascii() else quote_from_bytes(path, safe=_SAFE).encode()
        return httpcore2.Request(
            method,
            httpcore2.URL(scheme=at.raw_scheme, host=at.raw_host, port=at.port, target=target),
            headers=[(b"host", at.netloc), *kept, _IDENTITY, framing],
            content=body,
            extensions={"timeout": clock, "repeatable": whole},
        )


@contextmanager
def _mapped(late: type[UpstreamError], address: str) -> Iterator[None]:
    """Raise our errors for those of httpcore2; `late` is what it means that nothing came in time."""
    try:
        yield
    except UpstreamError as error:
        error.address = address
        raise
    except _FOREIGN as error:
        ours = _error(error, late)
        ours.address = address
        raise ours from error


def _error(error: Exception, late: type[UpstreamError]) -> UpstreamError:
    match error:
        case httpcore2.PoolTimeout():
            return PoolTimeout()
        case httpcore2.ConnectTimeout():
            return ConnectTimeout()
        case httpcore2.TimeoutException():
            return late()
        case httpcore2.ConnectError():
            return ConnectFailed(_what(error))
        case httpcore2.ProxyError() | httpcore2.UnsupportedProtocol():
            return ConnectFailed(type(error).__name__)
        case httpcore2.LocalProtocolError():
            return InvalidRequest("it does not follow the protocol")
        case httpcore2.RemoteProtocolError() if not _ENDED(str(error)):
            return MalformedAnswer("it does not follow its protocol")
        case _:
            return TruncatedAnswer()


def _what(error: Exception) -> str:
    """Name the error under this one: its text could hold an address."""
    under = next((arg for arg in error.args if isinstance(arg, Exception)), error)
    return type(under).__name__
