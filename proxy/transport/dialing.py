"""Connections to one origin: TCP or a proxy's tunnel, TLS, and the protocol that both ends have agreed on."""

import asyncio

import httpcore2
import httpx2
import msgspec

from proxy.transport.http2 import Http2Connection, may_send_again
from proxy.transport.strict import StrictHttp11

Inner = StrictHttp11 | Http2Connection

_BROKEN = (httpcore2.RemoteProtocolError, httpcore2.NetworkError)


class CloudLimits(msgspec.Struct, frozen=True):
    """Of the connections to one origin. Times are in seconds.

    idle_timeout: after which an unused connection is closed rather than used. ping_after: the silence after which
    an HTTP/2 connection with requests on it is asked for a sign of life; it ends when none comes for as long again.
    """

    http2: bool = True
    max_connections: int = 1000
    max_idle: int = 100
    idle_timeout: float = 30.0
    ping_after: float = 15.0


class Dialer:
    """Dials one origin, and remembers whether it speaks HTTP/2."""

    def __init__(self, origin: httpcore2.Origin, proxy: httpcore2.Proxy | None, limits: CloudLimits) -> None:
        # Mutable state: whether a new connection may turn out to serve many requests at once.
        self._origin = origin
        self._proxy = proxy
        self._limits = limits
        self._secure = origin.scheme == b"https"
        self._tls = httpx2.create_ssl_context() if self._secure else None
        if self._tls is not None:
            self._tls.set_alpn_protocols(["h2", "http/1.1"] if limits.http2 else ["http/1.1"])
        self.may_multiplex = self._secure and limits.http2

    def __repr__(self) -> str:
        return f"<Dialer {self._origin}{' through a proxy' if self._proxy else ''}>"

    async def dial(self, seconds: float | None) -> Inner:
        """Return a new connection; raise httpcore2's ConnectError, ConnectTimeout or ProxyError."""
        try:
            async with asyncio.timeout(seconds):
                network = await self._network()
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout from error
        agreed = network.get_extra_info("ssl_object").selected_alpn_protocol() if self._secure else None
        self.may_multiplex = agreed == "h2"
        if self.may_multiplex:
            return Http2Connection(self._origin, network, self._limits.idle_timeout, self._limits.ping_after)
        return StrictHttp11(self._origin, network, self._limits.idle_timeout)

    async def _network(self) -> httpcore2.AsyncNetworkStream:
        network = await (self._tunnel(self._proxy) if self._proxy else self._tcp())
        if self._tls is None:
            return network
        try:
            return await network.start_tls(self._tls, self._origin.host.decode("ascii"))
        except BaseException:
            await network.aclose()
            raise

    async def _tcp(self) -> httpcore2.AsyncNetworkStream:
        return await httpcore2.AnyIOBackend().connect_tcp(self._origin.host.decode("ascii"), self._origin.port)

    async def _tunnel(self, proxy: httpcore2.Proxy) -> httpcore2.AsyncNetworkStream:
        """Ask the proxy for a way to the origin (RFC 9110, section 9.3.6)."""
        host = b"[%b]" % self._origin.host if b":" in self._origin.host else self._origin.host
        target = b"%b:%d" % (host, self._origin.port)
        at = proxy.url.origin
        url = httpcore2.URL(scheme=at.scheme, host=at.host, port=at.port, target=target)
        ask = httpcore2.Request(b"CONNECT", url, headers=[(b"host", target), *proxy.headers])
        connection = httpcore2.AsyncHTTPConnection(at, ssl_context=proxy.ssl_context)
        try:
            answer = await connection.handle_async_request(ask)
            if not 200 <= answer.status <= 299:
                raise httpcore2.ProxyError(f"the proxy answered {answer.status}")
            network: httpcore2.AsyncNetworkStream = answer.extensions["network_stream"]
            return network
        except BaseException:
            await connection.aclose()
            raise


class CloudConnection(httpcore2.AsyncConnectionInterface):
    """A place in the pool: dials when it is first asked, and once more if its idle HTTP/1.1 connection had died."""

    def __init__(self, origin: httpcore2.Origin, dialer: Dialer) -> None:
        # Mutable state: the connection, None until there is one; why there will be none; who may dial.
        self._origin = origin
        self._dialer = dialer
        self._inner: Inner | None = None
        self._failure: BaseException | None = None
        self._dialing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<CloudConnection {self.info()}>"

    async def handle_async_request(self, request: httpcore2.Request) -> httpcore2.Response:
        """Send a request; what a server certainly did not answer is sent once more, if it can be."""
        inner = await self._connected(request)
        try:
            return await inner.handle_async_request(request)
        except _BROKEN:
            stale = isinstance(inner, StrictHttp11) and inner.watched.went_stale
            if not (stale and may_send_again(request)):
                raise
        self._inner = None
        return await (await self._connected(request)).handle_async_request(request)

    async def _connected(self, request: httpcore2.Request) -> Inner:
        async with self._dialing:
            if self._failure is not None:
                raise _same_for_others(self._failure)
            if self._inner is None:
                try:
                    self._inner = await self._dialer.dial(request.extensions["timeout"]["connect"])
                except BaseException as error:
                    self._failure = error
                    raise
            return self._inner

    async def aclose(self) -> None:
        if self._inner is not None:
            await self._inner.aclose()

    def can_handle_request(self, origin: httpcore2.Origin) -> bool:
        return origin == self._origin

    def is_available(self) -> bool:
        if self._inner is not None:
            return self._inner.is_available()
        return self._failure is None and self._dialer.may_multiplex

    def is_connected(self) -> bool:
        return self._inner is not None and not self._inner.is_closed()

    def has_expired(self) -> bool:
        return self._inner is not None and self._inner.has_expired()

    def is_idle(self) -> bool:
        return self._inner is not None and self._inner.is_idle()

    def is_closed(self) -> bool:
        return self._failure is not None if self._inner is None else self._inner.is_closed()

    def can_multiplex(self) -> bool:
        return self._inner is not None and self._inner.can_multiplex()

    def info(self) -> str:
        if self._inner is not None:
            return self._inner.info()
        return "connecting" if self._failure is None else "failed"


class Pool(httpcore2.AsyncConnectionPool):
    """httpcore2's pool, filled with our connections."""

    def __init__(self, origin: httpcore2.Origin, proxy: httpcore2.Proxy | None, limits: CloudLimits) -> None:
        # httpcore2's forwarding of plain http through a proxy is good enough: no endpoint of ours needs it.
        self._forwarded = proxy is not None and origin.scheme == b"http"
        super().__init__(
            proxy=proxy if self._forwarded else None,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_idle,
            keepalive_expiry=limits.idle_timeout,
        )
        self._dialer = Dialer(origin, proxy, limits)

    def create_connection(self, origin: httpcore2.Origin) -> httpcore2.AsyncConnectionInterface:
        return super().create_connection(origin) if self._forwarded else CloudConnection(origin, self._dialer)


def _same_for_others(failure: BaseException) -> Exception:
    """Return what those are told who waited for a connection that somebody else was making."""
    if isinstance(failure, Exception):
        return type(failure)(*failure.args)
    return httpcore2.ConnectionNotAvailable()
