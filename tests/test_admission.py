"""Who gets an endpoint at once, who waits, and who is sent away."""

import asyncio
import contextlib
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.admission import Admission
from proxy.balancer import Balancer, Board, Lease
from proxy.config import Queue
from proxy.errors import EngineStopped, TooBusy
from proxy.registry import Endpoint
from proxy.shared import Slots
from proxy.telemetry import RequestQueued


class Gauge:
    """Counts who waits, as a sink does."""

    def __init__(self) -> None:
        self.waiting = 0

    def queued(self, event: RequestQueued) -> None:
        self.waiting += 1 if event.waits else -1


class Door:
    """An admission to one model, whose endpoints take one request each."""

    def __init__(self, size: int = 100, timeout: float = 60.0, *, endpoints: int = 1, most: int = 1) -> None:
        names = {"m": [f"m/{i}" for i in range(endpoints)]}
        self.gauge, self.now = Gauge(), 0.0
        balancer = Balancer(names, {"m": "least_loaded"}, Board(Slots.of(names, [])), random.Random(1).random)
        queues = {"m": Queue(size, timeout)}
        self.admission = Admission(balancer, queues, self.gauge, lambda: self.now)  # type: ignore[arg-type]
        self.places = [
            Endpoint(name=name, model="m", address="http://x", serves="m", max_in_flight=most) for name in names["m"]
        ]

    async def enter(self) -> Lease:
        """Take a lease as a request does."""
        picked = self.admission.pick("m", self.places)
        return (picked or await self.admission.wait("m", lambda: self.places))[1]

    async def crowd(self, count: int) -> list["asyncio.Task[Lease]"]:
        """Have so many more come, one after the other, and return once each has its place."""
        tasks = []
        for _ in range(count):
            tasks.append(asyncio.create_task(self.enter()))
            await asyncio.sleep(0)
        return tasks


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 60))


async def turn() -> None:
    """Let everybody who can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_whoever_finds_room_does_not_wait():
    async def story() -> None:
        door = Door(size=0)
        assert door.admission.pick("m", door.places)
        assert door.admission.pick("m", door.places) is None

    run(story())


def test_those_who_wait_are_served_in_the_order_of_coming():
    async def story() -> None:
        door = Door()
        lease = await door.enter()
        crowd = await door.crowd(5)
        for i in range(5):
            lease.release()
            await turn()
            assert [task.done() for task in crowd] == [True] * (i + 1) + [False] * (4 - i)
            lease = crowd[i].result()

    run(story())


def test_nobody_overtakes_those_who_wait():
    async def story() -> None:
        door = Door()
        lease = await door.enter()
        (first,) = await door.crowd(1)
        lease.release()
        assert door.admission.pick("m", door.places) is None
        await turn()
        assert first.done()

    run(story())


def test_one_who_leaves_is_gone_at_once_and_the_next_moves_up():
    async def story() -> None:
        door = Door()
        lease = await door.enter()
        crowd = await door.crowd(3)
        assert door.gauge.waiting == 3
        crowd[0].cancel()
        await turn()
        assert door.gauge.waiting == 2
        lease.release()
        await turn()
        assert crowd[1].done() and not crowd[2].done()

    run(story())


def test_one_who_leaves_just_as_it_is_its_turn_loses_nobody_the_place():
    async def story() -> None:
        door = Door()
        lease = await door.enter()
        crowd = await door.crowd(2)
        lease.release()
        crowd[0].cancel()
        await turn()
        assert crowd[1].result()

    run(story())


def test_room_for_several_is_given_to_several():
    async def story() -> None:
        door = Door(endpoints=2)
        leases = [await door.enter(), await door.enter()]
        crowd = await door.crowd(3)
        for lease in leases:
            lease.release()
        await turn()
        assert [task.done() for task in crowd] == [True, True, False]

    run(story())


def test_one_more_than_may_wait_is_sent_away_with_a_time_to_come_back():
    async def story() -> None:
        door = Door(size=2)
        await door.enter()
        await door.crowd(2)
        door.now = 7.5
        with pytest.raises(TooBusy) as caught:
            await door.enter()
        assert (caught.value.status, caught.value.retry_after) == (429, 8)
        assert (b"retry-after", b"8") in caught.value.headers()
        assert door.gauge.waiting == 2

    run(story())


def test_whoever_has_waited_long_enough_is_sent_away():
    async def story() -> None:
        door = Door(timeout=0.01)
        await door.enter()
        with pytest.raises(TooBusy):
            await door.enter()
        assert door.gauge.waiting == 0

    run(story())


def test_room_that_nobody_tells_of_is_found():
    async def story() -> None:
        door = Door()
        await door.enter()
        (waiting,) = await door.crowd(1)
        door.places = [Endpoint(name="m/0", model="m", address="http://x", serves="m", max_in_flight=2)]
        assert await waiting

    run(story())


def test_those_who_wait_for_a_model_that_stops_are_told_so():
    async def story() -> None:
        door = Door()
        lease = await door.enter()

        def stopped() -> list[Endpoint]:
            raise EngineStopped("m", "stopped")

        waiting = asyncio.create_task(door.admission.wait("m", stopped))
        await turn()
        lease.release()
        with pytest.raises(EngineStopped):
            await waiting

    run(story())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["come", "end", "leave", "turn"]), st.integers(0, 50)), max_size=60))
def test_whatever_happens_no_place_is_lost_and_none_given_twice(steps):
    async def story() -> None:
        door = Door(endpoints=2, most=2)
        tasks: list[asyncio.Task[Lease]] = []
        for step, number in steps:
            if step == "come":
                tasks += await door.crowd(1)
            elif step == "turn":
                await turn()
            elif tasks:
                task = tasks[number % len(tasks)]
                if step == "leave" and not task.done():
                    task.cancel()
                elif step == "end" and task.done() and not task.cancelled():
                    task.result().release()
                    tasks.remove(task)
        await turn()
        tasks = [task for task in tasks if not task.cancelled()]
        holding = sum(task.done() for task in tasks)
        assert holding == min(len(tasks), 4)
        assert door.gauge.waiting == len(tasks) - holding
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    run(story())
