"""What every transport does, over every kind of socket."""

import asyncio
import gc
import random
import socket
from collections.abc import AsyncIterator
from types import AsyncGeneratorType

import pytest

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
from proxy.transport import Headers, Timeouts, Transport
from proxy.transport.local import Limits, LocalTransport
from tests.fakes.scripted_upstream import Step, chunked, eventually, ok
from tests.transport.conftest import BODY_LIMIT, PATIENT, Wire, body_of, get

HASTY = Timeouts(connect=0.03, first_byte=0.03, between_bytes=0.03)
EVENTS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
PIECE = 64 * 1024

# Answers


def test_an_answer_has_its_status_headers_and_body(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([ok(b'{"a":1}', b"Content-Type: application/json", status=b"429 Slow down")]) as (_, to):
            answer = await get(to)
            assert answer.status == 429
            assert (b"content-type", b"application/json") in answer.headers
            assert await answer.read(BODY_LIMIT) == b'{"a":1}'

    wire.run(story())


def test_a_chunked_body_is_what_its_chunks_hold(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([EVENTS, chunked(b"one", b" two", b" three")]) as (_, to):
            assert await body_of(to) == b"one two three"

    wire.run(story())


def test_bytes_arrive_while_the_answer_is_still_being_made(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([EVENTS + b"3\r\none\r\n", Step.STALL, b"3\r\ntwo\r\n0\r\n\r\n"]) as (upstream, to):
            answer = await get(to)
            assert await anext(answer) == b"one"
            upstream.release()
            assert [chunk async for chunk in answer] == [b"two"]

    wire.run(story())


def test_it_is_idle_until_it_is_asked_and_when_the_answer_is_over(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([EVENTS + b"3\r\none\r\n", Step.STALL, b"0\r\n\r\n"], [Step.CLOSE]) as (upstream, to):
            assert to.is_idle
            answer = await get(to)
            assert not to.is_idle
            upstream.release()
            await answer.read(BODY_LIMIT)
            await answer.close()
            assert to.is_idle
            with pytest.raises(UpstreamError):
                await get(to)
            assert to.is_idle

    wire.run(story())


def test_a_body_without_length_ends_with_its_connection(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([b"HTTP/1.1 200 OK\r\n\r\nall", b" of it", Step.CLOSE]) as (_, to):
            assert await body_of(to) == b"all of it"

    wire.run(story())


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_an_answer_that_can_have_no_body_ends_with_its_head(wire: Wire, status: bytes) -> None:
    async def story() -> None:
        async with wire.to([b"HTTP/1.1 " + status + b"\r\netag: x\r\n\r\n"], [ok(b"next")]) as (upstream, to):
            assert await body_of(to) == b""
            assert await body_of(to) == b"next"
            assert upstream.connections == 1

    wire.run(story())


def test_the_answer_to_head_has_a_length_and_no_body(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"], [ok(b"next")]) as (upstream, to):
            answer = await to.send(b"HEAD", b"/", [], b"", PATIENT)
            assert (b"content-length", b"5") in answer.headers
            assert await answer.read(BODY_LIMIT) == b""
            await answer.close()
            assert await body_of(to) == b"next"
            assert upstream.connections == 1

    wire.run(story())


def test_interim_answers_are_skipped(wire: Wire) -> None:
    async def story() -> None:
        interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
        async with wire.to([interim, ok(b"final")]) as (_, to):
            answer = await get(to)
            assert answer.status == 200
            assert b"link" not in dict(answer.headers)
            assert await answer.read(BODY_LIMIT) == b"final"

    wire.run(story())


def test_trailers_end_a_body_and_do_not_become_headers(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([EVENTS, b"1\r\na\r\n0\r\nx-digest: 1\r\n\r\n"], [ok(b"next")]) as (upstream, to):
            answer = await get(to)
            assert await answer.read(BODY_LIMIT) == b"a"
            assert b"x-digest" not in dict(answer.headers)
            await answer.close()
            assert await body_of(to) == b"next"
            assert upstream.connections == 1

    wire.run(story())


def test_hop_by_hop_headers_of_an_answer_are_dropped(http1_wire: Wire) -> None:
    async def story() -> None:
        hops = (b"Connection: keep-alive, X-Hop", b"X-Hop: 1", b"Keep-Alive: timeout=5", b"Upgrade: h2c")
        async with http1_wire.to([ok(b"", *hops, b"Proxy-Authenticate: Basic", b"X-End: 2")]) as (_, to):
            answer = await get(to)
            await answer.close()
            assert answer.headers == [(b"content-length", b"0"), (b"x-end", b"2")]

    http1_wire.run(story())


def test_space_around_the_value_of_a_header_is_not_part_of_it(http1_wire: Wire) -> None:
    async def story() -> None:
        async with http1_wire.to([ok(b"", b"x-padded: \t a b \t ", b"x-empty:")]) as (_, to):
            answer = await get(to)
            assert answer.headers[1:] == [(b"x-padded", b"a b"), (b"x-empty", b"")]
            await answer.close()

    http1_wire.run(story())


def test_connection_cannot_hide_the_length_of_an_answer(http1_wire: Wire) -> None:
    async def story() -> None:
        async with http1_wire.to([ok(b"abc", b"Connection: content-length")]) as (_, to):
            answer = await get(to)
            assert await answer.read(BODY_LIMIT) == b"abc"
            assert (b"content-length", b"3") in answer.headers

    http1_wire.run(story())


def test_a_redirect_is_an_answer_and_is_not_followed(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([ok(b"", b"location: /elsewhere", status=b"302 Found")]) as (upstream, to):
            assert (await get(to)).status == 302
            assert len(upstream.requests) == 1

    wire.run(story())


def test_a_body_larger_than_the_reader_allows_is_refused(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([EVENTS, b"6\r\nabcdef\r\n", Step.STALL]) as (upstream, to):
            with pytest.raises(MalformedAnswer):
                await (await get(to)).read(5)
            await eventually(lambda: upstream.open == 0)

    wire.run(story())


# Requests


def test_a_request_arrives_with_one_length_and_without_hop_by_hop_headers(wire: Wire) -> None:
    async def story() -> None:
        headers: Headers = [
            (b"Content-Type", b"application/json"),
            (b"Content-Length", b"999"),
            (b"Host", b"elsewhere"),
            (b"Connection", b"close, X-Hop"),
            (b"X-Hop", b"1"),
            (b"Transfer-Encoding", b"chunked"),
            (b"TE", b"trailers"),
            (b"Proxy-Authorization", b"secret"),
            (b"X-End", b"2"),
        ]
        async with wire.to([ok()]) as (upstream, to):
            await (await to.send(b"POST", b"/v1/x?y=%20z", headers, b"{}", PATIENT)).close()
            (received,) = upstream.requests
            assert (received.method, received.target, received.body) == (b"POST", b"/v1/x?y=%20z", b"{}")
            assert received.values(b"content-length") == [b"2"]
            assert received.values(b"host") not in ([], [b"elsewhere"])
            assert received.values(b"x-end") == [b"2"]
            assert received.values(b"content-type") == [b"application/json"]
            gone = (b"x-hop", b"transfer-encoding", b"te", b"proxy-authorization")
            assert not [name for name in gone if received.values(name)]
            assert received.values(b"connection") != [b"close, X-Hop"]

    wire.run(story())


def test_a_body_of_unknown_length_arrives_whole(wire: Wire) -> None:
    async def story() -> None:
        async def body() -> AsyncIterator[bytes]:
            for piece in (b"a" * 300_000, b"", b"b"):
                yield piece

        async with wire.to([ok(b"thanks")]) as (upstream, to):
            answer = await to.send(b"POST", b"/", [], body(), PATIENT)
            assert await answer.read(BODY_LIMIT) == b"thanks"
            assert upstream.requests[0].body == b"a" * 300_000 + b"b"
            assert upstream.requests[0].values(b"content-length") == []

    wire.run(story())


def test_an_upload_that_breaks_off_ends_the_request(wire: Wire) -> None:
    class ClientGone(Exception):
        pass

    async def body() -> AsyncIterator[bytes]:
        yield b"half"
        raise ClientGone

    async def story() -> None:
        async with wire.to([ok()]) as (upstream, to):
            with pytest.raises(ClientGone):
                await to.send(b"POST", b"/", [], body(), PATIENT)
            await eventually(lambda: upstream.open == 0)
            assert upstream.requests == []

    wire.run(story())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x", b"a\r\nx-injected: 1"),
        (b"x", b"a\nb"),
        (b"x", b"a\0b"),
        (b"x\r\ny", b"a"),
        (b"x:", b"a"),
        (b"transfer-encoding ", b"chunked"),
        (b"", b"a"),
    ],
)
def test_a_header_that_could_smuggle_is_not_sent(wire: Wire, name: bytes, value: bytes) -> None:
    async def story() -> None:
        async with wire.to([ok()]) as (upstream, to):
            with pytest.raises(InvalidRequest):
                await to.send(b"GET", b"/", [(name, value)], b"", PATIENT)
            assert upstream.connections == 0

    wire.run(story())


@pytest.mark.parametrize("path", [b"/a b", b"/a\r\nb", b"/\0", b"", b"http://elsewhere/"])
def test_a_path_that_could_smuggle_is_not_sent(wire: Wire, path: bytes) -> None:
    async def story() -> None:
        async with wire.to([ok()]) as (upstream, to):
            with pytest.raises(InvalidRequest):
                await to.send(b"GET", path, [], b"", PATIENT)
            assert upstream.connections == 0

    wire.run(story())


# Connections that serve again, and those that must not


def test_a_connection_serves_one_request_after_another(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([ok(b"1")], [EVENTS, chunked(b"2")], [ok(b"3")]) as (upstream, to):
            assert [await body_of(to) for _ in range(3)] == [b"1", b"2", b"3"]
            assert upstream.connections == 1

    wire.run(story())


@pytest.mark.parametrize("answer", [ok(b"1", b"Connection: close"), ok(b"1").replace(b"HTTP/1.1", b"HTTP/1.0")])
def test_a_connection_that_the_answer_ends_is_not_used_again(wire: Wire, answer: bytes) -> None:
    async def story() -> None:
        async with wire.to([answer], [ok(b"2")]) as (upstream, to):
            assert [await body_of(to), await body_of(to)] == [b"1", b"2"]
            assert upstream.connections == 2

    wire.run(story())


def test_an_idle_connection_that_the_upstream_closed_is_replaced(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([ok(b"1"), Step.CLOSE], [ok(b"2")]) as (upstream, to):
            assert await body_of(to) == b"1"
            await eventually(lambda: upstream.open == 0)
            assert await body_of(to) == b"2"

    wire.run(story())


def test_a_request_is_not_sent_again_once_a_byte_of_its_answer_came(http1_wire: Wire) -> None:
    async def story() -> None:
        async with http1_wire.to([ok(b"1")], [b"H", Step.CLOSE], [ok(b"3")]) as (upstream, to):
            assert await body_of(to) == b"1"
            with pytest.raises(TruncatedAnswer):
                await body_of(to)
            assert len(upstream.requests) == 2

    http1_wire.run(story())


def test_a_request_on_a_new_connection_is_not_sent_again(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([Step.CLOSE], [ok(b"2")]) as (upstream, to):
            with pytest.raises(TruncatedAnswer):
                await body_of(to)
            assert len(upstream.requests) == 1

    wire.run(story())


# Answers that are not


MALFORMED = {
    "length and chunks": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n"
    + chunked(b"abc"),
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
    "a signed length": b"HTTP/1.1 200 OK\r\ncontent-length: +3\r\n\r\nabc",
    "a negative length": b"HTTP/1.1 200 OK\r\ncontent-length: -3\r\n\r\nabc",
    "an unknown coding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n" + chunked(b"abc"),
    "chunks twice": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, chunked\r\n\r\n" + chunked(b"abc"),
    "a chunk size that is no number": EVENTS + b"zz\r\nabc\r\n0\r\n\r\n",
    "a chunk size in C": EVENTS + b"0x3\r\nabc\r\n0\r\n\r\n",
    "a chunk longer than its size": EVENTS + b"3\r\nabcd\r\n0\r\n\r\n",
    "no HTTP": b"SSH-2.0-OpenSSH\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\ncontent-length: 3\r\n\r\nabc",
    "a status out of range": b"HTTP/1.1 600 OK\r\ncontent-length: 3\r\n\r\nabc",
    "a protocol that nobody asked for": b"HTTP/1.1 101 Go\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "NUL in a header": b"HTTP/1.1 200 OK\r\nx: a\0b\r\ncontent-length: 3\r\n\r\nabc",
    "a bare CR in a header": b"HTTP/1.1 200 OK\r\nx: a\rset-cookie: b\r\ncontent-length: 3\r\n\r\nabc",
    "a space before the colon": b"HTTP/1.1 200 OK\r\ncontent-length : 3\r\n\r\nabc",
    "a header without a name": b"HTTP/1.1 200 OK\r\n: x\r\ncontent-length: 3\r\n\r\nabc",
    "a folded header after an interim answer": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nx: a\r\n\tb\r\n\r\n",
    "a header without a colon": b"HTTP/1.1 200 OK\r\nabc\r\ncontent-length: 3\r\n\r\nabc",
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"x: %b\r\n" % (b"y" * 1000) * 200,
}


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_answer_is_an_error_and_ends_its_connection(http1_wire: Wire, answer: bytes) -> None:
    async def story() -> None:
        async with http1_wire.to([answer, Step.STALL], [ok(b"next")]) as (upstream, to):
            with pytest.raises(MalformedAnswer):
                await body_of(to)
            await eventually(lambda: upstream.open == 0)
            assert await body_of(to) == b"next"
            assert upstream.connections == 2

    http1_wire.run(story())


TRUNCATED = {
    "before its first byte": [Step.CLOSE],
    "in its head": [b"HTTP/1.1 200 OK\r\ncontent-le", Step.CLOSE],
    "before its length": [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc", Step.CLOSE],
    "in a chunk": [EVENTS + b"5\r\nabc", Step.CLOSE],
    "between chunks": [EVENTS + b"3\r\nabc\r\n", Step.CLOSE],
    "in the last chunk": [EVENTS + b"3\r\nabc\r\n0\r\n", Step.CLOSE],
    "by a reset": [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc", Step.RESET],
}


@pytest.mark.parametrize("play", TRUNCATED.values(), ids=TRUNCATED)
def test_an_answer_that_ends_early_is_never_taken_for_a_complete_one(wire: Wire, play: list[bytes | Step]) -> None:
    async def story() -> None:
        async with wire.to(play) as (_, to):
            with pytest.raises(TruncatedAnswer):
                await body_of(to)

    wire.run(story())


def test_what_came_before_an_answer_broke_is_given_first(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([EVENTS + b"3\r\nabc\r\n", Step.STALL, Step.CLOSE]) as (upstream, to):
            answer = await get(to)
            assert await anext(answer) == b"abc"
            upstream.release()
            with pytest.raises(TruncatedAnswer):
                await anext(answer)

    wire.run(story())


# Time


def test_an_upstream_that_does_not_answer_is_given_up(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([Step.STALL]) as (upstream, to):
            with pytest.raises(FirstByteTimeout):
                await get(to, Timeouts(connect=None, first_byte=0.03, between_bytes=None))
            await eventually(lambda: upstream.open == 0)

    wire.run(story())


def test_an_answer_that_stands_still_is_given_up(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([EVENTS + b"3\r\nabc\r\n", Step.STALL]) as (upstream, to):
            answer = await get(to, Timeouts(connect=None, first_byte=None, between_bytes=0.03))
            assert await anext(answer) == b"abc"
            with pytest.raises(BetweenBytesTimeout):
                await anext(answer)
            await eventually(lambda: upstream.open == 0)

    wire.run(story())


def test_an_answer_may_take_longer_than_its_first_byte(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([EVENTS + b"3\r\nabc\r\n", Step.STALL, b"0\r\n\r\n"]) as (upstream, to):
            late = asyncio.Event()
            asyncio.get_running_loop().call_later(0.4, late.set)
            answer = await get(to, Timeouts(connect=None, first_byte=0.3, between_bytes=None))
            reading = asyncio.create_task(answer.read(BODY_LIMIT))
            await late.wait()
            upstream.release()
            assert await reading == b"abc"

    wire.run(story())


def test_a_listener_that_does_not_accept_is_given_up(wire: Wire) -> None:
    async def story() -> None:
        with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for queued in (first, second):
                queued.setblocking(False)
                queued.connect_ex(listener.getsockname())
            to = wire.transport(f"http://127.0.0.1:{listener.getsockname()[1]}")
            with pytest.raises(ConnectTimeout):
                await get(to, HASTY)
            await to.close()

    wire.run(story())


def test_nobody_listening_is_an_error_at_once(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([ok()]) as (upstream, _):
            address = upstream.address
        to = wire.transport(address)
        with pytest.raises(ConnectFailed):
            await get(to)
        await to.close()

    wire.run(story())


def test_a_request_that_gets_no_connection_in_time_fails_as_not_sent(http1_wire: Wire) -> None:
    async def story() -> None:
        async with http1_wire.to([EVENTS, Step.STALL], connections=1) as (upstream, to):
            busy = await get(to)
            with pytest.raises(PoolTimeout):
                await get(to, HASTY)
            await busy.close()
            assert len(upstream.requests) == 1

    http1_wire.run(story())


@pytest.mark.parametrize("whole", [True, False], ids=["complete", "abandoned"])
def test_a_request_waits_for_the_connection_of_another(http1_wire: Wire, whole: bool) -> None:
    async def story() -> None:
        async with http1_wire.to([EVENTS, Step.STALL, chunked(b"1")], [ok(b"2")], connections=1) as (upstream, to):
            busy = await get(to)
            second = asyncio.create_task(body_of(to))
            await asyncio.sleep(0)
            if whole:
                upstream.release()
                assert await busy.read(BODY_LIMIT) == b"1"
            await busy.close()
            assert await second == b"2"

    http1_wire.run(story())


# Errors


def test_errors_name_no_address(http1_wire: Wire) -> None:
    async def story() -> None:
        async with http1_wire.to([Step.CLOSE], [b"nonsense\r\n\r\n"]) as (upstream, to):
            errors: list[UpstreamError] = []
            for _ in range(2):
                with pytest.raises(UpstreamError) as caught:
                    await body_of(to)
                errors.append(caught.value)
            bare = upstream.address.rpartition("://")[2].removeprefix("unix:")
        with pytest.raises(ConnectFailed) as refused:
            await body_of(http1_wire.transport(upstream.address))
        errors.append(refused.value)
        assert not [error for error in errors if bare in str(error)]
        assert [error.address for error in errors] == [upstream.address] * 3

    http1_wire.run(story())


# Going away


def test_a_caller_that_goes_while_waiting_for_the_answer_ends_the_exchange(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([Step.STALL]) as (upstream, to):
            sending = asyncio.create_task(get(to))
            await eventually(lambda: len(upstream.requests) == 1)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await eventually(lambda: upstream.open == 0)
            assert sending.cancelled()

    wire.run(story())


def test_a_caller_that_goes_while_reading_ends_the_exchange(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([EVENTS + b"3\r\nabc\r\n", Step.STALL]) as (upstream, to):
            answer = await get(to)
            reading = asyncio.create_task(answer.read(BODY_LIMIT))
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await eventually(lambda: upstream.open == 0)
            assert reading.cancelled()

    wire.run(story())


def test_an_answer_given_up_ends_its_connection_and_cannot_be_read_on(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([EVENTS + b"3\r\nabc\r\n", Step.STALL]) as (upstream, to):
            answer = await get(to)
            answer.abort()
            answer.abort()
            await answer.close()
            await eventually(lambda: upstream.open == 0)
            with pytest.raises(TruncatedAnswer):
                await anext(answer)

    wire.run(story())


def test_closing_after_the_end_keeps_the_connection(wire: Wire) -> None:
    async def story() -> None:
        async with wire.to([ok(b"1")], [ok(b"2")]) as (upstream, to):
            answer = await get(to)
            assert await answer.read(BODY_LIMIT) == b"1"
            await answer.close()
            answer.abort()
            assert await body_of(to) == b"2"
            assert upstream.connections == 1

    wire.run(story())


def test_a_caller_that_goes_while_waiting_for_a_connection_leaves_its_place(http1_wire: Wire) -> None:
    async def story() -> None:
        async with http1_wire.to([EVENTS, Step.STALL, chunked(b"1")], [ok(b"2")], connections=1) as (upstream, to):
            busy = await get(to)
            waiting = asyncio.create_task(get(to))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            upstream.release()
            assert await busy.read(BODY_LIMIT) == b"1"
            await busy.close()
            assert await body_of(to) == b"2"

    http1_wire.run(story())


def test_a_slow_reader_stops_the_upstream(wire: Wire) -> None:
    async def story() -> None:
        pieces = 512
        play = [b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (pieces * PIECE), *[bytes(PIECE)] * pieces]
        async with wire.to(play) as (upstream, to):
            answer = await get(to)
            taken = len(await anext(answer))
            before = -1
            while before != upstream.sent:
                before = upstream.sent
                await asyncio.sleep(0.02)
            assert before < pieces * PIECE / 2
            assert taken + len(await answer.read(BODY_LIMIT)) == pieces * PIECE

    wire.run(story())


def test_a_thousand_abandoned_exchanges_leave_nothing(wire: Wire) -> None:
    wire.run(abandon(wire, 1000))


@pytest.mark.parametrize("wire", ["local-tcp-uvloop", "cloud-http2"], indirect=True)
def test_ten_thousand_abandoned_exchanges_leave_nothing(wire: Wire) -> None:
    wire.run(abandon(wire, 10_000), seconds=120)


async def abandon(wire: Wire, exchanges: int) -> None:
    """Give up so many exchanges at random points, and check that nothing of them is left."""

    async def abandon_some(to: Transport, chance: random.Random) -> None:
        some = [asyncio.create_task(body_of(to)) for _ in range(20)]
        for exchange in chance.sample(some, len(some)):
            for _ in range(chance.randrange(20)):
                await asyncio.sleep(0)
            exchange.cancel()
        await asyncio.gather(*some, return_exceptions=True)

    chance = random.Random(7)
    events = EVENTS + b"1\r\na\r\n"
    plays = [[ok(b"x")], [events, Step.STALL], [Step.STALL], [events, chunked(b"a", b"b"), Step.CLOSE]]
    async with wire.to(*chance.choices(plays, k=exchanges), connections=8) as (upstream, to):
        tasks, generators = len(asyncio.all_tasks()), open_generators()
        for _ in range(exchanges // 20):
            await abandon_some(to, chance)
        upstream.plays = [[ok(b"done")]]
        assert await asyncio.gather(*[body_of(to) for _ in range(16)]) == [b"done"] * 16
        await to.close()
        await eventually(lambda: upstream.open == 0)
        await eventually(lambda: len(asyncio.all_tasks()) <= tasks)
        assert open_generators() <= generators
        if wire.local:
            assert repr(to).endswith("0 open, 0 idle, 8 free, 0 waiting>")


def open_generators() -> int:
    """Return how many asynchronous generators stand in the middle."""
    gc.collect()
    return sum(isinstance(thing, AsyncGeneratorType) and thing.ag_frame is not None for thing in gc.get_objects())


# Requests that are sent again


def test_a_request_is_sent_again_once_when_its_idle_connection_had_died(http1_wire: Wire) -> None:
    async def story() -> None:
        async with http1_wire.to([ok(b"1")], [Step.CLOSE], [ok(b"3")]) as (upstream, to):
            assert [await body_of(to), await body_of(to)] == [b"1", b"3"]
            assert [request.connection for request in upstream.requests] == [1, 1, 2]

    http1_wire.run(story())


def test_a_request_is_sent_again_only_once(http1_wire: Wire) -> None:
    async def story() -> None:
        async with http1_wire.to([ok(b"1")], [Step.CLOSE]) as (upstream, to):
            assert await body_of(to) == b"1"
            with pytest.raises(TruncatedAnswer):
                await body_of(to)
            assert len(upstream.requests) == 3

    http1_wire.run(story())


def test_an_upload_is_not_sent_again(http1_wire: Wire) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x"

    async def story() -> None:
        async with http1_wire.to([ok(b"1")], [Step.CLOSE], [ok(b"3")]) as (upstream, to):
            assert await body_of(to) == b"1"
            with pytest.raises(TruncatedAnswer):
                await to.send(b"POST", b"/", [], body(), PATIENT)
            assert len(upstream.requests) == 2

    http1_wire.run(story())


@pytest.mark.parametrize("extra", [b"x", ok(b"forged")], ids=["noise", "answer"])
def test_a_connection_with_bytes_after_the_end_of_an_answer_is_not_used_again(http1_wire: Wire, extra: bytes) -> None:
    async def story() -> None:
        async with http1_wire.to([ok(b"1") + extra], [ok(b"2")]) as (upstream, to):
            assert [await body_of(to), await body_of(to)] == [b"1", b"2"]
            assert upstream.connections == 2

    http1_wire.run(story())


def test_a_body_after_the_answer_to_head_ends_its_connection(http1_wire: Wire) -> None:
    async def story() -> None:
        async with http1_wire.to([ok(b"body")], [ok(b"2")]) as (upstream, to):
            answer = await to.send(b"HEAD", b"/", [], b"", PATIENT)
            assert await answer.read(BODY_LIMIT) == b""
            assert await body_of(to) == b"2"
            assert upstream.connections == 2

    http1_wire.run(story())


@pytest.mark.parametrize("codings", [b"x: a\r\n b", b"transfer-encoding:\r\n chunked"], ids=["value", "framing"])
def test_a_folded_header_is_malformed(http1_wire: Wire, codings: bytes) -> None:
    async def story() -> None:
        async with http1_wire.to([b"HTTP/1.1 200 OK\r\n" + codings + b"\r\n\r\n" + chunked(b"a")]) as (_, to):
            with pytest.raises(MalformedAnswer):
                await body_of(to)

    http1_wire.run(story())


# The local pool


def test_an_early_answer_is_given_while_the_upload_waits(local_wire: Wire) -> None:
    async def story() -> None:
        never = asyncio.Event()

        async def body() -> AsyncIterator[bytes]:
            yield b"x"
            await never.wait()

        play = [ok(b"too large", status=b"413 Too Large"), Step.STALL]
        async with local_wire.to(play, read_requests=False) as (upstream, to):
            tasks = len(asyncio.all_tasks())
            answer = await to.send(b"POST", b"/", [], body(), PATIENT)
            assert (answer.status, await answer.read(BODY_LIMIT)) == (413, b"too large")
            await eventually(lambda: upstream.open == 0)
            await eventually(lambda: len(asyncio.all_tasks()) <= tasks)

    local_wire.run(story())


def test_an_idle_connection_is_closed_after_a_while(local_wire: Wire) -> None:
    async def story() -> None:
        async with local_wire.to([ok(b"1")]) as (upstream, _):
            to = LocalTransport(upstream.address, Limits(idle_timeout=0.03))
            assert await body_of(to) == b"1"
            await eventually(lambda: upstream.connections == 1 and upstream.open == 0)
            assert "0 open, 0 idle" in repr(to)

    local_wire.run(story())


def test_no_more_connections_than_the_limit_are_kept_idle(local_wire: Wire) -> None:
    async def story() -> None:
        async with local_wire.to([Step.STALL, ok(b"1")]) as (upstream, _):
            to = LocalTransport(upstream.address, Limits(max_idle=2))
            all_of_them = asyncio.gather(*[body_of(to) for _ in range(5)])
            await eventually(lambda: len(upstream.requests) == 5)
            upstream.release()
            await all_of_them
            await eventually(lambda: upstream.open == 2)
            assert "2 open, 2 idle" in repr(to)
            await to.close()

    local_wire.run(story())


def test_closing_the_transport_ends_what_is_under_way(local_wire: Wire) -> None:
    async def story() -> None:
        async with local_wire.to([EVENTS, Step.STALL], connections=1) as (upstream, to):
            answer = await get(to)
            waiting = asyncio.create_task(get(to))
            reading = asyncio.create_task(answer.read(BODY_LIMIT))
            await asyncio.sleep(0)
            await to.close()
            results = await asyncio.gather(waiting, reading, get(to), return_exceptions=True)
            assert [type(result) for result in results] == [ConnectFailed, TruncatedAnswer, ConnectFailed]
            await eventually(lambda: upstream.open == 0)

    local_wire.run(story())


@pytest.mark.parametrize("address", ["https://x", "ftp://x", "/run/x.sock", "http://"])
def test_an_address_of_another_kind_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="expected unix:/path or http://host:port"):
        LocalTransport(address)
