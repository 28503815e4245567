"""What a worker knows of each endpoint: what is under way there, and whether it works."""

import logging
import random
from collections.abc import Callable, Collection, Sequence
from functools import partial
from time import monotonic
from typing import NamedTuple

from proxy import balancer
from proxy.balancer import Lease, Load
from proxy.breaker import Breaker, Change, State
from proxy.registry import Endpoint, Model
from proxy.retries import Budget
from proxy.telemetry import BreakerChanged, Sink

log = logging.getLogger(__name__)

Opened = Callable[[Endpoint, Breaker], None]


class Standing:
    """One endpoint. since: see registry.Endpoint."""

    __slots__ = ("breaker", "load", "since")

    def __init__(self, breaker: Breaker, since: float) -> None:
        # All mutable state is what it holds.
        self.load = Load()
        self.breaker = breaker
        self.since = since

    def __repr__(self) -> str:
        return f"<Standing {self.load!r} {self.breaker!r}>"


class Taken(NamedTuple):
    """An endpoint that was chosen for a request, and what the request holds there."""

    endpoint: Endpoint
    lease: Lease
    breaker: Breaker
    ticket: int


class Endpoints:
    """All endpoints that were ever asked, by their names. Times are by the monotonic clock."""

    def __init__(
        self, sink: Sink, *, clock: Callable[[], float] = monotonic, chance: Callable[[], float] = random.random
    ) -> None:
        self._sink = sink
        self.clock = clock
        self.chance = chance
        # All mutable state: how each endpoint stands, what may be tried again for each model, and who is told of
        # breakers that open.
        self._standings: dict[str, Standing] = {}
        self._budgets: dict[str, Budget] = {}
        self._opened: list[Opened] = []

    def __repr__(self) -> str:
        return f"<Endpoints {self._standings!r}>"

    def on_open(self, call: Opened) -> None:
        """Have a function called with each endpoint whose breaker opens."""
        self._opened.append(call)

    def budget(self, model: Model) -> Budget:
        """Return what may be tried again of the requests for a model."""
        budget = self._budgets.get(model.name)
        if budget is None:
            budget = self._budgets[model.name] = Budget(model.retries)
        return budget

    def allowed(self, model: Model, now: float, tried: Collection[tuple[str, float]]) -> list[Endpoint]:
        """Return the endpoints of a model that may be asked now, but for those that were tried: (name, since)."""
        found = [e for e in model.ready() if self.of(e, model).breaker.allow(now)]
        return [e for e in found if (e.name, e.since) not in tried] if tried else found

    def preferred(self, endpoints: list[Endpoint], now: float) -> list[Endpoint]:
        """Leave out those that have just been too busy."""
        return [e for e in endpoints if not self._standings[e.name].breaker.avoid(now)]

    def take(self, candidates: Sequence[Endpoint], now: float) -> Taken:
        """Choose one of some endpoints that are allowed, and take a lease."""
        standings = [self._standings[e.name] for e in candidates]
        chosen = balancer.least_loaded([s.load for s in standings]) if len(standings) > 1 else 0
        breaker = standings[chosen].breaker
        return Taken(candidates[chosen], standings[chosen].load.lease(), breaker, breaker.begin(now))

    def of(self, endpoint: Endpoint, model: Model) -> Standing:
        """Return how an endpoint stands. Another process at its address begins anew."""
        standing = self._standings.get(endpoint.name)
        if standing is None:
            breaker = Breaker(model.breaker, self.chance, partial(self._changed, endpoint, model))
            standing = self._standings[endpoint.name] = Standing(breaker, endpoint.since)
        elif standing.since != endpoint.since:
            standing.since = endpoint.since
            standing.breaker.renew()
        return standing

    def wait(self, models: Sequence[Model], now: float) -> tuple[float, bool]:
        """Return the seconds until one of the ready endpoints may be asked, and whether all just want a rest."""
        breakers = [self.of(e, m).breaker for m in models for e in m.ready()]
        return min((b.wait(now) for b in breakers), default=0.0), all(b.rests(now) for b in breakers)

    def _changed(self, endpoint: Endpoint, model: Model, change: Change) -> None:
        until = self.clock() + change.seconds if change.seconds else 0.0
        self._sink.changed(BreakerChanged(model.name, endpoint.name, change.after.value, until))
        trial = f"; the next trial is in {change.seconds:.0f} s, or when a health check is passed"
        said = f"{change.after.value}, was {change.before.value}" + (trial if change.seconds else "")
        log.warning("endpoint %s: breaker %s", endpoint.name, said)
        if change.after is State.OPEN:
            for call in self._opened:
                call(endpoint, self._standings[endpoint.name].breaker)
