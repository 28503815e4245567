"""HTTP/1.1 or HTTP/2 to an endpoint that somebody else runs: TLS, and proxies from the environment, by httpx2.

HTTP/2 is off unless asked for: httpx2 2.16 does not reset a stream that we give up, so the endpoint would go on
generating, and its unread bytes would use up the flow-control window of the connection that others share.

Two things are looser than in proxy.transport.local, because httpx2 does not let us see them: bytes that follow the
end of an answer on the same connection, and folded headers, which it unfolds. And a request is not sent again when
its idle connection dies under it; httpx2 only avoids those that are known to be dead.
"""

import asyncio
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Self

import httpx2

from proxy.errors import (
    BetweenBytesTimeout,
    ConnectFailed,
    ConnectTimeout,
    FirstByteTimeout,
    MalformedAnswer,
    PoolTimeout,
    TruncatedAnswer,
    UpstreamError,
)
from proxy.transport import Body, Headers, Timeouts, check_head, check_target, forwardable

_ENDED = re.compile("disconnected|closed|ConnectionTerminated|StreamReset", re.IGNORECASE).search
_IDENTITY = (b"accept-encoding", b"identity")


class CloudAnswer:
    """See proxy.transport.Answer."""

    def __init__(self, transport: "CloudTransport", response: httpx2.Response, timeouts: Timeouts) -> None:
        # Mutable state: the iterator over the body, how long its next bytes may take (httpx2 would have one time for
        # all of them), and whether the response was closed.
        raw = [(name.lower(), value) for name, value in response.headers.raw]
        self.status, self.headers, *_ = check_head(response.status_code, raw)
        self._transport = transport
        self._response = response
        self._chunks = response.aiter_raw()
        self._between_bytes = timeouts.between_bytes
        self._pause = timeouts.between_bytes if timeouts.first_chunk is None else timeouts.first_chunk
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
                async with asyncio.timeout(self._pause):
                    chunk = await anext(self._chunks)
            self._pause = self._between_bytes
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
    """proxy.transport.Transport to one origin, `https://host[:port]` or `http://host[:port]`."""

    def __init__(self, address: str, *, http2: bool = False, max_connections: int = 1000) -> None:
        # Mutable state: httpx2's client, which has the pool; the closings that abort() has begun.
        self.address = address
        self._base = httpx2.URL(address)
        if self._base.scheme not in ("http", "https") or not self._base.host:
            raise ValueError(f"address {address!r}: expected https://host or http://host:port")
        limits = httpx2.Limits(max_connections=max_connections, max_keepalive_connections=100)
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        self._client = httpx2.AsyncClient(http2=http2, limits=limits, cookies=no_cookies, trust_env=True)
        self._closings: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<CloudTransport {self.address}: {len(self._closings)} closing>"

    async def send(self, method: bytes, path: bytes, headers: Headers, body: Body, timeouts: Timeouts) -> CloudAnswer:
        clock = {
            "connect": timeouts.connect,
            "pool": timeouts.connect,
            "read": timeouts.first_byte,
            "write": timeouts.first_byte,
        }
        request = self._request(method, path, headers, body, clock)
        async with AsyncExitStack() as undo:
            with _mapped(FirstByteTimeout, self.address):
                response = await self._client.send(request, stream=True, auth=None, follow_redirects=False)
            undo.push_async_callback(response.aclose)
            clock["read"] = None  # httpx2 looks again before it reads the body, which the answer times itself
            answer = self._checked(response, timeouts)
            undo.pop_all()
            return answer

    async def close(self) -> None:
        await asyncio.gather(*self._closings, return_exceptions=True)
        await self._client.aclose()

    def close_later(self, answer: CloudAnswer) -> None:
        """Close an answer from where nobody can wait."""
        closing = asyncio.get_running_loop().create_task(answer.close())
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)

    def _request(
        self, method: bytes, path: bytes, headers: Headers, body: Body, clock: dict[str, float | None]
    ) -> httpx2.Request:
        """Build it without the client, which would add headers of its own."""
        check_target(method, path)
        kept = [header for header in forwardable(headers) if header[0] != b"accept-encoding"]
        url = self._base.copy_with(raw_path=path)
        extensions: dict[str, Any] = {"timeout": clock}
        return httpx2.Request(method.decode(), url, headers=[*kept, _IDENTITY], content=body, extensions=extensions)

    def _checked(self, response: httpx2.Response, timeouts: Timeouts) -> CloudAnswer:
        try:
            return CloudAnswer(self, response, timeouts)
        except UpstreamError as error:
            error.address = self.address
            raise


@contextmanager
def _mapped(late: type[UpstreamError], address: str) -> Iterator[None]:
    """Raise our errors for those of httpx2; `late` is what it means that nothing came in time."""
    try:
        yield
    except httpx2.TransportError as error:
        ours = _error(error, late)
        ours.address = address
        raise ours from error
    except TimeoutError as error:
        raise late(address=address) from error


def _error(error: Exception, late: type[UpstreamError]) -> UpstreamError:
    match error:
        case httpx2.PoolTimeout():
            return PoolTimeout()
        case httpx2.ConnectTimeout():
            return ConnectTimeout()
        case httpx2.TimeoutException():
            return late()
        case httpx2.ConnectError() | httpx2.ProxyError() | httpx2.UnsupportedProtocol():
            return ConnectFailed(type(error.__cause__ or error).__name__)
        case httpx2.RemoteProtocolError() if not _ENDED(str(error)):
            return MalformedAnswer("it does not follow its protocol")
        case _:
            return TruncatedAnswer()
