"""What each worker tells of each endpoint in the memory that they share: its breaker, and what failed there.

An endpoint has a row of doubles in the part of each worker. See proxy.metrics for the memory.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from proxy import cost
from proxy.cache.bulletin import Report
from proxy.cache.likeness import Tally, buckets
from proxy.telemetry import ERROR_TYPES, AttemptFailed, BreakerChanged, RequestFinished

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Key = tuple[str, str]  # model, endpoint

STATES: Final = ("closed", "half_open", "open")
_STATE, _UNTIL, _STOOD_IN, _RESUMED, _MARK, _BUSY, _WORK, _CHANGES = range(8)
_FAILURES: Final = _CHANGES + len(STATES)
WIDTH: Final = _FAILURES + len(ERROR_TYPES)
_ERROR_AT: Final = {name: _FAILURES + i for i, name in enumerate(ERROR_TYPES)}


class Condition(msgspec.Struct, frozen=True):
    """How an endpoint is: the number of workers whose breaker is in each state, all of them together.

    next_trial: seconds until the first of the open ones tries it again, None if none is open. opened: how often
    breakers did. failed: attempts that did.
    """

    model: str
    endpoint: str
    workers: dict[str, int]
    next_trial: float | None
    opened: int
    failed: int


def clear(own: "memoryview[float]", rows: Mapping[Key, int]) -> None:
    """A worker begins: it has opened no breaker yet, whatever the one before it had."""
    for at in rows.values():
        own[at + _STATE] = own[at + _UNTIL] = 0.0


def fail(own: "memoryview[float]", at: int, event: AttemptFailed) -> None:
    """Count an attempt that failed."""
    own[at + _ERROR_AT[event.error]] += 1


def change(own: "memoryview[float]", at: int, event: BreakerChanged) -> None:
    """Note the state of a breaker."""
    own[at + _STATE] = STATES.index(event.state)
    own[at + _UNTIL] = event.until
    own[at + _CHANGES + STATES.index(event.state)] += 1


def finish(own: "memoryview[float]", at: int, event: RequestFinished) -> None:
    """Count what was answered in the place of others."""
    own[at + _STOOD_IN] += event.level > 0 and event.error is None
    own[at + _RESUMED] += event.resumed


def begin_work(parts: Sequence["memoryview[float]"], own: "memoryview[float]", gauge: int, at: int, now: float) -> None:
    """A request goes to an endpoint: if it is the only one, of any worker, the endpoint is busy from now on."""
    if not _sum(parts, gauge):
        own[at + _MARK] = now


def mark(own: "memoryview[float]", at: int, now: float) -> None:
    """Begin to measure the work of an endpoint."""
    own[at + _MARK] = now


def end_work(parts: Sequence["memoryview[float]"], own: "memoryview[float]", at: int, now: float, done: float) -> None:
    """A request is over at an endpoint, which was busy since the last mark of any worker. done: see cost.work."""
    own[at + _BUSY] = cost.faded(own[at + _BUSY], max(now - max(part[at + _MARK] for part in parts), 0.0))
    own[at + _WORK] = cost.faded(own[at + _WORK], done)
    own[at + _MARK] = now


def throughput(parts: Sequence["memoryview[float]"], at: int) -> tuple[float, float]:
    """Return the seconds in which an endpoint was busy of late, and the work that it did in them."""
    return _sum(parts, at + _BUSY), _sum(parts, at + _WORK)


def conditions(parts: Sequence["memoryview[float]"], rows: Mapping[Key, int], now: float) -> list[Condition]:
    """Read how each endpoint is, from the parts of all workers. now: by the monotonic clock."""
    return [_condition(parts, key, at, now) for key, at in rows.items()]


def _condition(parts: Sequence["memoryview[float]"], key: Key, at: int, now: float) -> Condition:
    states = [STATES[int(part[at + _STATE])] for part in parts]
    ends = [part[at + _UNTIL] for part in parts if part[at + _UNTIL]]
    opened = sum(part[at + _CHANGES + STATES.index("open")] for part in parts)
    failed = sum(sum(part[at + _FAILURES : at + WIDTH]) for part in parts)
    workers = {state: states.count(state) for state in STATES}
    next_trial = max(0.0, min(ends) - now) if ends else None
    return Condition(*key, workers, next_trial, int(opened), int(failed))


def families(
    parts: Sequence["memoryview[float]"], rows: Mapping[Key, int], current: Container[Key]
) -> Iterator["Metric"]:
    """Yield what Prometheus is shown. current: the endpoints that there are now; of others, only what was counted."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = ("model_name", "endpoint")
    breakers = GaugeMetricFamily(
        "polyvox_breakers", "Workers whose breaker of an endpoint is in a state", labels=(*labels, "state")
    )
    changes = CounterMetricFamily(
        "polyvox_breaker_transitions",
        "Changes of the breakers of an endpoint, by the new state",
        labels=(*labels, "state"),
    )
    failed = CounterMetricFamily(
        "polyvox_attempt_failures", "Requests that failed at an endpoint, and may have gone on elsewhere",
        labels=(*labels, "error_type"),
    )  # fmt: skip
    rows = {key: at for key, at in rows.items() if key in current or _has_counted(parts, at)}
    for found in conditions(parts, {key: at for key, at in rows.items() if key in current}, 0.0):
        for state, count in found.workers.items():
            breakers.add_metric((found.model, found.endpoint, state), count)
    for key, at in rows.items():
        for i, state in enumerate(STATES):
            changes.add_metric((*key, state), _sum(parts, at + _CHANGES + i))
        for name, where in _ERROR_AT.items():
            if failures := _sum(parts, at + where):
                failed.add_metric((*key, name), failures)
    yield from (breakers, changes, failed)
    for name, text, where in (
        ("polyvox_fallbacks", "Requests for another model that this one answered", _STOOD_IN),
        ("polyvox_streams_resumed", "Streams that broke elsewhere and went on here", _RESUMED),
    ):
        family = CounterMetricFamily(name, text, labels=labels)
        for key, at in rows.items():
            family.add_metric(key, _sum(parts, at + where))
        yield family


