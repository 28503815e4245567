"""Prometheus: counters in memory that all workers of a server share, so that any of them can show their sum.

Prometheus' own client costs a lock and a dictionary for each figure, and ten times that with several processes. Here a
series is a row of doubles whose place is known beforehand, as models, endpoints, operations and errors are: counting is
adding to a double. Each worker writes a part of its own, and reads those of the others.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec

from proxy import figures
from proxy.accounting import FINISH_REASONS, Usage
from proxy.cache import likeness
from proxy.cache.bulletin import Report
from proxy.cache.likeness import Tally
from proxy.config import Config
from proxy.cost import work
from proxy.shared import Shared, Slot, Slots, slots_of
from proxy.telemetry import (
    CACHE_RESULTS,
    ERROR_TYPES,
    OPERATIONS,
    OTHER,
    UNKNOWN,
    AttemptFailed,
    BreakerChanged,
    RequestFinished,
    RequestQueued,
    RequestStarted,
)

if TYPE_CHECKING:
    from prometheus_client.core import Metric

# Upper bounds in seconds: vLLM's. Those that OpenTelemetry has for first and further tokens are a part of them.
# fmt: off
_FIRST = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)
_EACH = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_ALL = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_OURS = (.00005, .0001, .00015, .0002, .0003, .0005, .001, .002, .005, .01, .025, .05, .1, .5, 1, 5)
# fmt: on

_OUTCOMES = (*FINISH_REASONS, *ERROR_TYPES)
_OUTCOME_AT: dict[tuple[str | None, str], int] = {(None, reason): i for i, reason in enumerate(FINISH_REASONS)} | {
    (error, reason): len(FINISH_REASONS) + i for i, error in enumerate(ERROR_TYPES) for reason in FINISH_REASONS
}


class Histogram(msgspec.Struct, frozen=True):
    """A histogram's place in a series: a double for each bucket, one for what is above all, and one for the sum."""

    name: str
    help: str
    bounds: tuple[float, ...]
    at: int
    sum_at: int


class Counter(msgspec.Struct, frozen=True):
    """A counter's place in a series."""

    name: str
    help: str
    at: int


def _histograms(at: int, *described: tuple[str, str, tuple[float, ...]]) -> Iterator[Histogram]:
    for name, text, bounds in described:
        histogram = Histogram(name, text, bounds, at, at + len(bounds) + 1)
        yield histogram
        at = histogram.sum_at + 1


# A series: how often each outcome was, then the tokens, then the histograms.
_IN, _OUT, _CACHED = _TOKENS = (
    Counter("polyvox_prompt_tokens", "Tokens of prompts", len(_OUTCOMES)),
    Counter("polyvox_generation_tokens", "Tokens generated", len(_OUTCOMES) + 1),
    Counter("polyvox_prompt_tokens_cached", "Tokens of prompts found in a cache of the engine", len(_OUTCOMES) + 2),
)
_COST = Counter("polyvox_cost_usd", "What requests cost whose cost is known", len(_OUTCOMES) + len(_TOKENS))
_SAVED = Counter("polyvox_cache_saved_usd", "What the answers of the cache would have cost", _COST.at + 1)
_RESULTS = {result: _SAVED.at + 1 + i for i, result in enumerate(CACHE_RESULTS)}
_TTFT, _TPOT, _E2E, _OVERHEAD = _HISTOGRAMS = tuple(
    _histograms(
        _SAVED.at + 1 + len(_RESULTS),
        ("polyvox_time_to_first_token_seconds", "Of streams, from the request being here", _FIRST),
        ("polyvox_request_time_per_output_token_seconds", "Of streams, for each token after the first", _EACH),
        ("polyvox_e2e_request_latency_seconds", "From the request being here to the end of the answer", _ALL),
        ("polyvox_request_overhead_seconds", "What Polyvox itself took before it sent, and before it answered", _OURS),
    )
)
_WIDTH = _OVERHEAD.sum_at + 1


# What there is once for a server, at the start: of its configuration, written by the parent process.
_GENERATION, _RELOADED, _REFUSED, _COMMON = range(4)

_KINDS = (*dict.fromkeys(OPERATIONS.values()), OTHER)
# What a model, or an endpoint, has room for: a gauge, a row of figures, a series for each kind of request; and what was
# counted of questions that are compared by their meaning.
_ROW = 1
_SERIES = _ROW + figures.WIDTH
_TALLY = _SERIES + len(_KINDS) * _WIDTH
_ROOM = _TALLY + likeness.WIDTH


