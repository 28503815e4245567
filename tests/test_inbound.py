"""The HTTP/1.1 server side: raw bytes from a client, a small ASGI application behind it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.config import Server
from proxy.inbound import protocol, sweep_for_ever
from proxy.inbound.heads import split_target

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PLAIN = [(b"content-type", b"text/plain")]


class Site:
    """A listening socket with an application, and a record of what the application saw."""

    def __init__(self, application: Any) -> None:
        self.config = SimpleNamespace(loaded_app=application, asgi_version="3.0", root_path="")
        self.state = SimpleNamespace(connections=set(), tasks=set(), default_headers=[], total_requests=0)
        self.port = 0

    async def connect(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def exchange(self, request: bytes) -> bytes:
        """Send bytes and return all that comes until the connection ends."""
        reader, writer = await self.connect()
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return answer


@asynccontextmanager
async def site(application: Any, **limits: Any) -> AsyncIterator[Site]:
    made = Site(application)
    server = Server(**limits)
    loop = asyncio.get_running_loop()
    kind = protocol(server)
    listening = await loop.create_server(lambda: kind(made.config, made.state, {}), "127.0.0.1", 0)
    made.port = listening.sockets[0].getsockname()[1]
    sweeping = asyncio.create_task(sweep_for_ever(made.state.connections, server))
    try:
        yield made
    finally:
        sweeping.cancel()
        listening.close()
        for connection in list(made.state.connections):
            connection.shutdown()


def run(test: Callable[[], Awaitable[None]]) -> None:
    uvloop.run(test())


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the method, the path and the body."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    text = f"{scope['method']} {scope['path']} ".encode() + body
    length = (b"content-length", str(len(text)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [*PLAIN, length]})
    await send({"type": "http.response.body", "body": text, "more_body": False})


async def streaming(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": PLAIN})
    for part in (b"one", b"two"):
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


CLOSE = b"connection: close\r\n"


def test_a_request_is_answered_and_a_connection_that_shall_close_closes():
    async def test() -> None:
        async with site(echo) as s:
            answer = await s.exchange(b"POST /a%20b?c HTTP/1.1\r\nhost: x\r\n" + CLOSE + b"content-length: 2\r\n\r\nhi")
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert answer.endswith(b"connection: close\r\n\r\nPOST /a b hi")

    run(test)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_request_may_come_in_any_pieces(cut: int):
    request = (
        b"POST /x HTTP/1.1\r\nhost: x\r\n"
        + CLOSE
        + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )

    async def test() -> None:
        async with site(echo) as s:
            reader, writer = await s.connect()
            for start in range(0, len(request), cut):
                writer.write(request[start : start + cut])
                await asyncio.sleep(0)
            assert (await reader.read()).endswith(b"POST /x abcde")
            writer.close()

    run(test)


def test_pipelined_requests_are_answered_in_order():
    async def test() -> None:
        async with site(echo) as s:
            first = b"POST /1 HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\na"
            second = b"GET /2 HTTP/1.1\r\nhost: x\r\n\r\n"
            answer = await s.exchange(first + second + b"GET /3 HTTP/1.1\r\nhost: x\r\n" + CLOSE + b"\r\n")
            assert [answer.find(b"POST /1 a") > 0, answer.find(b"GET /2 ") > answer.find(b"POST /1 a")] == [True] * 2
            assert answer.endswith(b"GET /3 ")
            assert s.state.total_requests == 3

    run(test)


def test_an_answer_without_a_length_is_chunked_and_for_old_clients_ends_with_the_connection():
    async def test() -> None:
        async with site(streaming) as s:
            answer = await s.exchange(b"GET / HTTP/1.1\r\nhost: x\r\n" + CLOSE + b"\r\n")
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"transfer-encoding: chunked" in head
            assert body == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
            old = await s.exchange(b"GET / HTTP/1.0\r\n\r\n")
            assert b"chunked" not in old
            assert old.endswith(b"\r\n\r\nonetwo")

    run(test)


def test_the_head_of_a_stream_does_not_wait_for_its_body():
    async def test() -> None:
        go_on = asyncio.Event()

        async def hesitant(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": PLAIN})
            await go_on.wait()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async with site(hesitant) as s:
            reader, writer = await s.connect()
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            go_on.set()
            assert await reader.readuntil(b"0\r\n\r\n") == b"0\r\n\r\n"
            writer.close()

    run(test)


def test_when_the_client_goes_what_works_for_it_is_cancelled():
    async def test() -> None:
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def endless(scope: Any, receive: Any, send: Any) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with site(endless) as s:
            _, writer = await s.connect()
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await begun.wait()
            writer.transport.abort()
            await asyncio.wait_for(cancelled.wait(), 60)
        assert not s.state.connections

    run(test)


def test_what_a_client_does_not_read_is_not_produced():
    async def test() -> None:
        sent = 0

        async def torrent(scope: Any, receive: Any, send: Any) -> None:
            nonlocal sent
            await send({"type": "http.response.start", "status": 200, "headers": PLAIN})
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                sent += 65536

        async with site(torrent) as s:
            _, writer = await s.connect()
            writer.transport.pause_reading()
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            seen = -1
            while sent != seen or not sent:
                seen = sent
                for _ in range(200):
                    await asyncio.sleep(0)
            assert sent < 32 * 2**20
            writer.transport.abort()

    run(test)


def test_a_client_that_takes_nothing_of_its_answer_is_given_up():
    async def test() -> None:
        cancelled = asyncio.Event()

        async def torrent(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": PLAIN})
            try:
                while True:
                    await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            finally:
                cancelled.set()

        async with site(torrent, send_timeout=0.2) as s:
            _, writer = await s.connect()
            writer.transport.pause_reading()
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.wait_for(cancelled.wait(), 60)
            writer.transport.abort()
        assert not s.state.connections

    run(test)


def test_an_application_that_fails_is_answered_for_and_one_that_stops_early_is_cut_off():
    async def test() -> None:
        async def fails(scope: Any, receive: Any, send: Any) -> None:
            raise ZeroDivisionError

        async def stops(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"content-length", b"10")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"short", "more_body": True})

        async with site(fails) as s:
            assert b" 500 " in await s.exchange(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        async with site(stops) as s:
            assert (await s.exchange(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")).endswith(b"\r\n\r\nshort")

    run(test)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    ],
)
def test_what_is_not_http_or_can_be_read_in_two_ways_is_refused_and_the_connection_ends(request_bytes: bytes):
    async def test() -> None:
        async with site(echo) as s:
            answer = await s.exchange(request_bytes + b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
            assert b"smuggled" not in answer

    run(test)


def test_a_header_with_a_line_break_is_never_sent():
    async def test() -> None:
        async def splits(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"content-length", b"0"), (b"a", b"b\r\nset-cookie: c")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})

        async with site(splits) as s:
            answer = await s.exchange(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b" 500 " in answer
            assert b"set-cookie" not in answer

    run(test)


def test_an_idle_connection_ends():
    async def test() -> None:
        async with site(echo, head_timeout=0.5) as s:
            reader, writer = await s.connect()
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await asyncio.wait_for(reader.read(), 60)).endswith(b"GET / ")
            writer.close()

    run(test)


def test_the_path_of_a_target_has_its_escapes_resolved():
    assert split_target(b"/v1/models/a%2Fb?x=1") == (b"/v1/models/a%2Fb", "/v1/models/a/b", b"x=1")


@pytest.mark.parametrize("expectation", [b"100-continue", b"100-Continue"])
def test_a_client_that_waits_to_be_told_to_go_on_is_told(expectation: bytes):
    async def test() -> None:
        async with site(echo) as s:
            reader, writer = await s.connect()
            head = b"POST / HTTP/1.1\r\nhost: x\r\nexpect: %b\r\ncontent-length: 2\r\n\r\n"
            writer.write(head % expectation)
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"hi")
            assert b"POST / hi" in await reader.readuntil(b"hi")
            writer.close()

    run(test)


# What a request may not be, and what does not suffer from it


def test_a_request_that_came_whole_is_answered_though_what_follows_it_is_not_http():
    async def test() -> None:
        async with site(echo) as s:
            answer = await s.exchange(b"GET /1 HTTP/1.1\r\nhost: x\r\n\r\nnonsense\r\n\r\n")
            assert answer.endswith(b"connection: close\r\n\r\nGET /1 ")
            assert answer.count(b"HTTP/1.1 ") == 1

    run(test)


def test_when_a_body_breaks_what_works_on_it_is_cancelled_and_its_client_told():
    async def test() -> None:
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def endless(scope: Any, receive: Any, send: Any) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                await send({"type": "http.response.start", "status": 200, "headers": PLAIN})
                cancelled.set()

        async with site(endless) as s:
            reader, writer = await s.connect()
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            await begun.wait()
            writer.write(b"zz\r\n")
            answer = await asyncio.wait_for(reader.read(), 60)
            await asyncio.wait_for(cancelled.wait(), 60)
            writer.close()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"HTTP/1.1 ") == 1

    run(test)


def test_trailers_without_end_are_refused():
    async def test() -> None:
        async with site(echo) as s:
            head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            assert b" 431 " in await s.exchange(head + b"0\r\nx-a: " + b"y" * 1_000_000)

    run(test)


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
def test_an_answer_reaches_a_client_that_is_still_sending(connection: bytes):
    async def test() -> None:
        async def hasty(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"no", "more_body": False})

        async with site(hasty) as s:
            reader, writer = await s.connect()
            head = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: " + connection
            writer.write(head + b"\r\ncontent-length: 8000000\r\n\r\n")
            for _ in range(80):
                writer.write(b"x" * 100_000)
                await writer.drain()
            assert (await asyncio.wait_for(reader.readuntil(b"no"), 10)).startswith(b"HTTP/1.1 413 ")
            if connection == b"close":
                assert await asyncio.wait_for(reader.read(), 60) == b""
            writer.close()

    run(test)


PIECES = st.sampled_from(
    [b"GET / HTTP/1.1\r\n", b"POST /a?b HTTP/1.1\r\n", b"GET http://x HTTP/1.0\r\n",
     b"host: x\r\n", b"\r\n", b"\xff", b"0",
     b"content-length: 3\r\n", b"transfer-encoding: chunked\r\n", b"connection: upgrade\r\nupgrade: h2c\r\n",
     b"3\r\nabc\r\n",
     b"0\r\n\r\n", b"expect: 100-continue\r\n", b"abc", b"CONNECT x:1 HTTP/1.1\r\n", b"OPTIONS * HTTP/1.1\r\n", b":"]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(PIECES, st.binary(max_size=20)), max_size=12))
def test_whatever_bytes_come_every_answer_is_whole_and_the_server_goes_on(pieces: list[bytes]):
    async def test() -> None:
        async with site(echo) as s:
            reader, writer = await s.connect()
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0)
            answered = asyncio.ensure_future(reader.read())
            assert (await s.exchange(b"GET /next HTTP/1.1\r\nhost: x\r\n" + CLOSE + b"\r\n")).endswith(b"GET /next ")
            writer.write_eof()
            answer = await asyncio.wait_for(answered, 60)
            assert b" 500 " not in answer
            assert not answer or answer.startswith(b"HTTP/1.1 ")
            writer.close()

    run(test)
