"""Gathers what a plan is made from, asks for it, and learns from what comes of it. proxy.routing.router decides."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from math import log
from pathlib import Path
from typing import NamedTuple

import msgspec

from proxy import forbidden
from proxy.endpoints import Endpoints
from proxy.errors import BadRequest, NothingSuits
from proxy.limits import Limits
from proxy.naming import Prefer
from proxy.prices import Prices
from proxy.registry import Group, Model, Registry
from proxy.routing import complexity, features, router, tasks, wishes
from proxy.routing.features import Features, Judge
from proxy.routing.router import Candidate, Health, Plan
from proxy.routing.rules import Weights

Fields = Mapping[str, msgspec.Raw]

_COMPLEX = 0.6  # from which complexity a prompt is complex, where nobody has calibrated it
_FEWEST = 50.0  # tokens of an estimate that is compared with what there really was
_NEW = 0.1  # what each prompt counts in the mean of tokens for each one of the estimate
_LEAST, _MOST = 0.25, 4.0  # of that mean
_SLOWEST, _FASTEST = 5.0, 300.0  # tokens a second, which have the scores 0 and 10
_FRESH = 5.0  # seconds that a speed is not looked up again


class Inquiry(msgspec.Struct, frozen=True):
    """A request to be routed. only: names that its key may ask for, None for all."""

    path: str
    fields: Fields
    headers: list[tuple[bytes, bytes]]
    name: str
    only: frozenset[str] | None = None


class Routed(msgspec.Struct, frozen=True):
    """Where a request goes: to the models of a plan, and after them to those of its chains that suit it as well.

    explains: the client wants to know why.
    """

    plan: Plan
    models: tuple[str, ...]
    explains: bool


class _Newest(NamedTuple):
    """A registry, and what its settings come to."""

    registry: Registry
    judge: Judge
    weights: Mapping[Prefer, Weights]


class Dispatcher:
    """Finds the models for the requests of one worker."""

    def __init__(
        self,
        endpoints: Endpoints,
        limits: Limits,
        prices: Prices | None = None,
        tokens_per_second: Callable[[str], float | None] = lambda _: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """tokens_per_second: of a model's streams of late, None if not known."""
        self._endpoints = endpoints
        self._tokens_per_second = tokens_per_second
        self._now = now
        # All mutable state: what comes with a configuration. By the names of models: tokens for each one of the
        # estimate, and the speed with when it was looked up. Of the newest registry: how prompts are judged and models
        # are weighed.
        self._tokens_each: dict[str, float] = {}
        self._speeds: dict[str, tuple[float, float | None]] = {}
        self._newest: _Newest | None = None
        self.follow(limits, prices)

    def follow(self, limits: Limits, prices: Prices | None) -> None:
        """Go by another configuration from now on; the rest of it comes with each registry."""
        self._limits = limits
        self._prices = prices

    def __repr__(self) -> str:
        return f"<Dispatcher {self._tokens_each!r}>"

    def route(self, registry: Registry, target: Group | Model, asked: Inquiry) -> Routed:
        """Return where a request goes. Raises NothingSuits, or BadRequest for wishes that are none."""
        routed = self.consider(registry, target, asked)
        if not routed.models:
            raise NothingSuits(asked.name, routed.plan.failures)
        return routed

    def consider(self, registry: Registry, target: Group | Model, asked: Inquiry) -> Routed:
        """Return what `route` goes by, also where nothing suits. Raises BadRequest."""
        said, explains = wishes.read(asked.fields, asked.headers, tasks.names(registry.tasks))
        found = features.read(asked.path, asked.fields, said, self._of(registry).judge)
        members = target.members if isinstance(target, Group) else (target.name,)
        may = [name for name in members if _may(asked, name)]
        made = self._plan(registry, may, target.prefer if isinstance(target, Group) else None, found, asked.fields)
        after = [name for name in self._chain(registry, asked, found) if name not in members and _may(asked, name)]
        suits = self._plan(registry, after, "order", found, asked.fields).models if after else []
        return Routed(made, (*made.models, *suits), explains)

    def _chain(self, registry: Registry, asked: Inquiry, found: Features) -> dict[str, None]:
        """Return those who stand in for the name that was asked for, and after them those for its task, each once."""
        return dict.fromkeys((*registry.chains.get(asked.name, ()), *registry.chains.get(f"task:{found.task}", ())))

    def _plan(
        self, registry: Registry, names: list[str], prefer: Prefer | None, found: Features, fields: Fields
    ) -> Plan:
        refusals: dict[forbidden.Policy, str | None] = {}
        for name in names:
            policy = registry.models[name].policy
            if policy not in refusals:
                refusals[policy] = self._refusal(fields, policy)
        now = self._endpoints.clock()
        candidates = [self._candidate(registry.models[name], found, refusals, now) for name in names]
        weights, expected = self._of(registry).weights, registry.routing.answer_tokens
        return router.plan(found, candidates, prefer, registry.rules, weights, self._now(), expected)

    def _refusal(self, fields: Fields, policy: forbidden.Policy) -> str | None:
        try:
            forbidden.check(fields, policy, self._limits)
        except BadRequest as e:
            return str(e)
        return None

    def _candidate(
        self, model: Model, found: Features, refusals: Mapping[forbidden.Policy, str | None], now: float
    ) -> Candidate:
        each, found_out = self._tokens_each.get(model.name, 1.0), model.capabilities
        return Candidate(
            name=model.name,
            traits=model.traits,
            context=model.context_length,
            modalities=frozenset(model.traits.modalities or found_out.modalities or ("text",)),
            able={need: getattr(found_out, need) for need in found.needs},
            tokens_each=each,
            price=self._prices.dearest(model.name, round(found.tokens * each)) if self._prices else None,
            speed=self._speed(model, now) if model.traits.speed_score is None else None,
            health=self._health(model, now),
            refusal=refusals[model.policy],
        )

    def _health(self, model: Model, now: float) -> Health:
        if self._endpoints.allowed(model, now):
            return "ready"
        return "starting" if not model.ready() and model.state in ("starting", "draining") else "down"

    def _speed(self, model: Model, now: float) -> float | None:
        """Return the score that a model's streams of late are worth, or that of the speed which was found out."""
        known = self._speeds.get(model.name)
        if known is None or now - known[0] >= _FRESH:
            rate = self._tokens_per_second(model.name) or model.capabilities.tokens_per_second
            known = self._speeds[model.name] = (now, None if rate is None else speed_score(rate))
        return known[1]

    def _of(self, registry: Registry) -> "_Newest":
        if self._newest is None or self._newest.registry is not registry:
            self._newest = _Newest(registry, _judge(registry), registry.routing.weighing())
        return self._newest

    def learn(self, estimate: float, model: str, tokens_in: int) -> None:
        """A model has read a prompt of so many tokens, which was estimated before."""
        if estimate >= _FEWEST:
            before = self._tokens_each.get(model, 1.0)
            mean = before + _NEW * (tokens_in / estimate - before)
            self._tokens_each[model] = min(_MOST, max(_LEAST, mean))


def speed_score(tokens_per_second: float) -> float:
    """Return the score, 0 to 10, of a speed: each doubling counts the same."""
    reached = log(max(tokens_per_second, _SLOWEST) / _SLOWEST) / log(_FASTEST / _SLOWEST)
    return round(min(10.0, 10.0 * reached), 2)


def _may(asked: Inquiry, model: str) -> bool:
    """Say whether a key may have a model's answer: by the model's name, or by the name that it asks for."""
    return asked.only is None or model in asked.only or asked.name in asked.only


def _judge(registry: Registry) -> Judge:
    routing = registry.routing
    model = _complexity_model(routing.complexity_model)
    threshold = model.coefficients.threshold
    complex_from = routing.complex if routing.complex is not None else _COMPLEX if threshold is None else threshold
    return Judge(tasks.tasks(registry.tasks), model, min(routing.simple, complex_from), complex_from)


@cache
def _complexity_model(file: str | None) -> complexity.Model:
    return complexity.load(Path(file)) if file else complexity.shipped()
