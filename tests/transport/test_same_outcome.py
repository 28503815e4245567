"""Both transports make the same of the same bytes, wherever they are cut."""

import asyncio
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.errors import UpstreamError
from proxy.transport import Headers, Transport
from proxy.transport.cloud import CloudTransport
from proxy.transport.local import LocalTransport
from tests.fakes.scripted_upstream import Step, chunked, upstream
from tests.transport.conftest import BODY_LIMIT, get

Outcome = tuple[int, Headers, bytes] | str

BODILESS = (204, 304)
statuses = st.sampled_from((200, 201, 204, 304, 400, 404, 429, 500, 503, 599))
names = st.sampled_from((b"X-A", b"x-b", b"Content-Type", b"Connection", b"Keep-Alive", b"Set-Cookie"))
values = st.binary(max_size=12).map(lambda raw: bytes(byte for byte in raw if 32 < byte < 127 or byte > 159))
headers = st.lists(st.tuples(names, values), max_size=5)
bodies = st.lists(st.binary(min_size=1, max_size=40), max_size=4)
interims = st.sampled_from((b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Hints\r\nlink: x\r\n\r\n"))


def head(status: int, *lines: bytes) -> bytes:
    return b"\r\n".join((b"HTTP/1.1 %d Some Reason" % status, *lines, b"", b""))


@st.composite
def valid(draw: st.DrawFn) -> bytes:
    """A whole answer, framed by length, chunks or the end of the connection."""
    status, pieces = draw(statuses), draw(bodies)
    lines = [b"%b: %b" % header for header in draw(headers)]
    if status in BODILESS:
        return draw(interims) + head(status, *lines)
    whole = b"".join(pieces)
    framing, body = draw(
        st.sampled_from(
            (
                ((b"Content-Length: %d" % len(whole),), whole),
                ((b"Transfer-Encoding: chunked",), chunked(*pieces)),
                ((), whole),
            )
        )
    )
    return draw(interims) + head(status, *lines, *framing) + body


INVALID = (
    head(200, b"content-length: 3", b"transfer-encoding: chunked") + chunked(b"abc"),
    head(200, b"transfer-encoding: chunked", b"content-length: 3") + chunked(b"abc"),
    head(200, b"content-length: 3", b"content-length: 4") + b"abcd",
    head(200, b"content-length: 3x") + b"abc",
    head(200, b"content-length: 1e1") + b"abc",
    head(200, b"transfer-encoding: gzip") + b"abc",
    head(200, b"transfer-encoding: chunked, identity") + b"abc",
    head(200, b"transfer-encoding: chunked") + b"x\r\nabc\r\n0\r\n\r\n",
    head(200, b"transfer-encoding: chunked") + b"-3\r\nabc\r\n0\r\n\r\n",
    head(200, b"transfer-encoding: chunked") + b"2\r\nabc\r\n0\r\n\r\n",
    head(200, b"a b: c") + b"abc",
    head(200, b"a") + b"abc",
    head(200, b"a: b\0c") + b"abc",
    head(600) + b"abc",
    head(99) + b"abc",
    b"HTTP/1.1 abc Hello\r\n\r\n",
    b"ICY 200 OK\r\n\r\n",
)


def cut(answer: bytes, places: Sequence[int]) -> list[bytes]:
    marks = sorted({place % (len(answer) + 1) for place in places} | {0, len(answer)})
    return [answer[a:b] for a, b in itertools.pairwise(marks)]


async def outcome(transport: Transport) -> Outcome:
    try:
        answer = await get(transport)
        try:
            return answer.status, answer.headers, await answer.read(BODY_LIMIT)
        finally:
            await answer.close()
    except UpstreamError as error:
        return type(error).__name__


@pytest.mark.usefixtures("without_proxies")
def test_both_transports_make_the_same_of_the_same_bytes() -> None:
    with asyncio.Runner() as runner:
        serving = upstream()
        scripted = runner.run(serving.__aenter__())
        local, cloud = LocalTransport(scripted.address), CloudTransport(scripted.address)

        @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
        @given(
            answer=valid() | st.sampled_from(INVALID),
            places=st.lists(st.integers(0, 1000), max_size=6),
            missing=st.sampled_from((0, 0, 1, 2, 5, 30, 1000)),
        )
        def same(answer: bytes, places: list[int], missing: int) -> None:
            kept = answer if answer in INVALID else answer[: len(answer) - missing]
            scripted.plays = [[*cut(kept, places), Step.CLOSE]]
            assert runner.run(outcome(local)) == runner.run(outcome(cloud))

        same()
        runner.run(local.close())
        runner.run(cloud.close())
        runner.run(serving.__aexit__(None, None, None))