class Layout:
    """Where the doubles of a worker are: gauges of endpoints and queues, each series, the row of each endpoint.

    The room of each model and endpoint for all workers is in one piece, behind those that came before.
    """

    def __init__(self, slots: Sequence[Slot], workers: int) -> None:
        models = [(UNKNOWN, ""), *((slot.model, e) for slot in slots for e in ("", *slot.endpoints))]
        rooms = {key: i * _ROOM * workers for i, key in enumerate(dict.fromkeys(models))}
        self.gauges = {key: at for key, at in rooms.items() if key[1]}
        self.queues = {model: at for (model, endpoint), at in rooms.items() if not endpoint}
        self.series = {(*key, o): at + _SERIES + i * _WIDTH for key, at in rooms.items() for i, o in enumerate(_KINDS)}
        self.rows = {key: at + _ROW for key, at in self.gauges.items()}
        self.size = _COMMON + len(rooms) * _ROOM * workers
        self.elsewhere = self.series[UNKNOWN, "", OTHER]

    def __repr__(self) -> str:
        return f"<Layout {len(self.gauges)} gauges, {len(self.series)} series>"


class Metrics:
    """The figures of one worker, and a view of those of all."""

    def __init__(
        self,
        config: Config,
        worker: int = 0,
        memory: int = -1,
        clock: Callable[[], float] = time.monotonic,
        slots: Slots | None = None,
    ) -> None:
        """Take part `worker` of the memory behind a descriptor, which all workers lay out alike; -1: my own.

        slots: what has room there; the configuration's models, if left out.
        """
        self._memory = Shared(memory)
        self._worker, self._workers = worker, config.server.workers
        self._clock = clock
        # Who knows what the stores of the cache hold, where there is one.
        self.stores: Callable[[], Report] | None = None
        # All mutable state: where everything is, which models are current and which hosted, and the doubles of all
        # workers, of which this one writes its own only; of aliases whose questions are compared, what was counted.
        self._hosted: frozenset[str] = frozenset()
        self.tallies: dict[str, Tally] = {}
        self.follow(config, slots or slots_of(config))
        # The worker that had this part before may have died in the middle.
        for gauge in (*self._layout.gauges.values(), *self._layout.queues.values()):
            self._own[gauge] = 0.0
        figures.clear(self._own, self._layout.rows)

    def __repr__(self) -> str:
        return f"<Metrics {self._layout!r}>"

    def follow(self, config: Config, slots: Slots) -> None:
        """Count for the models of another configuration. What was counted stays, also of models that are gone."""
        self._layout = Layout(slots.given, self._workers)
        self._shown = _keys(slots)
        before, self._hosted = self._hosted, frozenset(n for n, model in config.models.items() if model.hosting)
        self._all = self._memory.doubles(self._layout.size)
        self._parts = _parts(self._all, self._workers)
        self._own = self._parts[self._worker]
        for key, row in self._layout.rows.items():
            if key[0] in self._hosted - before:  # what is under way there counts from now on
                figures.mark(self._own, row, self._clock())
        cache = config.cache_settings()
        places = {name: self._layout.queues[name] + _TALLY for name in (cache.semantics() if cache else ())}
        self.tallies = {name: Tally(self._parts, self._worker, at) for name, at in places.items()}

    def started(self, event: RequestStarted) -> None:
        key = (event.model, event.endpoint)
        gauge = self._layout.gauges.get(key)
        if gauge is not None:
            if event.model in self._hosted:
                figures.begin_work(self._parts, self._own, gauge, self._layout.rows[key], self._clock())
            self._own[gauge] += 1

    def queued(self, event: RequestQueued) -> None:
        self._own[self._layout.queues[event.model]] += 1 if event.waits else -1

    def failed(self, event: AttemptFailed) -> None:
        key = (event.model, event.endpoint)
        if key in self._layout.gauges:
            self._own[self._layout.gauges[key]] -= 1
            figures.fail(self._own, self._layout.rows[key], event)
            if event.model in self._hosted:
                figures.end_work(self._parts, self._own, self._layout.rows[key], self._clock(), 0.0)

    def changed(self, event: BreakerChanged) -> None:
        row = self._layout.rows.get((event.model, event.endpoint))
        if row is not None:
            figures.change(self._own, row, event)

    def finished(self, event: RequestFinished) -> None:
        own, layout = self._own, self._layout
        gauge = layout.gauges.get((event.model, event.endpoint))
        if gauge is not None:
            own[gauge] -= event.under_way
            if event.model in self._hosted and event.under_way:
                self._end_work(event)
            if event.level or event.resumed:
                figures.finish(own, layout.rows[event.model, event.endpoint], event)
        at = layout.series.get((event.model, event.endpoint, event.operation), layout.elsewhere)
        own[at + _OUTCOME_AT[event.error, event.finish_reason]] += 1
        own[at + _IN.at] += event.tokens_in
        own[at + _OUT.at] += event.tokens_out
        own[at + _CACHED.at] += event.tokens_cached
        if event.usd:
            own[at + _COST.at] += event.usd
        if event.cache:
            own[at + _RESULTS[event.cache]] += 1
            if event.saved:
                own[at + _SAVED.at] += event.saved
        self._observe(at, _E2E, event.seconds)
        if event.to_first_token is not None:
            self._observe(at, _TTFT, event.to_first_token)
        if event.per_token is not None:
            self._observe(at, _TPOT, event.per_token)
        if event.overhead is not None:
            self._observe(at, _OVERHEAD, event.overhead)

    def _end_work(self, event: RequestFinished) -> None:
        done = work(Usage(event.tokens_in, event.tokens_out, event.tokens_cached))
        figures.end_work(self._parts, self._own, self._layout.rows[event.model, event.endpoint], self._clock(), done)

    def throughput(self, model: str, endpoint: str) -> tuple[float, float]:
        """Return what all workers know of an endpoint whose hosting is known: see figures.throughput."""
        return figures.throughput(self._parts, self._layout.rows[model, endpoint])

    def tokens_per_second(self, model: str) -> float | None:
        """Return how fast the streams of a model came, to all workers since the start; None before the first."""
        places = [at for (name, _, _), at in self._layout.series.items() if name == model]
        rows = [_summed(self._parts, at + _TPOT.at, _TPOT.sum_at + 1 - _TPOT.at) for at in places]
        count, seconds = sum(sum(row[:-1]) for row in rows), sum(row[-1] for row in rows)
        return count / seconds if seconds > 0 else None

    def _observe(self, at: int, histogram: Histogram, value: float) -> None:
        self._own[at + histogram.at + bisect_left(histogram.bounds, value)] += 1
        self._own[at + histogram.sum_at] += value

    def page(self, accept: str) -> tuple[bytes, bytes]:
        """Return the content type and the text for Prometheus: all workers of this server together."""
        # Imported here because it takes longer than a fifth of the rest of the start.
        from prometheus_client.exposition import choose_encoder

        encode, content_type = choose_encoder(accept)
        return content_type.encode(), encode(_Collected(list(self._collect())))

    def _collect(self) -> Iterator["Metric"]:
        parts = self._parts
        counted = {key: at for key, at in self._layout.series.items() if any(_summed(parts, at, len(_OUTCOMES)))}
        rows = {key: _summed(parts, at, _WIDTH) for key, at in counted.items()}
        gauges = {key: _summed(parts, at, 1)[0] for key, at in self._layout.gauges.items()}
        queues = {model: _summed(parts, at, 1)[0] for model, at in self._layout.queues.items()}
        yield from _configuration(self._all)
        yield _waiting({model: value for model, value in queues.items() if value or (model, "") in self._shown})
        yield from _families(rows, {key: value for key, value in gauges.items() if value or key in self._shown})
        yield from figures.families(parts, self._layout.rows, self._shown)
        if self.tallies:
            yield from figures.compared(self.tallies)
        if self.stores is not None:
            yield from figures.stored(self.stores())


