"""What HTTP/2 adds: many streams on one connection, which must not harm one another."""

import asyncio
import itertools
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trustme
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.errors import BetweenBytesTimeout, MalformedAnswer, TruncatedAnswer, UpstreamError
from proxy.transport import Timeouts
from proxy.transport.cloud import CloudTransport
from proxy.transport.dialing import CloudLimits
from proxy.transport.frames import MAX_FRAME, Frames, last_served
from proxy.transport.http2 import MAX_STREAMS, STREAM_WINDOW
from tests.fakes.scripted_http2 import Act, Machine, Play, ScriptedHttp2, goaway, http2_upstream
from tests.fakes.scripted_upstream import DEADLINE, Step, chunked, eventually, ok
from tests.transport.conftest import BODY_LIMIT, PATIENT, body_of, get, server_tls

EVENTS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ENDLESS = [b"HTTP/1.1 200 OK\r\n\r\n", bytes(4 * STREAM_WINDOW), Step.STALL]
LIVELY = CloudLimits(ping_after=0.02)


@pytest.fixture
def tls(trusted: trustme.CA) -> ssl.SSLContext:
    return server_tls(trusted)


@asynccontextmanager
async def to(
    *plays: Play, tls: ssl.SSLContext, allows: dict[SettingCodes, int] | None = None, limits: CloudLimits | None = None
) -> AsyncIterator[tuple[ScriptedHttp2, CloudTransport]]:
    async with http2_upstream(*plays, tls=tls, settings=allows) as upstream:
        transport = CloudTransport(upstream.address, limits)
        try:
            yield upstream, transport
        finally:
            await transport.close()


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 2 * DEADLINE))


def reset(code: ErrorCodes) -> Act:
    return lambda machine, stream: machine.reset_stream(stream, code)


# Giving up


def test_a_stream_that_is_given_up_is_reset_and_its_connection_stays(tls: ssl.SSLContext) -> None:
    async def story() -> None:
        async with to([EVENTS + b"1\r\na\r\n", Step.STALL], [ok(b"next")], tls=tls) as (upstream, transport):
            answer = await get(transport)
            answer.abort()
            await eventually(lambda: upstream.resets == [(1, ErrorCodes.CANCEL)])
            assert await body_of(transport) == b"next"
            assert upstream.connections == 1

    run(story())


def test_a_request_that_is_given_up_before_its_answer_is_reset(tls: ssl.SSLContext) -> None:
    async def story() -> None:
        async with to([Step.STALL], [ok(b"next")], tls=tls) as (upstream, transport):
            sending = asyncio.create_task(get(transport))
            await eventually(lambda: len(upstream.requests) == 1)
            sending.cancel()
            await eventually(lambda: upstream.resets == [(1, ErrorCodes.CANCEL)])
            assert await body_of(transport) == b"next"
            assert upstream.connections == 1

    run(story())


def test_a_complete_answer_is_not_reset(tls: ssl.SSLContext) -> None:
    async def story() -> None:
        async with to([ok(b"1")], tls=tls) as (upstream, transport):
            assert [await body_of(transport), await body_of(transport)] == [b"1", b"1"]
            assert upstream.resets == []

    run(story())


@pytest.mark.parametrize("read_some", [True, False], ids=["read a little", "read nothing"])
def test_a_thousand_streams_given_up_with_full_windows_do_not_stall_the_connection(
    tls: ssl.SSLContext, read_some: bool
) -> None:
    async def give_up(transport: CloudTransport) -> None:
        answer = await get(transport)
        if read_some:
            await anext(answer)
        await answer.close()

    async def story() -> None:
        big = b"x" * (2 * STREAM_WINDOW)
        async with to(ENDLESS, tls=tls) as (upstream, transport):
            for _ in range(25):
                await asyncio.gather(*[give_up(transport) for _ in range(40)])
            upstream.plays = [[ok(big)]]
            assert await body_of(transport) == big
            assert upstream.connections == 1
            await eventually(lambda: len(upstream.resets) == 1000 and upstream.open == 0)

    run(story())


def test_an_answer_that_stands_still_ends_alone(tls: ssl.SSLContext) -> None:
    async def story() -> None:
        still, slow = [EVENTS + b"1\r\na\r\n", Step.STALL], [EVENTS, Step.STALL, chunked(b"whole")]
        async with to(still, slow, tls=tls) as (upstream, transport):
            late = await get(transport, Timeouts(connect=None, first_byte=None, between_bytes=0.03))
            neighbour = await get(transport)
            reading = asyncio.create_task(neighbour.read(BODY_LIMIT))
            assert await anext(late) == b"a"
            with pytest.raises(BetweenBytesTimeout):
                await anext(late)
            await eventually(lambda: upstream.resets == [(1, ErrorCodes.CANCEL)])
            upstream.release()
            assert await reading == b"whole"
            assert upstream.connections == 1

    run(story())


