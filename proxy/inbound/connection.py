"""One connection of a client: bytes become requests, and requests are answered one after the other."""

import asyncio
from collections import deque
from typing import Any, Protocol, cast

import httptools

from proxy.config import Server
from proxy.errors import BadRequest, HeadTooLarge, RequestError, RequestTimeout, TooManyConnections
from proxy.inbound import heads
from proxy.inbound.heads import Headers
from proxy.inbound.patience import Patience
from proxy.inbound.turn import Application, Turn

_UNSENT = 16 * 1024  # bytes of an answer that wait for a slow client before we wait too


class Settings(Protocol):
    """What we use of uvicorn.Config."""

    loaded_app: Any
    asgi_version: str
    root_path: str


class Shared(Protocol):
    """What we use of uvicorn's ServerState: uvicorn shuts down what is in the sets, and waits for them."""

    connections: set[Any]
    tasks: set["asyncio.Task[None]"]
    default_headers: Headers
    total_requests: int


class Connection(asyncio.Protocol):
    """One connection of a client."""

    settings = Server()

    def __init__(
        self,
        config: Settings,
        server_state: Shared,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.application: Application = config.loaded_app
        self.shared = server_state
        self.loop = _loop or asyncio.get_running_loop()
        self._config = config
        self._app_state = app_state
        # All mutable state, of the socket: the transport, None when it is over, and its two ends; the parser; what
        # it waits for; whether reading is paused; the future of those who wait for room to write.
        self.transport: asyncio.Transport | None = None
        self._ends: dict[str, Any] = {}
        self._parser: httptools.HttpRequestParser = httptools.HttpRequestParser(self)
        self._patience = Patience()
        self._paused = False
        self.room: asyncio.Future[None] | None = None
        # Of its requests: the one that is answered now, those that came after it, the one whose body is coming,
        # the target and headers so far, whether no more are answered, and whether nothing is read any more.
        self._current: Turn | None = None
        self._next: deque[Turn] = deque()
        self._receiving: Turn | None = None
        self._target = b""
        self._headers: Headers = []
        self._closing = False
        self._deaf = False

    def __repr__(self) -> str:
        state = "closed" if self.transport is None else "busy" if self._current else "idle"
        return f"<Connection {state}, {len(self._next)} requests waiting, {self._patience!r}>"

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        transport.set_write_buffer_limits(high=_UNSENT)
        self._ends = {"server": _address(transport, "sockname"), "client": _address(transport, "peername")}
        self.shared.connections.add(self)
        if len(self.shared.connections) > self.settings.max_connections and not self._make_room():
            transport.write(heads.refusal(TooManyConnections()))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.shared.connections.discard(self)
        self.resume_writing()
        self._next.clear()
        if self._current is not None:
            self._current.abandon()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._patience.loose += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._deaf = True  # we go on in HTTP/1.1; what follows is another protocol, which we do not speak
            self._finish()
        except httptools.HttpParserError:
            self._refuse(BadRequest("The request is not valid HTTP/1.1.", code="malformed_request"))
        else:
            if self._patience.loose > heads.LIMIT:  # also of trailers
                self._refuse(HeadTooLarge(heads.LIMIT))

    def eof_received(self) -> None:
        """A client that will send no more wants no answer either: what is under way ends with the connection."""

    def pause_writing(self) -> None:
        self.room = self.loop.create_future()

    def resume_writing(self) -> None:
        room, self.room = self.room, None
        if room is not None and not room.done():
            room.set_result(None)

    # httptools callbacks

    def on_message_begin(self) -> None:
        self._target = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._receiving is None:  # else it is a trailer, which nobody has checked
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        method, version = self._parser.get_method(), self._parser.get_http_version()
        heads.check(method, version, self._headers)
        keep_alive = version == "1.1" and self._parser.should_keep_alive()
        turn = Turn(self, self._scope(method, version), keep_alive=keep_alive)
        self._receiving = turn
        self._patience.begin("body")
        if self._current is None:
            self._answer(turn)
        else:
            self._next.append(turn)
            self.pause_reading()

    def on_body(self, data: bytes) -> None:
        self._patience.take(len(data))
        if self._receiving is not None:
            self._receiving.feed(data)

    def on_message_complete(self) -> None:
        turn, self._receiving = self._receiving, None
        self._patience.begin("head")
        if turn is not None:
            turn.feed_end()

    def _scope(self, method: bytes, version: str) -> dict[str, Any]:
        raw_path, path, query = heads.split_target(self._target)
        return {
            "type": "http",
            "asgi": {"version": self._config.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "method": method.decode("ascii"),
            "scheme": "http",
            "root_path": self._config.root_path,
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": self._headers,
            "state": self._app_state.copy(),
            **self._ends,
        }

    # Requests

    def _answer(self, turn: Turn) -> None:
        self._current = turn
        self.shared.total_requests += 1
        turn.task = self.loop.create_task(turn.run(self.application))

    def answered(self, turn: Turn) -> None:
        """The answer is complete. Called by the turn, once."""
        self._current = None
        if self.transport is None:
            return
        if self._closing or not turn.keep_alive:
            self._hang_up()
        elif self._next:
            self._answer(self._next.popleft())
        else:
            self.resume_reading()

    def shutdown(self) -> None:
        """Called by uvicorn: finish what is under way, which it is told to wait for, and take no more."""
        self._finish()
        if self._current is not None and (task := self._current.task) is not None:
            self.shared.tasks.add(task)
            task.add_done_callback(self.shared.tasks.discard)
        elif self.transport is not None:
            self.transport.close()

    def _finish(self) -> None:
        """Answer nothing after the present request. Those that wait were not begun: the client may send them again."""
        self._closing = True
        self._next.clear()
        if self._current is not None:
            self._current.keep_alive = False

    def _refuse(self, error: RequestError) -> None:
        """Take nothing more, and say what is wrong with what came last, if there is no answer to it yet.

        Requests that came whole before it do not suffer: the present one is answered, and then the connection ends.
        """
        self._deaf = True
        broken, current = self._receiving, self._current
        if self.transport is None or (current is not None and current is not broken):
            self._finish()
            return
        if broken is None or not broken.begun:
            self.transport.write(heads.refusal(error))
        if broken is not None:
            broken.abandon()
        self._current = None
        self._hang_up()

    def _hang_up(self) -> None:
        """End the connection, once the client has stopped sending: closed before that, it would lose the answer."""
        if self.transport is None or self.transport.is_closing():
            return
        if self._deaf or self._receiving is not None:
            self._deaf = True
            self._patience.since = 0.0
            self.resume_reading()
            self.transport.write_eof()
        else:
            self.transport.close()

    # Patience

    def sweep(self, now: float) -> None:
        """End the connection if what we wait for is late. now: seconds of a monotonic clock."""
        if self.transport is not None and self._patience.stalled(now, self._unsent(), self.settings):
            self.transport.abort()
        elif self._paused or (self._receiving is None and self._current is not None):
            self._patience.since = 0.0  # it is not the client that we wait for
        elif self._patience.late(now, self.settings, done=self._lingers()):
            self._give_up()

    def _unsent(self) -> int:
        return self.transport.get_write_buffer_size() if self.transport is not None and self.room is not None else 0

    def _give_up(self) -> None:
        patience = self._patience
        if self.transport is None or self.transport.is_closing():
            return
        if self._lingers() or (patience.part == "head" and not patience.loose):
            self.transport.close()  # a client that keeps a connection open must not read an answer in it
        else:
            self._refuse(RequestTimeout(patience.part))

    def _make_room(self) -> bool:
        """End a connection on which nothing happens, if there is one."""
        victim = next((c for c in self.shared.connections if isinstance(c, Connection) and c._idle()), None)
        if victim is None or victim.transport is None:
            return False
        self.shared.connections.discard(victim)
        victim.transport.close()
        return True

    def _idle(self) -> bool:
        return bool(self._patience.since) and self._current is None and (self._deaf or self._receiving is None)

    def _lingers(self) -> bool:
        """Say whether what still comes is of no use."""
        return self._current is None and (self._deaf or self._receiving is not None)

    # Flow

    def pause_reading(self) -> None:
        """Take no more from the socket for now."""
        if not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on reading, unless requests wait that came too early."""
        if self._paused and self.transport is not None and not self._next:
            self._paused = False
            self.transport.resume_reading()


def _address(transport: asyncio.BaseTransport, which: str) -> tuple[str, int] | None:
    found = transport.get_extra_info(which)
    return (str(found[0]), int(found[1])) if isinstance(found, tuple) else None
