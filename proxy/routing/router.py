"""Which models may answer a request, and in what order. Pure: what is known goes in, a Plan with its reasons comes out.

1. A candidate that lacks what the request needs, or that a rule keeps back, is dropped, with the reason.
2. What is asked for decides what is preferred: the request itself, the name it asks for, a rule, or else the seed's
   rule: simple and with a budget: the cheapest; complex: an advanced model; else a balanced one.
3. The others are ordered by score, a weighted mean of parts from 0 to 1; of equals, the first in the configuration.
4. Models that cannot be asked now go last: they may be back when the others have failed.

What a model costs is never taken to be nothing because it is not known: then it counts as the dearest, and no budget
allows it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Literal

import msgspec

from proxy.cost import Price, estimate
from proxy.naming import Prefer
from proxy.routing import rules as ruling
from proxy.routing.features import Features
from proxy.routing.rules import Applied, Rule, Weights
from proxy.routing.tasks import GENERAL
from proxy.routing.traits import Kind, Traits

Health = Literal["ready", "starting", "down"]
HEALTHS: tuple[Health, ...] = ("ready", "starting", "down")

_RANK: dict[Kind, int] = {"fast_cheap": 0, "balanced": 1, "advanced": 2, "specialized": 1}
_QUALITY: dict[Kind, float] = {"fast_cheap": 5.0, "balanced": 7.0, "advanced": 9.0, "specialized": 8.0}
_SPEED = 5.0  # of a model of which nothing is known
# What each step costs that a kind is away from the one that is wanted, on the side that is the better one of the two:
# above it, or for what is simple below it; and on the other.
_NEAR, _FAR = 0.25, 0.5


class Candidate(msgspec.Struct, frozen=True):
    """A model as it is now.

    context: tokens, None if not known. modalities: what it takes. able: what its server is known to do (True) or not
    (False). tokens_each: its tokens for one of the estimate. price: None if not known. speed: as learned from traffic,
    for models whose configuration does not say. refusal: why the request is not one for it.
    """

    name: str
    traits: Traits = Traits()
    context: int | None = None
    modalities: frozenset[str] = frozenset(("text",))
    able: Mapping[str, bool | None] = {}
    tokens_each: float = 1.0
    price: Price | None = None
    speed: float | None = None
    health: Health = "ready"
    refusal: str | None = None


class Option(msgspec.Struct, frozen=True):
    """What became of a candidate. usd: what it would cost, by the estimate. dropped: what it lacks."""

    model: str
    score: float | None = None
    usd: float | None = None
    health: Health = "ready"
    dropped: str | None = None


class Plan(msgspec.Struct, frozen=True):
    """Who is asked, in order, and why.

    wanted: the kind that the rule asks for, None where something else was preferred. options: every candidate, those
    that are dropped last.
    """

    features: Features
    prefer: Prefer
    wanted: Kind | None
    options: tuple[Option, ...]

    @property
    def models(self) -> list[str]:
        """The models that may answer, best first."""
        return [option.model for option in self.options if option.dropped is None]

    @property
    def reason(self) -> str:
        """One line that says why the first is the first."""
        f = self.features
        measured = f.level if f.complexity is None else f"{f.level} ({f.complexity:.2f})"
        if not self.models:
            return f"{measured} {f.task}: none of the candidates can serve it"
        if len(self.options) == 1:
            return f"{measured} {f.task}: there is no other to choose from"
        budget = "" if f.budget_limit is None else f" within {f.budget_limit:g} USD"
        kind = f"wants a model that is {self.wanted}, " if self.wanted else ""
        return f"{measured} {f.task}{budget}: {kind}{_AIMS[self.prefer]}"

    @property
    def failures(self) -> list[str]:
        """What each candidate lacks that was dropped."""
        return [f"{option.model}: {option.dropped}" for option in self.options if option.dropped]


_AIMS: dict[Prefer, str] = {
    "balanced": "best by quality, cost and speed", "cost": "cheapest", "quality": "best", "speed": "fastest",
    "order": "first in order",
}  # fmt: skip


def plan(
    features: Features,
    candidates: Sequence[Candidate],
    prefer: Prefer | None,
    rules: Iterable[Rule],
    weights: Mapping[Prefer, Weights],
    now: datetime,
    answer_tokens: int = 500,
) -> Plan:
    """Decide. prefer: of the name that was asked for. answer_tokens: of an answer whose length nobody limits."""
    applied = ruling.apply(rules, now, features.region, features.task)
    chosen, wanted = _aim(features, prefer, applied)
    prices = {c.name: _usd(features, c, answer_tokens) for c in candidates}
    failed = {c.name: lacks(features, c, applied, prices[c.name], answer_tokens) for c in candidates}
    kept = [c for c in candidates if failed[c.name] is None]
    cheapest = min((usd for c in kept if (usd := prices[c.name]) is not None), default=None)
    options = [
        Option(c.name, score(c, features, wanted, weights[chosen], prices[c.name], cheapest), prices[c.name], c.health)
        for c in kept
    ]
    options.sort(key=lambda option: (HEALTHS.index(option.health), -(option.score or 0.0)))
    options += [Option(c.name, None, prices[c.name], c.health, failed[c.name]) for c in candidates if failed[c.name]]
    return Plan(features, chosen, wanted, tuple(options))


def _aim(features: Features, prefer: Prefer | None, applied: Applied) -> tuple[Prefer, Kind | None]:
    """Return what is preferred, and which kind the seed's rule wants where it is all in the balance."""
    said = features.prefer or prefer or applied.prefer or "balanced"
    if said != "balanced":
        return said, None
    if features.level == "simple" and features.budget_limit is not None:
        return "cost", None
    return said, "advanced" if features.level == "complex" else "balanced"


# 1. What a request needs


