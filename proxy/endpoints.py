"""What a worker knows of each endpoint: whether it works, and may be asked."""

import logging
import random
from collections.abc import Callable, Collection, Sequence
from functools import partial
from time import monotonic
from typing import NamedTuple

from proxy.breaker import Breaker, Change, State
from proxy.registry import Endpoint, Model
from proxy.retries import Budget
from proxy.telemetry import BreakerChanged, Sink

log = logging.getLogger(__name__)

Opened = Callable[[Endpoint, Breaker], None]


class Standing:
    """How one endpoint stands."""

    __slots__ = ("breaker", "endpoint", "max_in_flight", "name", "weight")

    def __init__(self, endpoint: Endpoint, breaker: Breaker) -> None:
        # All mutable state is what it holds; the endpoint is as the newest registry has it.
        self.breaker = breaker
        self.renew(endpoint)

    def __repr__(self) -> str:
        return f"<Standing {self.name} {self.breaker!r}>"

    def renew(self, endpoint: Endpoint) -> None:
        """Take the endpoint as it is now; what the balancer asks for is at hand."""
        self.endpoint = endpoint
        self.name, self.weight, self.max_in_flight = endpoint.name, endpoint.weight, endpoint.max_in_flight


class _Ready(NamedTuple):
    """A model, and its endpoints that take requests."""

    model: Model
    standings: list[Standing]


class Endpoints:
    """All endpoints that were ever asked, by their names. Times are by the monotonic clock."""

    def __init__(
        self, sink: Sink, *, clock: Callable[[], float] = monotonic, chance: Callable[[], float] = random.random
    ) -> None:
        self._sink = sink
        self.clock = clock
        self.chance = chance
        # All mutable state: how each endpoint stands, those of each model that are ready, what may be tried again for
        # each model, until when one of all is to be avoided, and who is told of breakers that open.
        self._standings: dict[str, Standing] = {}
        self._ready: dict[str, _Ready] = {}
        self._budgets: dict[str, Budget] = {}
        self._avoid_until = 0.0
        self._opened: list[Opened] = []

    def __repr__(self) -> str:
        return f"<Endpoints {list(self._standings.values())!r}>"

    def on_open(self, call: Opened) -> None:
        """Have a function called with each endpoint whose breaker opens."""
        self._opened.append(call)

    def budget(self, model: Model) -> Budget:
        """Return what may be tried again of the requests for a model."""
        budget = self._budgets.get(model.name)
        if budget is None:
            budget = self._budgets[model.name] = Budget(model.retries)
        return budget

    def allowed(self, model: Model, now: float) -> list[Standing]:
        """Return the endpoints of a model that may be asked now. The list is not to be changed."""
        ready = self._ready_of(model)
        for standing in ready:
            if not standing.breaker.allow(now):
                return [s for s in ready if s.breaker.allow(now)]
        return ready

    def preferred(self, standings: list[Standing], now: float) -> list[Standing]:
        """Leave out those that have just been too busy."""
        if now >= self._avoid_until:
            return standings
        return [s for s in standings if not s.breaker.avoid(now)]

    def rest(self, standing: Standing, seconds: float | None) -> None:
        """An endpoint is too busy: see Breaker.rest."""
        self._avoid_until = max(self._avoid_until, standing.breaker.rest(self.clock(), seconds))

    def wait(self, models: Sequence[Model], now: float) -> float:
        """Return the seconds until one of the endpoints that are ready may be asked."""
        return min((s.breaker.wait(now) for m in models for s in self._ready_of(m)), default=0.0)

    def keep(self, names: Collection[str]) -> None:
        """Forget all endpoints but these: they are gone, and nobody has to check whether they are back."""
        for name in self._standings.keys() - set(names):
            self._standings[name].breaker.renew()
            del self._standings[name]

    def _ready_of(self, model: Model) -> list[Standing]:
        ready = self._ready.get(model.name)
        if ready is None or ready.model is not model:  # the registry is a new one
            self.budget(model).follow(model.retries)
            ready = self._ready[model.name] = _Ready(model, [self._of(e, model) for e in model.ready()])
        return ready.standings

    def _of(self, endpoint: Endpoint, model: Model) -> Standing:
        """Return how an endpoint stands. Another process, or another address, begins anew."""
        standing = self._standings.get(endpoint.name)
        if standing is None:
            breaker = Breaker(model.breaker, self.chance, partial(self._changed, endpoint.name))
            standing = self._standings[endpoint.name] = Standing(endpoint, breaker)
        elif (standing.endpoint.since, standing.endpoint.address) != (endpoint.since, endpoint.address):
            standing.breaker.renew()
        standing.breaker.settings = model.breaker
        standing.renew(endpoint)
        return standing

    def _changed(self, name: str, change: Change) -> None:
        standing = self._standings.get(name)
        if standing is None:  # a request that was under way there when it was forgotten
            return
        until = self.clock() + change.seconds if change.seconds else 0.0
        self._sink.changed(BreakerChanged(standing.endpoint.model, name, change.after.value, until))
        trial = f"; the next trial is in {change.seconds:.0f} s, or when a health check is passed"
        said = f"{change.after.value}, was {change.before.value}" + (trial if change.seconds else "")
        log.warning("endpoint %s: breaker %s", name, said)
        if change.after is State.OPEN:
            for call in self._opened:
                call(standing.endpoint, standing.breaker)
