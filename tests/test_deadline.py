"""How long a client waits for its answer."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.deadline import HEADER, Deadline
from proxy.errors import BadRequest, DeadlinePassed


@pytest.mark.parametrize("value", [b"", b"0", b"0.0", b"-1", b"soon", b"1e3", b"1,5", b"inf", b"nan", b" 1", b"9" * 20])
def test_what_is_no_number_of_seconds_above_0_is_refused_by_name(value):
    with pytest.raises(BadRequest) as caught:
        Deadline.of({HEADER: value})
    assert caught.value.param == "x-request-timeout"
    assert "x-request-timeout" in str(caught.value)


def test_without_the_header_there_is_no_deadline():
    assert Deadline.of({b"accept": b"*/*"}) is None


@given(st.floats(60.0, 1e6))
def test_what_remains_is_passed_on_and_is_no_more_than_was_given(seconds):
    deadline = Deadline.of({HEADER: b"%.3f" % seconds})
    assert deadline
    name, value = deadline.header()
    assert name == HEADER
    assert 0 < float(value) <= round(seconds, 3)
    assert Deadline.of({name: value})


def test_a_deadline_that_has_passed_is_not_passed_on():
    with pytest.raises(DeadlinePassed):
        Deadline(0.0).header()


def test_work_that_takes_too_long_is_cancelled():
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    deadline = Deadline.of({HEADER: b"0.01"})
    assert deadline
    with pytest.raises(DeadlinePassed) as caught:
        asyncio.run(deadline.bound(work()))
    assert caught.value.status == 504
    assert ended == [True]


def test_work_in_time_gives_what_it_gives_and_its_own_timeouts_stay_its_own():
    deadline = Deadline.of({HEADER: b"60"})
    assert deadline

    async def gives() -> int:
        return 7

    async def fails() -> None:
        raise TimeoutError("its own")

    assert asyncio.run(deadline.bound(gives())) == 7
    with pytest.raises(TimeoutError, match="its own"):
        asyncio.run(deadline.bound(fails()))


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"x"


def test_a_body_that_flows_on_ends_at_the_deadline_too():
    async def story() -> None:
        deadline = Deadline.of({HEADER: b"0.01"})
        assert deadline
        with pytest.raises(DeadlinePassed):
            async for _ in deadline.bounded(endless()):
                pass

    asyncio.run(story())