def stored(told: Report) -> Iterator["Metric"]:
    """Yield what Prometheus is shown of the stores of all workers."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    if told.entries is not None:
        yield GaugeMetricFamily("polyvox_cache_entries", "Answers that are kept", value=told.entries)
    if told.bytes is not None:
        yield GaugeMetricFamily("polyvox_cache_bytes", "Memory that kept answers take", value=told.bytes)
    yield CounterMetricFamily("polyvox_cache_stores", "Answers that were kept", value=told.stored)
    yield CounterMetricFamily("polyvox_cache_evictions", "Answers that made room for others", value=told.evicted)


def compared(tallies: Mapping[str, Tally]) -> Iterator["Metric"]:
    """Yield what Prometheus is shown of questions that are compared by their meaning, by alias."""
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

    reports = {name: tally.report() for name, tally in tallies.items()}
    for name, text, field in (
        ("questions", "Requests that were compared with earlier ones by their meaning", "questions"),
        ("unanswered", "Questions for which no vector came in time", "unanswered"),
        ("hits", "Questions that had an earlier one near enough", "hits"),
    ):
        family = CounterMetricFamily(f"polyvox_semantic_{name}", text, labels=["model_name"])
        for alias, report in reports.items():
            family.add_metric([alias], getattr(report, field))
        yield family
    nearest = HistogramMetricFamily(
        "polyvox_semantic_similarity", "Cosine of questions to the nearest earlier one", labels=["model_name"]
    )
    for alias, report in reports.items():
        nearest.add_metric([alias], buckets(report), sum_value=None)
    yield nearest


def _has_counted(parts: Sequence["memoryview[float]"], at: int) -> bool:
    return any(_sum(parts, at + i) for i in (_STOOD_IN, _RESUMED, *range(_CHANGES, WIDTH)))


def _sum(parts: Sequence["memoryview[float]"], at: int) -> float:
    return sum(part[at] for part in parts)