def lacks(
    features: Features, candidate: Candidate, applied: Applied, usd: float | None, answer_tokens: int
) -> str | None:
    """Return which requirement of a request a model fails, and how; None for none."""
    if candidate.refusal:
        return candidate.refusal
    for check in _CHECKS:
        if said := check(features, candidate):
            return said
    if said := _room(features, candidate, answer_tokens) or _budget(features, usd):
        return said
    barred = candidate.name in applied.never or (applied.only is not None and candidate.name not in applied.only)
    return "rules: one that holds now keeps it back" if barred else None


def _task(features: Features, candidate: Candidate) -> str | None:
    tasks = candidate.traits.tasks
    return f"task: it is for {_list(tasks)} only, not {features.task}" if tasks and features.task not in tasks else None


def _modalities(features: Features, candidate: Candidate) -> str | None:
    missing = features.modalities - candidate.modalities
    return f"modalities: it takes no {_list(sorted(missing))}" if missing else None


def _languages(features: Features, candidate: Candidate) -> str | None:
    spoken = candidate.traits.languages
    missing = features.languages.difference(spoken) if spoken else ()
    return f"languages: it has no {_list(sorted(missing))}, only {_list(spoken)}" if missing else None


def _needs(features: Features, candidate: Candidate) -> str | None:
    missing = [need for need in features.needs if candidate.able.get(need) is False]
    return f"{missing[0]}: its server does not do it" if missing else None


def _region(features: Features, candidate: Candidate) -> str | None:
    region = candidate.traits.region
    if features.region is None or region == features.region:
        return None
    return f"region: it is in {region}, not {features.region}" if region else "region: nobody says where it runs"


def _speed(features: Features, candidate: Candidate) -> str | None:
    speed = _known_speed(candidate)
    if features.speed is None or (speed is not None and speed >= features.speed):
        return None
    return "speed: not known yet" if speed is None else f"speed: its score is {speed:.3g}, not {features.speed:g}"


def _quality(features: Features, candidate: Candidate) -> str | None:
    quality = _known_quality(candidate)
    if features.quality is None or quality >= features.quality:
        return None
    return f"quality: its score is {quality:g}, not {features.quality:g}"


Check = Callable[[Features, Candidate], str | None]
_CHECKS: tuple[Check, ...] = (_modalities, _task, _languages, _needs, _region, _speed, _quality)


def _room(features: Features, candidate: Candidate, answer_tokens: int) -> str | None:
    """Say what is wrong where prompt and answer do not fit; an answer of unknown length is not worth a fourth of it."""
    context = candidate.context
    if context is None:
        return None
    prompt = round(features.tokens * candidate.tokens_each)
    answer = features.max_tokens or min(answer_tokens, context // 4)
    needed = max(prompt + answer, features.context or 0)
    if needed <= context:
        return None
    if features.max_tokens is not None and features.max_tokens > context:
        return f"max_tokens: {features.max_tokens} are more than its context of {context}"
    return f"context: {needed} tokens are needed (about {prompt} of the prompt), it has {context}"


def _budget(features: Features, usd: float | None) -> str | None:
    if features.budget_limit is None:
        return None
    if usd is None:
        return "budget_limit: nobody knows what it costs"
    return (
        f"budget_limit: it costs about {usd:.3g} USD, not {features.budget_limit:g}"
        if usd > features.budget_limit
        else None
    )


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)


def _usd(features: Features, candidate: Candidate, answer_tokens: int) -> float | None:
    if candidate.price is None:
        return None
    return estimate(
        candidate.price, round(features.tokens * candidate.tokens_each), features.max_tokens or answer_tokens
    )


# 3. What speaks for a model


def score(
    candidate: Candidate,
    features: Features,
    wanted: Kind | None,
    weights: Weights,
    usd: float | None,
    cheapest: float | None,
) -> float:
    """Return the weighted mean of what speaks for a model, 0 to 1.

    usd: what it would cost. cheapest: what the cheapest candidate would, None where no price is known.
    """
    speed = _known_speed(candidate)
    parts = (
        (weights.kind, _fit(candidate.traits, features, wanted)),
        (weights.task, float(_is_special(candidate.traits, features.task))),
        (weights.quality, _known_quality(candidate) / 10),
        (weights.cost, _cheapness(usd, cheapest)),
        (weights.speed, (_SPEED if speed is None else speed) / 10),
    )
    total = sum(weight for weight, _ in parts)
    return round(sum(weight * part for weight, part in parts) / total, 6) if total else 0.0


def _fit(traits: Traits, features: Features, wanted: Kind | None) -> float:
    """Say how near a model comes to the kind that is wanted. What is specialised in the task is never above it."""
    if wanted is None:
        return 0.0
    special = _is_special(traits, features.task)
    if traits.kind == "specialized" and special:
        return 1.0
    steps = _RANK[traits.kind] - _RANK[wanted]
    if steps > 0 and special:
        return 1.0
    near = (steps < 0) == (features.level == "simple")
    return 1.0 - (_NEAR if near else _FAR) * abs(steps)


def _is_special(traits: Traits, task: str) -> bool:
    """Say whether a model is specialised in a task; what is general is nobody's specialty."""
    return task in traits.tasks and task != GENERAL


def _cheapness(usd: float | None, cheapest: float | None) -> float:
    """Return what the cheapest costs, by what this one does: 1 for the cheapest, 0 where nobody knows."""
    if usd is None or cheapest is None:
        return 0.0
    return cheapest / usd if usd > 0 else 1.0


def _known_quality(candidate: Candidate) -> float:
    said = candidate.traits.quality_score
    return _QUALITY[candidate.traits.kind] if said is None else said


def _known_speed(candidate: Candidate) -> float | None:
    said = candidate.traits.speed_score
    return candidate.speed if said is None else said