def test_a_slow_reader_does_not_stop_its_neighbours(tls: ssl.SSLContext) -> None:
    async def story() -> None:
        big = b"x" * (4 * STREAM_WINDOW)
        async with to(*[ENDLESS] * 50, [ok(big)], tls=tls) as (upstream, transport):
            unread = [await get(transport) for _ in range(50)]
            await eventually(lambda: upstream.sent >= 50 * STREAM_WINDOW)
            assert await body_of(transport) == big
            assert upstream.sent == 50 * STREAM_WINDOW + len(big)
            for answer in unread:
                await answer.close()

    run(story())


# The number of streams


def test_more_streams_than_the_upstream_allows_take_another_connection(tls: ssl.SSLContext) -> None:
    async def story() -> None:
        allows = {SettingCodes.MAX_CONCURRENT_STREAMS: 1}
        async with to([ok(b"0")], [EVENTS, Step.STALL], tls=tls, allows=allows) as (upstream, transport):
            assert await body_of(transport) == b"0"
            first, second = await get(transport), await get(transport)
            assert upstream.connections == 2
            await first.close()
            await second.close()

    run(story())


def test_a_hundred_streams_fill_a_connection(tls: ssl.SSLContext) -> None:
    async def story() -> None:
        async with to([EVENTS, Step.STALL], tls=tls) as (upstream, transport):
            answers = await asyncio.gather(*[get(transport) for _ in range(MAX_STREAMS + 1)])
            assert upstream.connections == 2
            for answer in answers:
                await answer.close()

    run(story())


# Goodbyes and refusals


def test_what_an_upstream_still_serves_after_its_goodbye_is_read_to_the_end(tls: ssl.SSLContext) -> None:
    async def story() -> None:
        leaving = [EVENTS + b"1\r\na\r\n", goaway, Step.STALL, b"1\r\nb\r\n0\r\n\r\n"]
        async with to(leaving, [ok(b"elsewhere")], tls=tls) as (upstream, transport):
            answer = await get(transport)
            assert await anext(answer) == b"a"
            await eventually(lambda: "leaving" in repr(transport._pool.connections))
            assert await body_of(transport) == b"elsewhere"
            upstream.release()
            assert await answer.read(BODY_LIMIT) == b"b"
            await answer.close()
            assert upstream.connections == 2

    run(story())


UNPROCESSED: dict[str, Play] = {
    "refused": [reset(ErrorCodes.REFUSED_STREAM)],
    "left out of a goodbye": [lambda machine, stream: goaway(machine, max(stream - 2, 0)), Step.STALL],
}


@pytest.mark.parametrize("play", UNPROCESSED.values(), ids=UNPROCESSED)
def test_a_request_that_was_certainly_not_processed_is_sent_again_once(tls: ssl.SSLContext, play: Play) -> None:
    async def story() -> None:
        async with to(play, [ok(b"again")], tls=tls) as (upstream, transport):
            assert await body_of(transport) == b"again"
            assert len(upstream.requests) == 2
        async with to(play, tls=tls) as (upstream, transport):
            with pytest.raises(TruncatedAnswer):
                await body_of(transport)
            assert len(upstream.requests) == 2

    run(story())


@pytest.mark.parametrize("play", UNPROCESSED.values(), ids=UNPROCESSED)
def test_an_upload_that_was_not_processed_is_not_sent_again(tls: ssl.SSLContext, play: Play) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x"

    async def story() -> None:
        async with to(play, [ok(b"again")], tls=tls) as (upstream, transport):
            with pytest.raises(TruncatedAnswer):
                await transport.send(b"POST", b"/", [], body(), PATIENT)
            assert len(upstream.requests) == 1

    run(story())


@pytest.mark.parametrize("code", [ErrorCodes.NO_ERROR, ErrorCodes.INTERNAL_ERROR, ErrorCodes.REFUSED_STREAM])
def test_an_answer_that_the_upstream_resets_is_truncated(tls: ssl.SSLContext, code: ErrorCodes) -> None:
    async def story() -> None:
        async with to([EVENTS + b"1\r\na\r\n", reset(code)], [ok(b"next")], tls=tls) as (upstream, transport):
            with pytest.raises(TruncatedAnswer):
                await body_of(transport)
            assert await body_of(transport) == b"next"
            assert (upstream.connections, len(upstream.requests)) == (1, 2)

    run(story())


# Signs of life


def test_a_connection_that_gives_no_sign_of_life_ends(tls: ssl.SSLContext) -> None:
    async def story() -> None:
        async with to([EVENTS + b"1\r\na\r\n", Step.STALL], tls=tls, limits=LIVELY) as (upstream, transport):
            answer = await get(transport)
            assert await anext(answer) == b"a"
            upstream.deaf = True
            with pytest.raises(TruncatedAnswer):
                await anext(answer)
            await eventually(lambda: not upstream.tasks)

    run(story())


def test_a_silent_connection_that_answers_pings_stays(tls: ssl.SSLContext) -> None:
    async def story() -> None:
        async with to([Step.STALL, ok(b"late")], tls=tls, limits=LIVELY) as (upstream, transport):
            reading = asyncio.create_task(body_of(transport))
            await eventually(lambda: upstream.pings > 2)
            upstream.release()
            assert await reading == b"late"

    run(story())


# Answers that are not


