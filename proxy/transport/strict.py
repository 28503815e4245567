"""httpcore2's HTTP/1.1 connection, as strict as ours. The one place that touches httpcore2's private parts.

A test fails when a new version of httpcore2 changes them.
"""

import re
import ssl
from typing import Any

import httpcore2

_FOLDED = re.compile(rb"\n[ \t]").search
_END = re.compile(rb"\r?\n\r?\n").search
_INTERIM = re.compile(rb"HTTP/1\.[01] 1[0-9][0-9][ \r\n]").match
_HEAD_LIMIT = 100 * 1024  # as httpcore2 has it


class WatchedStream(httpcore2.AsyncNetworkStream):
    """A network stream that knows whether something of an answer was received, and refuses folded headers."""

    def __init__(self, network: httpcore2.AsyncNetworkStream) -> None:
        # Mutable state: the head that is being received, None when it is whole; whether anything was received
        # since the last request began, and how many requests there were.
        self._network = network
        self._head: bytes | None = b""
        self._heard = False
        self._requests = 0

    def __repr__(self) -> str:
        return f"<WatchedStream {self._requests} requests, {'heard' if self._heard else 'silent'}>"

    @property
    def went_stale(self) -> bool:
        """It served before and gave nothing since: whoever sees it end may send the request again."""
        return self._requests > 1 and not self._heard

    def expect_answer(self) -> None:
        """A request begins."""
        self._requests += 1
        self._head = b""
        self._heard = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            data = await self._network.read(max_bytes, timeout)
        except ssl.SSLError as error:  # httpcore2 lets it through
            raise httpcore2.ReadError(str(error)) from error
        if data:
            self._heard = True
            if self._head is not None:
                self._head = _unfinished_head(self._head + data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._network.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._network.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        return await self._network.start_tls(ssl_context, server_hostname, timeout)

    def get_extra_info(self, info: str) -> Any:
        return self._network.get_extra_info(info)


def _unfinished_head(data: bytes) -> bytes | None:
    """Return what of a head there is, None when the last one is whole. Raise for a folded header."""
    while end := _END(data):
        _refuse_folded(data[: end.start()])
        if not _INTERIM(data):
            return None
        data = data[end.end() :]
    _refuse_folded(data)
    return None if len(data) > _HEAD_LIMIT else data


def _refuse_folded(head: bytes) -> None:
    if _FOLDED(head):
        raise httpcore2.RemoteProtocolError("a header is folded over lines")


class StrictHttp11(httpcore2.AsyncHTTP11Connection):
    """Serves no other request once bytes came after the end of an answer: they would become the next answer."""

    def __init__(self, origin: httpcore2.Origin, network: httpcore2.AsyncNetworkStream, idle_timeout: float) -> None:
        self.watched = WatchedStream(network)
        super().__init__(origin, self.watched, keepalive_expiry=idle_timeout)

    async def handle_async_request(self, request: httpcore2.Request) -> httpcore2.Response:
        if self.is_available() or not self.watched._requests:
            self.watched.expect_answer()
        return await super().handle_async_request(request)

    async def _response_closed(self) -> None:
        if self._h11_state.trailing_data[0]:
            await self.aclose()
        else:
            await super()._response_closed()
