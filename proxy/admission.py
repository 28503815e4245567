"""Who gets an endpoint at once, who waits, and who is sent away."""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import TypeVar

import msgspec

from proxy.balancer import Balancer, Candidate, Lease, Prompt
from proxy.config import Queue
from proxy.errors import TooBusy
from proxy.telemetry import RequestQueued, Sink

C = TypeVar("C", bound=Candidate)
T = TypeVar("T")

_LOOK = 0.05  # seconds between two looks whether there is room: other workers' requests end, engines come up
_LONGEST_RETRY = 60  # seconds


class _Line:
    """Those who wait for an endpoint of one model, first come first served."""

    def __init__(self) -> None:
        # All mutable state: who waits and since when, the first first, and the timer that wakes the first.
        self.waiting: deque[tuple[asyncio.Event, float]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<_Line {len(self.waiting)} waiting>"

    def age(self, now: float) -> float:
        """Return for how many seconds the first has waited."""
        return now - self.waiting[0][1] if self.waiting else 0.0

    async def wait(self, take: Callable[[], T | None], since: float) -> T:
        """Wait until all before are gone and `take` gives something. Cancelled, the place is free at once."""
        place = asyncio.Event(), since
        self.waiting.append(place)
        self._look_again()
        try:
            while True:
                await place[0].wait()
                place[0].clear()
                if (taken := take()) is not None:
                    return taken
        finally:
            self.waiting.remove(place)
            self.wake()  # there may be room for the next as well, or it was meant for who has just left

    def wake(self) -> None:
        """There may be room: let the first look."""
        if self.waiting:
            self.waiting[0][0].set()

    def _look_again(self) -> None:
        if self._timer is None and self.waiting:
            self._timer = asyncio.get_running_loop().call_later(_LOOK, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.wake()
        self._look_again()


class Admission:
    """Gives endpoints to the requests of one worker, and makes them wait for one where all have enough to do.

    max_in_flight holds for all workers together. It may be passed by one request for each other worker where several
    take the last place in the same moment.
    """

    def __init__(
        self, balancer: Balancer, queues: Mapping[str, Queue], sink: Sink, clock: Callable[[], float] = monotonic
    ) -> None:
        """queues: of each model. clock: the one that leases are told the time of."""
        self._balancer = balancer
        self._sink = sink
        self._clock = clock
        # All mutable state: the queue of each model that there ever was, and who waits in it.
        self._queues: dict[str, Queue] = {}
        self._lines: dict[str, _Line] = {}
        self.follow(queues)

    def __repr__(self) -> str:
        return f"<Admission {self._lines!r} {self._balancer!r}>"

    def follow(self, queues: Mapping[str, Queue]) -> None:
        """Have these queues, for the models that the balancer has by now. Who waits goes on waiting."""
        self._queues |= queues
        for model in queues:
            line = self._lines.setdefault(model, _Line())
            self._balancer.on_release(model, line.wake)

    def prompt(
        self, model: str, fields: Mapping[str, bytes | msgspec.Raw], salt: str | None, size: int
    ) -> Prompt | None:
        """See Balancer.prompt."""
        return self._balancer.prompt(model, fields, salt, size)

    def pick(
        self, model: str, candidates: Sequence[C], prompt: Prompt | None = None, streamed: bool = True
    ) -> tuple[C, Lease] | None:
        """Choose one of the candidates and take a lease; None if all are full, or others have waited before."""
        if self._lines[model].waiting:
            return None
        return self._balancer.pick(model, candidates, prompt, self._clock(), streamed)

    def has_room(self, model: str, candidates: Sequence[Candidate]) -> bool:
        """Say whether one of the candidates can be had at once."""
        return not self._lines[model].waiting and self._balancer.has_room(model, candidates, self._clock())

    async def wait(
        self, model: str, candidates: Callable[[], Sequence[C]], prompt: Prompt | None = None, streamed: bool = True
    ) -> tuple[C, Lease]:
        """Wait for a lease on one of the candidates, in the order of coming. Raises TooBusy.

        candidates: asked each time that there may be room, as they change; what it raises, this raises.
        """
        line, queue, now = self._lines[model], self._queues[model], self._clock()
        if len(line.waiting) >= queue.size:
            raise TooBusy(model, _retry_after(line.age(now)))
        self._sink.queued(RequestQueued(model, waits=True))
        try:
            async with asyncio.timeout(queue.timeout):
                return await line.wait(
                    lambda: self._balancer.pick(model, candidates(), prompt, self._clock(), streamed), now
                )
        except TimeoutError:
            raise TooBusy(model, _retry_after(self._clock() - now)) from None
        finally:
            self._sink.queued(RequestQueued(model, waits=False))


def _retry_after(waited: float) -> int:
    """Return the seconds after which to try again: for as long as others have waited for their turn by now."""
    return min(max(math.ceil(waited), 1), _LONGEST_RETRY)
