"""What a ledger is asked, and what it reports. Pure."""

import datetime as dt
import re
from collections.abc import Iterable

import msgspec

from proxy.accounting import Usage
from proxy.cost import Price, dearest
from proxy.errors import BadRequest

GROUPS = {"model": "model", "key": "key_id", "alias": "alias", "day": "day"}

_AGO = re.compile(r"(\d{1,6})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class Query(msgspec.Struct, frozen=True):
    """since, until: in seconds since 1970, the first included. key_id: only what this key asked; None for all."""

    group_by: str = "model"
    since: float | None = None
    until: float | None = None
    key_id: str | None = None


class Sums(msgspec.Struct, frozen=True):
    """What the rows of one group add up to.

    usd: of those whose cost is known, None for none. unpriced: how many have no known cost. good: without an error.
    priced_in, priced_out, priced_cached: the tokens of those whose cost is known. from_cache: how many were answered
    from the cache of answers; saved: what these would have cost, None where that is not known of any.
    """

    group: str
    requests: int
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    usd: float | None
    unpriced: int
    seconds: float
    good: int
    priced_in: int
    priced_out: int
    priced_cached: int
    from_cache: int = 0
    saved: float | None = None


class Line(msgspec.Struct, frozen=True):
    """A group in a report.

    usd: None where no cost is known; of `unpriced` requests it is not. usd_on_dearest: what the requests whose cost is
    known would have cost on the most expensive model whose price is; saving: how much more that is. from_cache: how
    many were answered from the cache of answers; usd_saved_by_cache: what these would have cost.
    """

    group: str
    requests: int
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    usd: float | None
    unpriced: int
    average_seconds: float
    success_rate: float
    usd_on_dearest: float | None
    saving: float | None
    from_cache: int = 0
    usd_saved_by_cache: float | None = None


class Report(msgspec.Struct, frozen=True):
    """The answer to a query. since, until: as asked, in seconds since 1970."""

    group_by: str
    since: float | None
    until: float | None
    data: list[Line]
    total: Line
    object: str = "usage"


def parse(asked: dict[str, str], now: float) -> Query:
    """Read a query from its words. Raises BadRequest with the one that is wrong."""
    for name in asked:
        if name not in ("since", "until", "group_by"):
            raise BadRequest(f"unknown parameter {name!r}; known: since, until, group_by", param=name)
    group_by = asked.get("group_by", "model")
    if group_by not in GROUPS:
        raise BadRequest(f"group_by is {group_by!r}; allowed: {', '.join(GROUPS)}", param="group_by")
    return Query(group_by, _moment(asked, "since", now), _moment(asked, "until", now))


def _moment(asked: dict[str, str], name: str, now: float) -> float | None:
    text = asked.get(name, "")
    if not text:
        return None
    if ago := _AGO.fullmatch(text):
        return now - int(ago[1]) * _SECONDS[ago[2]]
    try:
        moment = dt.datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp()
    except (ValueError, OverflowError):
        raise BadRequest(
            f"{name} is {text[:40]!r}; give a day (2026-01-31), a time (2026-01-31T12:00:00Z), or how long ago: "
            "90s, 15m, 24h, 7d, 4w",
            param=name,
        ) from None


def report(query: Query, groups: list[Sums], prices: list[Price]) -> Report:
    """Make a report. prices: of all models, as far as they are known, the worst of which is what is saved on."""
    lines = [_line(sums, prices) for sums in groups]
    return Report(query.group_by, query.since, query.until, lines, _line(_together(groups), prices))


def _line(sums: Sums, prices: list[Price]) -> Line:
    worst = None
    if sums.usd is not None:
        worst = dearest(prices, Usage(sums.priced_in, sums.priced_out, sums.priced_cached))
    if worst is not None and sums.usd is not None:
        worst = max(worst, sums.usd)  # an engine's own price, which changes with its load, may be the worst of all
    return Line(
        group=sums.group,
        requests=sums.requests,
        tokens_in=sums.tokens_in,
        tokens_out=sums.tokens_out,
        tokens_cached=sums.tokens_cached,
        usd=sums.usd,
        unpriced=sums.unpriced,
        average_seconds=sums.seconds / max(sums.requests, 1),
        success_rate=sums.good / sums.requests if sums.requests else 1.0,
        usd_on_dearest=worst,
        saving=None if worst is None or sums.usd is None else worst - sums.usd,
        from_cache=sums.from_cache,
        usd_saved_by_cache=sums.saved,
    )


def _together(groups: list[Sums]) -> Sums:
    return Sums(
        group="total",
        usd=_sum(sums.usd for sums in groups),
        saved=_sum(sums.saved for sums in groups),
        **{
            name: sum(getattr(sums, name) for sums in groups)
            for name in Sums.__struct_fields__
            if name not in ("group", "usd", "saved")
        },
    )


def _sum(figures: Iterable[float | None]) -> float | None:
    """Return the sum of the figures that are known, None if none is."""
    known = [figure for figure in figures if figure is not None]
    return sum(known) if known else None
