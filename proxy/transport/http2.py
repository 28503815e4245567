"""HTTP/2 on one connection, for httpcore2's pool: h2 keeps the protocol, this file moves the bytes.

httpcore2 has such a connection too. This one is for streams that are long, slow and often given up:

1. A stream that is given up is reset, so that the server stops, and what it had sent is credited to the connection.
2. Every stream has its own deadlines. One that is late ends alone.
3. Only one task writes. Who is cancelled cannot leave half a frame behind, nor one that the server never sees.
4. A stream's window is small and the connection's holds all of them: who reads slowly stops nobody else.
5. After GOAWAY the streams that the server still serves are read to their end; others may be sent again elsewhere.
6. A silent connection with open streams is asked for a sign of life (PING), and ends without one.
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import suppress
from typing import Any, cast

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import httpcore2

from proxy.errors import MalformedAnswer, TruncatedAnswer, UpstreamError
from proxy.transport.exchange import Exchange
from proxy.transport.frames import MAX_FRAME, Frames, last_served

STREAM_WINDOW = 128 * 1024  # bytes that a server may send ahead of the reader of a stream
MAX_STREAMS = 100  # at once; a server may allow fewer
_CONNECTION_WINDOW = MAX_STREAMS * STREAM_WINDOW
_DEFAULT_WINDOW = 65_535
_READ_SIZE = 64 * 1024
_HEADERS_LIMIT = 64 * 1024
_PING = b"polyvox."
_NOT_SENT = frozenset((b"host", b"transfer-encoding"))
_CODES = h2.settings.SettingCodes


class Http2Connection(httpcore2.AsyncConnectionInterface):
    """Serves many requests at once on a network stream that has agreed on h2."""

    def __init__(
        self,
        origin: httpcore2.Origin,
        network: httpcore2.AsyncNetworkStream,
        idle_timeout: float,
        ping_after: float,
    ) -> None:
        # Mutable state: h2's, and the frame being received; the exchanges by stream; how many reads brought
        # something, and whether a ping waits for one; whether the server takes no new streams; whether all is
        # over; since when nothing was asked for; whether there is something to send, and whether all is on its
        # way; the two tasks.
        self._origin = origin
        self._network = network
        self._idle_timeout = idle_timeout
        self._ping_after = ping_after
        self._loop = asyncio.get_running_loop()
        self._h2 = _begin()
        self._frames = Frames()
        self._exchanges: dict[int, Exchange] = {}
        self._heard = 0
        self._pinged = False
        self._leaving = False
        self._closed = False
        self._idle_since = self._loop.time()
        self._unsent = asyncio.Event()
        self._all_sent = False
        self._flush()
        self._tasks = (self._loop.create_task(self._read()), self._loop.create_task(self._write()))

    def __repr__(self) -> str:
        return f"<Http2Connection {self.info()}>"

    # What the pool asks

    def can_handle_request(self, origin: httpcore2.Origin) -> bool:
        return origin == self._origin

    def is_available(self) -> bool:
        return not self._leaving and not self._closed and len(self._exchanges) < self._room()

    def has_expired(self) -> bool:
        return self.is_idle() and self._loop.time() > self._idle_since + self._idle_timeout

    def is_idle(self) -> bool:
        return not self._exchanges

    def is_closed(self) -> bool:
        return self._closed

    def can_multiplex(self) -> bool:
        return True

    def info(self) -> str:
        state = "closed" if self._closed else "leaving" if self._leaving else "open"
        return f"{self._origin}, HTTP/2, {state}, {len(self._exchanges)} streams"

    async def aclose(self) -> None:
        self._end(lambda: TruncatedAnswer("we are closing"))
        await asyncio.wait(self._tasks)
        await self._network.aclose()  # a task that had not begun has closed nothing

    def _room(self) -> int:
        return min(MAX_STREAMS, self._h2.remote_settings.max_concurrent_streams)

    # An exchange

    async def handle_async_request(self, request: httpcore2.Request) -> httpcore2.Response:
        """Send a request, and return the answer once its head is there.

        Raise httpcore2.ConnectionNotAvailable, so that the pool chooses again, when nothing was sent, and once when
        the server did nothing with it.
        """
        exchange = self._open(request)
        try:
            await self._send_body(exchange, request)
            status, headers = await exchange.head(_seconds(request, "read"))
        except BaseException as error:
            self.close_exchange(exchange)
            if isinstance(error, UpstreamError) and exchange.unprocessed and may_send_again(request):
                raise httpcore2.ConnectionNotAvailable from error
            raise
        return httpcore2.Response(status, headers=headers, content=_Body(self, exchange, request))

    def _open(self, request: httpcore2.Request) -> Exchange:
        if not self.is_available():
            raise httpcore2.ConnectionNotAvailable
        try:
            stream = self._h2.get_next_available_stream_id()
        except h2.exceptions.NoAvailableStreamIDError:
            self._leaving = True
            raise httpcore2.ConnectionNotAvailable from None
        empty = (b"content-length", b"0") in request.headers
        try:
            self._h2.send_headers(stream, _request_head(request), end_stream=empty)
        except h2.exceptions.ProtocolError as error:
            raise httpcore2.LocalProtocolError(error) from error
        exchange = self._exchanges[stream] = Exchange(stream, self._heard)
        exchange.sent = empty
        self._flush()
        return exchange

    async def _send_body(self, exchange: Exchange, request: httpcore2.Request) -> None:
        """Upload what there is, unless the answer is over before that."""
        if exchange.sent:
            return
        seconds = _seconds(request, "write")
        async for piece in cast(AsyncIterable[bytes], request.stream):
            view = memoryview(piece)
            while view:
                size = await self._window(exchange, seconds)
                if not size:
                    return
                self._h2.send_data(exchange.stream, view[:size].tobytes())
                view = view[size:]
                self._flush()
        if not self._over(exchange):
            self._h2.end_stream(exchange.stream)
            exchange.sent = True
            self._flush()

    async def _window(self, exchange: Exchange, seconds: float | None) -> int:
        """Return how much of the request may be sent, when it is more than nothing; 0 if nobody wants it any more."""
        while not self._over(exchange):
            if self._all_sent:
                size = min(self._h2.local_flow_control_window(exchange.stream), self._h2.max_outbound_frame_size)
                if size > 0:
                    return size
            await exchange.change(seconds, httpcore2.WriteTimeout)
        return 0

    def _over(self, exchange: Exchange) -> bool:
        return exchange.whole or exchange.error is not None

    async def next_bytes(self, exchange: Exchange, request: httpcore2.Request) -> bytes:
        """Return the next bytes of the body, b"" at its end."""
        data, held = await exchange.body(_seconds(request, "read"))
        self._credit(exchange, held)
        return data

    def close_exchange(self, exchange: Exchange) -> None:
        """Give the stream up, unless it is complete. Idempotent."""
        if self._exchanges.pop(exchange.stream, None) is None:
            return
        exchange.fail(TruncatedAnswer("it was abandoned by us"))
        if not (exchange.whole and exchange.sent):
            self._reset(exchange, h2.errors.ErrorCodes.CANCEL)
        _, held = exchange.drop()
        self._credit(exchange, held)
        self._idle_since = self._loop.time()
        self._end_if_left()

    def _reset(self, exchange: Exchange, code: h2.errors.ErrorCodes) -> None:
        with suppress(h2.exceptions.ProtocolError):  # it, or all of the connection, is over
            self._h2.reset_stream(exchange.stream, code)
        self._flush()

    def _credit(self, exchange: Exchange, held: int) -> None:
        if held:
            with suppress(h2.exceptions.ProtocolError):
                self._h2.acknowledge_received_data(held, exchange.stream)
            self._flush()

    # What is received

    def _receive(self, data: bytes) -> None:
        self._heard += 1
        self._pinged = False
        for frame in self._frames.feed(data):
            if (last := last_served(frame)) is not None:
                self._leave(last)  # h2 would take nothing more from a server that says goodbye
                continue
            for event in self._h2.receive_data(frame.wire):
                if (on := _ON.get(type(event))) is not None:
                    on(self, event)
        self._flush()

    def _exchange_of(self, event: Any) -> Exchange | None:
        return self._exchanges.get(event.stream_id)

    def _on_head(self, event: h2.events.ResponseReceived) -> None:
        if (exchange := self._exchange_of(event)) is None:
            return
        try:
            exchange.begin(event.headers)
        except MalformedAnswer as error:
            exchange.fail(error)
            self._reset(exchange, h2.errors.ErrorCodes.PROTOCOL_ERROR)

    def _on_data(self, event: h2.events.DataReceived) -> None:
        if (exchange := self._exchange_of(event)) is not None:
            exchange.receive(event.data or b"", event.flow_controlled_length or 0)

    def _on_end(self, event: h2.events.StreamEnded) -> None:
        if (exchange := self._exchange_of(event)) is not None:
            exchange.end()

    def _on_reset(self, event: h2.events.StreamReset) -> None:
        if (exchange := self._exchange_of(event)) is not None:
            refused = event.error_code == h2.errors.ErrorCodes.REFUSED_STREAM
            exchange.fail(_broken(exchange), unprocessed=refused)

    def _on_window(self, event: h2.events.Event) -> None:
        self._wake_uploads()

    def _wake_uploads(self) -> None:
        for exchange in self._exchanges.values():
            if not exchange.sent:
                exchange.wake()

    # The connection's end

    def _leave(self, last: int) -> None:
        self._leaving = True
        for exchange in self._exchanges.values():
            if exchange.stream > last:
                exchange.fail(_broken(exchange), unprocessed=not exchange.status)
        self._end_if_left()

    def _end_if_left(self) -> None:
        if self._leaving and not self._exchanges:
            self._end(lambda: TruncatedAnswer("we are closing"))

    def _end(self, why: Callable[[], UpstreamError]) -> None:
        """Fail what is open. A request may be sent again if this connection was silent ever since it was sent."""
        self._closed = True
        for exchange in self._exchanges.values():
            stale = exchange.stream > 1 and exchange.heard_before == self._heard
            exchange.fail(why(), unprocessed=stale)
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def _lost(self, error: Exception) -> None:
        wrong = isinstance(error, MalformedAnswer | h2.exceptions.ProtocolError)
        self._end(lambda: MalformedAnswer("it does not follow its protocol") if wrong else TruncatedAnswer())

    # The two tasks

    async def _read(self) -> None:
        try:
            while not self._closed:
                try:
                    data = await self._network.read(_READ_SIZE, self._ping_after)
                except httpcore2.ReadTimeout:
                    self._ask_for_life()
                    continue
                if not data:
                    raise httpcore2.ReadError
                self._receive(data)
        except Exception as error:  # foreign errors of every kind: TLS, sockets, h2
            self._lost(error)
        finally:
            await self._network.aclose()

    def _ask_for_life(self) -> None:
        if not self._exchanges:
            return
        if self._pinged:
            raise httpcore2.ReadTimeout
        self._pinged = True
        self._h2.ping(_PING)
        self._flush()

    async def _write(self) -> None:
        try:
            while True:
                await self._unsent.wait()
                self._unsent.clear()
                await self._network.write(self._h2.data_to_send())
                if not self._unsent.is_set():
                    self._all_sent = True
                    self._wake_uploads()
        except Exception as error:
            self._lost(error)

    def _flush(self) -> None:
        self._unsent.set()
        self._all_sent = False


class _Body:
    """The body of an answer, as the pool passes it on."""

    def __init__(self, connection: Http2Connection, exchange: Exchange, request: httpcore2.Request) -> None:
        self._connection = connection
        self._exchange = exchange
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self._connection.next_bytes(self._exchange, self._request):
            yield data

    async def aclose(self) -> None:
        self._connection.close_exchange(self._exchange)


def may_send_again(request: httpcore2.Request) -> bool:
    """Return True once for a request whose extension `repeatable` is true."""
    return bool(request.extensions.pop("repeatable", False))


def _begin() -> h2.connection.H2Connection:
    """Return h2's machine with our settings and windows, and the connection's first bytes in it.

    What answers say is checked by us: h2 would end the connection of all for the answer of one.
    """
    machine = h2.connection.H2Connection(h2.config.H2Configuration(validate_inbound_headers=False))
    machine.local_settings = h2.settings.Settings(
        client=True,
        initial_values={
            _CODES.ENABLE_PUSH: 0,
            _CODES.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            _CODES.MAX_FRAME_SIZE: MAX_FRAME,
            _CODES.MAX_HEADER_LIST_SIZE: _HEADERS_LIMIT,
        },
    )
    machine.initiate_connection()
    machine.increment_flow_control_window(_CONNECTION_WINDOW - _DEFAULT_WINDOW)
    return machine


def _request_head(request: httpcore2.Request) -> list[tuple[bytes, bytes]]:
    host = next(value for name, value in request.headers if name == b"host")
    head = [(b":method", request.method), (b":authority", host), (b":scheme", request.url.scheme)]
    return [*head, (b":path", request.url.target), *(pair for pair in request.headers if pair[0] not in _NOT_SENT)]


def _seconds(request: httpcore2.Request, kind: str) -> float | None:
    return cast(float | None, request.extensions["timeout"][kind])


def _broken(exchange: Exchange) -> TruncatedAnswer:
    return TruncatedAnswer("in the middle" if exchange.status else "before its first byte")


_ON: dict[type, Callable[[Http2Connection, Any], None]] = {
    h2.events.ResponseReceived: Http2Connection._on_head,
    h2.events.DataReceived: Http2Connection._on_data,
    h2.events.StreamEnded: Http2Connection._on_end,
    h2.events.StreamReset: Http2Connection._on_reset,
    h2.events.WindowUpdated: Http2Connection._on_window,
    h2.events.RemoteSettingsChanged: Http2Connection._on_window,
}