def conditions(slots: Slots, workers: int, memory: int) -> list[figures.Condition]:
    """Return how each endpoint is, from the memory of a running server's workers, of which nothing is changed."""
    layout, shown = Layout(slots.given, workers), _keys(slots)
    parts = _parts(Shared(memory).doubles(layout.size), workers)
    return figures.conditions(parts, {key: at for key, at in layout.rows.items() if key in shown}, time.monotonic())


def _keys(slots: Slots) -> frozenset[figures.Key]:
    """Return models (with an endpoint of "") and endpoints that there are now."""
    models = (slot for slot in slots.current if slot.endpoints)
    return frozenset((slot.model, endpoint) for slot in models for endpoint in ("", *slot.endpoints))


def _parts(every: "memoryview[float]", workers: int) -> list["memoryview[float]"]:
    """Return what each worker sees: the same place has the same number in each."""
    return [every[_COMMON + i * _ROOM :] for i in range(workers)]


def note_reload(memory: int, generation: int, when: float | None) -> None:
    """Show which configuration the workers follow. when: it came, by UNIX time; None: another came, and was refused."""
    common = Shared(memory).doubles(_COMMON)
    common[_GENERATION], common[_REFUSED] = generation, when is None
    if when is not None:
        common[_RELOADED] = when


class _Collected:
    """What prometheus_client takes for a registry."""

    def __init__(self, metrics: list["Metric"]) -> None:
        self._metrics = metrics

    def collect(self) -> list["Metric"]:
        return self._metrics


