"""The scripted upstream's HTTP/2 face: it plays the same scripts, each on a stream of its own.

A play's bytes are an HTTP/1.1 answer, which is translated into frames as it comes. CLOSE ends the connection, RESET
the stream. A play may also hold functions, which do something to h2's machine for the stream that it is played on.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import httptools

from tests.fakes.scripted_upstream import Received, Step

Machine = h2.connection.H2Connection
Act = Callable[[Machine, int], None]
Play = Sequence[bytes | Step | Act]

_HOPS = (b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"proxy-authenticate")


@dataclass
class ScriptedHttp2:
    """Answers the nth request with the nth play, then always with the last. See ScriptedUpstream."""

    plays: Sequence[Play]
    settings: dict[h2.settings.SettingCodes, int] = field(default_factory=dict)
    address: str = ""
    requests: list[Received] = field(default_factory=list)
    resets: list[tuple[int, int]] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    sent: int = 0
    pings: int = 0
    deaf: bool = False
    released: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def release(self) -> None:
        """Let every stall go on."""
        self.released.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.connections += 1
        conversation = Conversation(self, writer, self.connections)
        try:
            await conversation.converse(reader)
        except (ConnectionError, asyncio.CancelledError, ssl.SSLError):
            pass
        finally:
            self.tasks.discard(task)
            await conversation.end()

    async def close(self) -> None:
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


class Stream:
    """A request as it comes, and the task that answers it."""

    def __init__(self, headers: list[tuple[bytes, bytes]]) -> None:
        self.headers = headers
        self.body = b""
        self.gone = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Conversation:
    """One connection."""

    def __init__(self, upstream: ScriptedHttp2, writer: asyncio.StreamWriter, number: int) -> None:
        self.upstream = upstream
        self.machine = Machine(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self.streams: dict[int, Stream] = {}
        self.room = asyncio.Event()
        self._writer = writer
        self._number = number
        self.machine.local_settings.update(upstream.settings)
        self.machine.initiate_connection()

    async def converse(self, reader: asyncio.StreamReader) -> None:
        self.flush()
        while data := await reader.read(65536):
            if self.upstream.deaf:
                self.upstream.pings += 1
                continue
            for event in self.machine.receive_data(data):
                self._on(event)
            self.flush()

    def flush(self) -> None:
        if not self._writer.is_closing():
            self._writer.write(self.machine.data_to_send())

    def hang_up(self) -> None:
        self._writer.transport.close()

    async def end(self) -> None:
        with contextlib.suppress(AttributeError):  # of TLS that is closed already, in Python 3.11.0 to 3.11.3
            self._writer.transport.abort()
        for stream in self.streams.values():
            stream.gone.set()
        tasks = [stream.task for stream in self.streams.values() if stream.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for number in list(self.streams):
            self.forget(number)

    def forget(self, number: int) -> None:
        if self.streams.pop(number, None) is not None:
            self.upstream.open -= 1

    def _on(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                self.streams[event.stream_id] = Stream([(bytes(k), bytes(v)) for k, v in event.headers])
                self.upstream.open += 1
            case h2.events.DataReceived():
                self.machine.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self.streams[event.stream_id].body += event.data
            case h2.events.StreamEnded():
                self._answer(event.stream_id)
            case h2.events.StreamReset():
                self.upstream.resets.append((event.stream_id, int(event.error_code)))
                self._stop(event.stream_id)
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                self.room.set()
            case h2.events.PingReceived():
                self.upstream.pings += 1

    def _answer(self, number: int) -> None:
        if (stream := self.streams.get(number)) is None:
            return
        pseudo = dict(stream.headers)
        headers = [pair for pair in stream.headers if not pair[0].startswith(b":")]
        received = Received(
            pseudo[b":method"],
            pseudo[b":path"],
            [(b"host", pseudo[b":authority"]), *headers],
            stream.body,
            self._number,
        )
        self.upstream.requests.append(received)
        play = self.upstream.plays[min(len(self.upstream.requests), len(self.upstream.plays)) - 1]
        stream.task = asyncio.create_task(Performance(self, number, stream, received.method).perform(play))

    def _stop(self, number: int) -> None:
        if stream := self.streams.get(number):
            stream.gone.set()
            if stream.task is not None:
                stream.task.cancel()
        self.forget(number)
        self.room.set()


class Performance:
    """A play on one stream: httptools reads the script, and what it finds is sent as frames."""

    def __init__(self, conversation: Conversation, number: int, stream: Stream, method: bytes) -> None:
        self._on = conversation
        self._number = number
        self._stream = stream
        self._bodiless = method == b"HEAD"
        self._parser = httptools.HttpResponseParser(self)
        self._todo: list[tuple[str, bytes | list[tuple[bytes, bytes]]]] = []
        self._headers: list[tuple[bytes, bytes]] = []
        self._begun = self._ended = self._last = self._until_eof = False
        self._stays = True

    async def perform(self, play: Play) -> None:
        try:
            for step in play:
                if not await self._perform(step):
                    return
        except h2.exceptions.ProtocolError:
            pass  # the client has ended the stream or the connection
        finally:
            self._on.flush()
            if self._ended:
                self._on.forget(self._number)

    async def _perform(self, step: bytes | Step | Act) -> bool:
        """Return False when the play is over."""
        machine = self._on.machine
        if isinstance(step, bytes):
            await self._play(step)
        elif step is Step.STALL:
            await self._stall()
        elif step is Step.CLOSE:
            if self._begun and not self._ended and self._until_eof:
                machine.end_stream(self._number)
            self._on.flush()
            self._on.hang_up()
            return False
        elif step is Step.RESET:
            machine.reset_stream(self._number, h2.errors.ErrorCodes.INTERNAL_ERROR)
            self._on.forget(self._number)
        elif callable(step):
            step(machine, self._number)
        self._on.flush()
        await asyncio.sleep(0)
        return True

    async def _stall(self) -> None:
        await self._on.upstream.released.wait()  # the reset of the stream cancels us

    async def _play(self, script: bytes) -> None:
        self._parser.feed_data(script)
        todo, self._todo = self._todo, []
        for kind, value in todo:
            if kind == "data":
                await self._send(value)
            elif kind == "end":
                self._end()
            else:
                self._on.machine.send_headers(self._number, value, end_stream=kind == "last")
        self._on.flush()

    async def _send(self, data: bytes) -> None:
        while data:
            machine, room = self._on.machine, self._on.room
            size = min(machine.local_flow_control_window(self._number), machine.max_outbound_frame_size)
            if size <= 0:
                room.clear()
                await room.wait()
                continue
            machine.send_data(self._number, data[:size])
            self._on.upstream.sent += len(data[:size])
            data = data[size:]
            self._on.flush()

    def _end(self) -> None:
        if not self._last:
            self._on.machine.end_stream(self._number)
        self._ended = True
        if not self._stays:
            self._on.flush()
            goaway(self._on.machine, self._on.machine.highest_inbound_stream_id)

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        named = [pair for pair in self._headers if pair[0] not in _HOPS]
        length = [value for name, value in named if name == b"content-length"]
        self._until_eof = not length and (b"transfer-encoding", b"chunked") not in self._headers
        interim = 100 <= status < 200
        self._begun = not interim
        self._last = not interim and (self._bodiless or status in (204, 304))
        self._headers = []
        self._todo.append(("last" if self._last else "head", [(b":status", b"%d" % status), *named]))
        if self._bodiless:
            self._todo.append(("end", b""))

    def on_body(self, data: bytes) -> None:
        self._todo.append(("data", data))

    def on_message_complete(self) -> None:
        if not self._begun or self._bodiless:
            return
        self._stays = self._parser.should_keep_alive()
        if self._headers:
            self._last = True
            self._todo.append(("last", self._headers))
        self._todo.append(("end", b""))


def goaway(machine: Machine, last: int) -> None:
    """Say goodbye, and go on with the streams that there are, which h2 does not do by itself."""
    state = machine.state_machine.state
    machine.close_connection(last_stream_id=last)
    machine.state_machine.state = state


@asynccontextmanager
async def http2_upstream(
    *plays: Play, tls: ssl.SSLContext, settings: dict[h2.settings.SettingCodes, int] | None = None
) -> AsyncIterator[ScriptedHttp2]:
    """Serve plays over TLS and HTTP/2 on a free loopback port."""
    tls.set_alpn_protocols(["h2"])
    scripted = ScriptedHttp2(plays, settings or {})
    server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0, ssl=tls)
    scripted.address = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield scripted
    finally:
        server.close()
        await scripted.close()