def head(*headers: tuple[bytes, bytes]) -> Act:
    def send(machine: Machine, stream: int) -> None:
        machine.config.validate_outbound_headers = machine.config.normalize_outbound_headers = False
        machine.send_headers(stream, headers)

    return send


STATUS = (b":status", b"200")
MALFORMED: dict[str, Act] = {
    "no status": head((b"a", b"b")),
    "two statuses": head(STATUS, STATUS),
    "a status that is no number": head((b":status", b"2x0")),
    "a status out of range": head((b":status", b"600")),
    "another pseudo-header": head(STATUS, (b":path", b"/")),
    "an upper-case name": head(STATUS, (b"X-A", b"b")),
    "a name that is no token": head(STATUS, (b"a b", b"c")),
    "a line break in a value": head(STATUS, (b"a", b"b\r\nc: d")),
    "NUL in a value": head(STATUS, (b"a", b"b\0")),
    "a coding": head(STATUS, (b"transfer-encoding", b"chunked")),
    "a header of the connection": head(STATUS, (b"connection", b"close")),
}


@pytest.mark.parametrize("act", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_head_is_an_error_of_its_stream_alone(tls: ssl.SSLContext, act: Act) -> None:
    async def story() -> None:
        slow: Play = [EVENTS, Step.STALL, chunked(b"whole")]
        async with to(slow, [act, Step.STALL], tls=tls) as (upstream, transport):
            neighbour = await get(transport)
            with pytest.raises(MalformedAnswer):
                await body_of(transport)
            await eventually(lambda: len(upstream.resets) == 1)
            upstream.release()
            assert await neighbour.read(BODY_LIMIT) == b"whole"
            assert upstream.connections == 1

    run(story())


def too_short(machine: Machine, stream: int) -> None:
    machine.send_headers(stream, [STATUS, (b"content-length", b"5")])
    machine.send_data(stream, b"abc", end_stream=True)


def body_without_head(machine: Machine, stream: int) -> None:
    machine._data_to_send += b"\x00\x00\x01\x00\x01" + stream.to_bytes(4) + b"x"


def garbage(machine: Machine, stream: int) -> None:
    machine._data_to_send += b"HTTP/1.1 400 Bad Request\r\n\r\n"


@pytest.mark.parametrize("act", [too_short, body_without_head, garbage])
def test_what_breaks_the_protocol_is_malformed_and_ends_the_connection(
    tls: ssl.SSLContext, act: Callable[[Machine, int], None]
) -> None:
    async def story() -> None:
        async with to([act, Step.STALL], [ok(b"next")], tls=tls) as (upstream, transport):
            with pytest.raises(MalformedAnswer):
                await body_of(transport)
            assert await body_of(transport) == b"next"
            assert upstream.connections == 2

    run(story())


# Properties


bodies = st.lists(st.binary(min_size=1, max_size=300), max_size=4)
ENDS: dict[str, list[Any]] = {
    "end": [b"0\r\n\r\n"],
    "end and leave": [goaway, b"0\r\n\r\n"],
    "reset": [reset(ErrorCodes.INTERNAL_ERROR)],
    "quiet reset": [reset(ErrorCodes.NO_ERROR)],
    "close": [Step.CLOSE],
    "leave and close": [goaway, Step.CLOSE],
}


def test_an_answer_is_whole_when_its_stream_ended_and_truncated_otherwise(tls: ssl.SSLContext) -> None:
    with asyncio.Runner() as runner:
        serving = to(tls=tls)
        upstream, transport = runner.run(serving.__aenter__())

        async def outcome() -> bytes | str:
            try:
                return await body_of(transport)
            except UpstreamError as error:
                return type(error).__name__

        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
        @given(pieces=bodies, end=st.sampled_from(sorted(ENDS)))
        def holds(pieces: list[bytes], end: str) -> None:
            upstream.plays = [[EVENTS, *(chunked(piece)[:-5] for piece in pieces), *ENDS[end]]]
            whole = end.startswith("end")
            assert runner.run(outcome()) == (b"".join(pieces) if whole else "TruncatedAnswer")

        holds()
        runner.run(serving.__aexit__(None, None, None))


frames = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40)), max_size=6)


@given(frames, st.lists(st.integers(0, 300), max_size=6))
def test_frames_are_the_same_wherever_they_are_cut(given_frames: list[tuple[int, bytes]], places: list[int]) -> None:
    wires = [len(payload).to_bytes(3) + bytes([kind]) + bytes(5) + payload for kind, payload in given_frames]
    data = b"".join(wires)
    marks = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    reader = Frames()
    found = [frame for a, b in itertools.pairwise(marks) for frame in reader.feed(data[a:b])]
    assert [(frame.kind, frame.payload) for frame in found] == given_frames
    assert [frame.wire for frame in found] == wires


def test_a_frame_that_is_too_large_or_too_short_is_malformed() -> None:
    with pytest.raises(MalformedAnswer):
        list(Frames().feed((MAX_FRAME + 1).to_bytes(3) + bytes(6)))
    with pytest.raises(MalformedAnswer):
        [last_served(frame) for frame in Frames().feed(b"\0\0\1\7" + bytes(5) + b"x")]
