"""How the router weighs what it knows, and what holds at some times and places only. Data, and pure."""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime, tzinfo
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Meta

from proxy.naming import Prefer
from proxy.routing.traits import Region

Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
WEEKDAYS: tuple[Weekday, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
Weight = Annotated[float, Meta(ge=0, le=100)]
Share = Annotated[float, Meta(ge=0, le=1)]

_TIME = r"([01]?\d|2[0-3])(?::([0-5]\d))?"
_HOURS = re.compile(rf"{_TIME}-(?:{_TIME}|(24)(?::00)?)")


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What each part of a model's score counts; every part is from 0 to 1.

    kind: how near it comes to the kind that the rule asks for. task: that it is specialised in the task. quality,
    speed: their scores. cost: how cheap it is beside the cheapest.
    """

    kind: Weight = 0.0
    task: Weight = 0.0
    quality: Weight = 0.0
    cost: Weight = 0.0
    speed: Weight = 0.0


# `kind` outweighs the others together, so that they decide among models of the kind that is asked for. What is
# preferred above all leaves the others a say where it makes no difference.
WEIGHTS: Mapping[Prefer, Weights] = {
    "balanced": Weights(kind=4.0, task=0.25, quality=0.3, cost=0.3, speed=0.1),
    "cost": Weights(cost=1.0, task=0.02, quality=0.02, speed=0.01),
    "quality": Weights(quality=1.0, task=0.3, cost=0.02, speed=0.01),
    "speed": Weights(speed=1.0, task=0.02, quality=0.02, cost=0.01),
    "order": Weights(),
}


class WeightSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights that replace some of the shipped ones."""

    kind: Weight | None = None
    task: Weight | None = None
    quality: Weight | None = None
    cost: Weight | None = None
    speed: Weight | None = None


class ByPreference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights for each thing that may be preferred."""

    balanced: WeightSettings = WeightSettings()
    cost: WeightSettings = WeightSettings()
    quality: WeightSettings = WeightSettings()
    speed: WeightSettings = WeightSettings()
    order: WeightSettings = WeightSettings()


class RoutingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How models are chosen.

    weights: by preference, parts of Weights that replace the shipped ones. simple, complex: below and from which
    complexity a prompt is so; in between it is medium. complex, where it is left out, is the threshold that `polyvox
    route fit` has calibrated, or 0.6. complexity_model: a file made by it, instead of the shipped model. answer_tokens:
    what an answer is taken to have where the request does not limit it.
    """

    weights: ByPreference = ByPreference()
    simple: Share = 0.4
    complex: Share | None = None
    complexity_model: str | None = None
    answer_tokens: Annotated[int, Meta(ge=1)] = 500

    def weighing(self) -> dict[Prefer, Weights]:
        """Return the weights of each preference."""
        return {p: _replaced(shipped, getattr(self.weights, p)) for p, shipped in WEIGHTS.items()}


def _replaced(shipped: Weights, given: WeightSettings) -> Weights:
    return msgspec.structs.replace(shipped, **{k: v for k, v in msgspec.structs.asdict(given).items() if v is not None})


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What holds when all of its conditions do.

    Conditions: hours, from one time of day up to another, as 9-18 or 22:30-6, which goes over midnight; weekdays; both
    at the moment, in `zone`. region, task: of the request.
    Then: prefer, for requests that prefer nothing themselves; only, never: models that may, or may not, be chosen.
    """

    hours: str | None = None
    weekdays: tuple[Weekday, ...] = ()
    zone: str = "UTC"
    region: Region | None = None
    task: str | None = None
    prefer: Prefer | None = None
    only: tuple[str, ...] | None = None
    never: tuple[str, ...] = ()

    def holds(self, now: datetime, region: str | None, task: str) -> bool:
        """Say whether the rule holds for a request. now: a time with its zone."""
        if (self.region is not None and self.region != region) or (self.task is not None and self.task != task):
            return False
        if self.hours is None and not self.weekdays:
            return True
        local = now.astimezone(zone(self.zone))
        if self.weekdays and WEEKDAYS[local.weekday()] not in self.weekdays:
            return False
        return self.hours is None or _within(self.hours, local.hour * 60 + local.minute)


def zone(name: str) -> tzinfo:
    """Return a time zone by its IANA name. Raises ValueError if there is none of this name."""
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        raise ValueError(f"there is no time zone {name!r}; expected a name like UTC or Europe/Berlin") from None


def minutes(hours: str) -> tuple[int, int]:
    """Read `9-18` or `22:30-6` as minutes of a day. Raises ValueError."""
    match = _HOURS.fullmatch(hours)
    if match is None:
        raise ValueError(f"{hours!r} is no span of time; expected one like 9-18 or 22:30-6")
    from_hour, from_minute, to_hour, to_minute, midnight = match.groups()
    start = int(from_hour) * 60 + int(from_minute or 0)
    return start, 24 * 60 if midnight else int(to_hour) * 60 + int(to_minute or 0)


def _within(hours: str, minute: int) -> bool:
    start, end = minutes(hours)
    return start <= minute < end if start < end else minute >= start or minute < end


class Applied(msgspec.Struct, frozen=True):
    """What the rules that hold come to. only: None for any model."""

    prefer: Prefer | None = None
    only: frozenset[str] | None = None
    never: frozenset[str] = frozenset()


def apply(rules: Iterable[Rule], now: datetime, region: str | None, task: str) -> Applied:
    """Put the rules that hold together: the first preference counts, and every `only` and `never`."""
    prefer: Prefer | None = None
    only: frozenset[str] | None = None
    never: frozenset[str] = frozenset()
    for rule in rules:
        if rule.holds(now, region, task):
            prefer = prefer or rule.prefer
            never |= frozenset(rule.never)
            if rule.only is not None:
                only = frozenset(rule.only) if only is None else only & frozenset(rule.only)
    return Applied(prefer, only, never)
