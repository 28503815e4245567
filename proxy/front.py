"""The HTTP/1.1 protocol that faces clients: uvicorn's, made strict and patient for so long only.

httptools refuses what could smuggle a request: two lengths, a length with a coding, chunk sizes that are no numbers,
folded or broken header lines. What it leaves open is closed here, and whoever sends a head or a body a byte at a time,
sends nothing at all, or a head without end, is cut off. Nothing is timed per request: one sweep looks at all
connections, so that the common request, which comes at once, costs nothing.
"""

import asyncio
import http
import resource
from typing import Any, Literal

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from proxy.config import Server
from proxy.errors import BadRequest, HeadTooLarge, RequestError, RequestTimeout, TooManyConnections

_HEAD_LIMIT = 128 * 1024  # bytes
_RATE = 16 * 1024  # bytes of a body that give it one more second
_LINGER = 5.0  # seconds that the rest of a body may take to come after it was answered
_SWEEP = 1.0  # seconds between two looks at the connections, at most
_VERSIONS = frozenset(("1.0", "1.1"))

Part = Literal["head", "body"]


class Front(HttpToolsProtocol):
    """One connection of a client."""

    server_settings = Server()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Mutable state beside uvicorn's: what we wait for, the bytes of it that have come, and since when a sweep
        # has known it (0: no sweep has seen it yet).
        self.part: Part = "head"
        self.received = 0
        self.since = 0.0

    def __repr__(self) -> str:
        return f"<Front {self.client} in its {self.part}, {self.received} bytes>"

    # Waiting

    def sweep(self, now: float) -> None:
        """End the connection if what we wait for is late. now: seconds of a monotonic clock."""
        if self.part == "head" and self._answering():
            self.since = 0.0
        elif not self.since:
            self.since = now
        elif now - self.since > self._patience():
            self._give_up()

    def _patience(self) -> float:
        settings = self.server_settings
        if self.part == "head":
            return settings.head_timeout
        if self.cycle.response_complete:
            return _LINGER
        return settings.body_timeout + self.received / _RATE

    def _give_up(self) -> None:
        if self.part == "head" and not self.received:
            self.transport.close()  # a client that keeps a connection open must not read an answer in it
        else:
            self.refuse(RequestTimeout(self.part))

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await(self, part: Part) -> None:
        self.part, self.received, self.since = part, 0, 0.0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.server_settings.max_connections and not self._make_room():
            self.refuse(TooManyConnections())

    def _make_room(self) -> bool:
        """End a connection on which nothing happens, if there is one."""
        idle = (c for c in self.connections if isinstance(c, Front) and c.since and not c._busy())
        victim = next(idle, None)
        if victim is not None:
            self.connections.discard(victim)
            victim.transport.close()
        return victim is not None

    def _busy(self) -> bool:
        return self.part == "body" or self._answering()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self.part == "head":
            self.received += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self.cycle is not None:  # what would follow is another protocol, which we do not speak
                self.cycle.keep_alive = False
        except httptools.HttpParserError:
            self.refuse(BadRequest("The request is not valid HTTP/1.1.", code="malformed_request"))
            return
        if self.received > _HEAD_LIMIT and self.part == "head":
            self.refuse(HeadTooLarge(_HEAD_LIMIT))

    def refuse(self, error: RequestError) -> None:
        """Say what is wrong, unless an answer is already on its way, and end the connection."""
        silent = self.transport.is_closing() or bool(self.pipeline)
        if self.cycle is not None and not self.cycle.response_complete:
            silent = silent or self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not silent:
            self.transport.write(_response(error))
        self.transport.close()

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.part == "head":  # not a trailer, which nobody has checked
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        _check_head(self.parser.get_http_version(), self.headers)
        self._await("body")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._await("head")
        super().on_message_complete()


def _check_head(version: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Raise ValueError, which the parser takes for a malformed request, for a head with two readings."""
    hosts = codings = 0
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"transfer-encoding":
            codings += 1
            if value.strip().lower() != b"chunked":
                raise ValueError("a coding that we do not read")
    if version not in _VERSIONS or hosts > 1 or (hosts == 0 and version == "1.1") or codings > (version == "1.1"):
        raise ValueError("not HTTP/1.1")


def _response(error: RequestError) -> bytes:
    body = error.envelope()
    phrase = http.HTTPStatus(error.status).phrase.encode()
    head = b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    return head % (error.status, phrase, len(body)) + body


def protocol(settings: Server) -> type[Front]:
    """Return the protocol class for a server."""
    room = raise_open_files() // 2  # every request may need a connection to an engine as well
    settings = msgspec.structs.replace(settings, max_connections=min(settings.max_connections, room))
    return type("Front", (Front,), {"server_settings": settings})


def raise_open_files() -> int:
    """Let this process have as many files open as it may; return how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


async def sweep_for_ever(connections: set[Any], settings: Server) -> None:
    """Look at all connections again and again."""
    loop = asyncio.get_running_loop()
    pause = min(_SWEEP, settings.head_timeout / 4, settings.body_timeout / 4)
    while True:
        await asyncio.sleep(pause)
        now = loop.time()
        for connection in list(connections):
            if isinstance(connection, Front):
                connection.sweep(now)
