"""What an engine says of itself on its page of metrics, and what follows for its load."""

import re
from typing import NamedTuple

from proxy.balancer.load import Told

_GAUGE = re.compile(
    r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|prefix_cache_queries_total"
    r"|prefix_cache_hits_total)(?:\{[^}\n]*\})? (\S+)$",
    re.MULTILINE,
)
_CACHE = re.compile(r"^vllm:cache_config_info\{([^}\n]*)\}", re.MULTILINE)
_LABEL = re.compile(r'(block_size|num_gpu_blocks)="(\d+)"')
_NEWEST = 0.2  # weight of the newest look in what we trust
_TELLING = 0.05  # share of prompts that must be expected in a cache before it is compared with what was there


class Gauges(NamedTuple):
    """Requests that run and wait, the share of the cache in use, tokens looked up and found ever, tokens it holds."""

    running: float
    waiting: float
    kv_usage: float
    queries: float
    hits: float
    capacity: float


class Seen(NamedTuple):
    """Counters at one look, ours and the engine's: tokens looked up and found, ever."""

    queries: float = 0.0
    hits: float = 0.0
    asked: float = 0.0
    found: float = 0.0


def read(page: str) -> Gauges | None:
    """Read vLLM's page of metrics, summed over its ranks (the usage of the cache: the highest). None for another's."""
    values: dict[str, list[float]] = {}
    for name, value in _GAUGE.findall(page):
        values.setdefault(name, []).append(_number(value))
    if "num_requests_running" not in values:
        return None
    sums = {name: sum(numbers) for name, numbers in values.items()}
    return Gauges(
        running=sums["num_requests_running"],
        waiting=sums.get("num_requests_waiting", 0.0),
        kv_usage=min(max(values.get("kv_cache_usage_perc", [0.0])), 1.0),
        queries=sums.get("prefix_cache_queries_total", 0.0),
        hits=sums.get("prefix_cache_hits_total", 0.0),
        capacity=sum(_capacity(labels) for labels in _CACHE.findall(page)),
    )


def _capacity(labels: str) -> float:
    found = dict(_LABEL.findall(labels))
    return float(found.get("block_size", 0)) * float(found.get("num_gpu_blocks", 0))


def _number(text: str) -> float:
    try:
        return max(float(text), 0.0)
    except ValueError:
        return 0.0


def judge(gauges: Gauges, in_flight: float, now: Seen, before: Seen, distrust: float) -> Told:
    """Return what the gauges tell of an endpoint.

    in_flight: the requests that we have there; what it has more is of others. now, before: the counters at this look
    and at the one before. distrust: what was told before; the share of our guesses that were wrong moves it.
    """
    foreign = max(gauges.running + gauges.waiting - in_flight, 0.0)
    return Told(
        foreign=foreign,
        waiting=min(foreign, gauges.waiting),
        kv_usage=gauges.kv_usage,
        capacity=gauges.capacity,
        distrust=distrust + _NEWEST * (_wrong(now, before, distrust) - distrust),
    )


def _wrong(now: Seen, before: Seen, otherwise: float) -> float:
    """Return the share of what we took for cached that was not; `otherwise` where too little happened to tell."""
    asked, queries = now.asked - before.asked, now.queries - before.queries
    if asked <= 0 or queries <= 0 or now.found - before.found < _TELLING * asked:
        return otherwise
    expected, seen = (now.found - before.found) / asked, (now.hits - before.hits) / queries
    return min(max(1.0 - seen / expected, 0.0), 1.0)