_Rows = dict[tuple[str, str, str], list[float]]


def _summed(parts: Sequence["memoryview[float]"], at: int, width: int) -> list[float]:
    return [sum(column) for column in zip(*(part[at : at + width] for part in parts), strict=True)]


def _configuration(common: "memoryview[float]") -> Iterator["Metric"]:
    from prometheus_client.core import GaugeMetricFamily

    name = "polyvox_config"
    yield GaugeMetricFamily(f"{name}_generation", "Configurations since the start", common[_GENERATION])
    yield GaugeMetricFamily(
        f"{name}_last_reload_successful", "Whether the last one that came was valid", float(not common[_REFUSED])
    )
    yield GaugeMetricFamily(
        f"{name}_last_reload_success_timestamp_seconds", "When the one that is followed came", common[_RELOADED]
    )


def _waiting(queues: dict[str, float]) -> "Metric":
    from prometheus_client.core import GaugeMetricFamily

    waiting = GaugeMetricFamily(
        "polyvox_num_requests_waiting", "Requests that wait for an endpoint", labels=["model_name"]
    )
    for model, value in queues.items():
        waiting.add_metric([model], value)
    return waiting


def _families(rows: _Rows, gauges: dict[tuple[str, str], float]) -> Iterator["Metric"]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    running = GaugeMetricFamily(
        "polyvox_num_requests_running", "Requests under way at an endpoint", labels=("model_name", "endpoint")
    )
    for place, value in gauges.items():
        running.add_metric(place, value)
    yield running
    requests = CounterMetricFamily("polyvox_requests", "Requests that are over, however they ended", labels=_LABELS)
    for labels, row in rows.items():
        requests.add_metric(labels, sum(row[: len(_OUTCOMES)]))
    yield requests
    yield _by_outcome(rows, "polyvox_request_success", "Requests without an error, by how they ended",
                      "finished_reason", FINISH_REASONS, 0)  # fmt: skip
    yield _by_outcome(rows, "polyvox_request_errors", "Requests that failed, by why",
                      "error_type", ERROR_TYPES, len(FINISH_REASONS))  # fmt: skip
    yield _by_outcome(rows, "polyvox_cache_requests", "Requests by what the cache did for them", "result",
                      CACHE_RESULTS, _RESULTS[CACHE_RESULTS[0]])  # fmt: skip
    for counter in (*_TOKENS, _COST, _SAVED):
        yield _counter(rows, counter)
    for histogram in _HISTOGRAMS:
        yield _histogram(rows, histogram)


_LABELS = ("model_name", "endpoint", "operation")


def _by_outcome(rows: _Rows, name: str, text: str, label: str, values: tuple[str, ...], first: int) -> "Metric":
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(name, text, labels=(*_LABELS, label))
    for labels, row in rows.items():
        for i, value in enumerate(values, first):
            if row[i]:
                family.add_metric((*labels, value), row[i])
    return family


def _counter(rows: _Rows, counter: Counter) -> "Metric":
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(counter.name, counter.help, labels=_LABELS)
    for labels, row in rows.items():
        family.add_metric(labels, row[counter.at])
    return family


def _histogram(rows: _Rows, histogram: Histogram) -> "Metric":
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(histogram.name, histogram.help, labels=_LABELS)
    names = [*(repr(float(bound)) for bound in histogram.bounds), "+Inf"]
    for labels, row in rows.items():
        counts = list(accumulate(row[histogram.at : histogram.sum_at]))
        if counts[-1]:
            family.add_metric(labels, list(zip(names, counts, strict=True)), row[histogram.sum_at])
    return family
