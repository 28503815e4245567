"""Which endpoint gets the next request: one small pure function for each policy. Chance and time are arguments.

Each takes the loads of the endpoints that can be had, at least one, and returns the index of its choice.
"""

from collections.abc import Callable, Sequence

from proxy.balancer.load import Load

Chance = Callable[[], float]  # uniform in [0, 1)

# Of predicted_ttft, in tokens of a prompt. Found on traces of conversations, see benchmarks/BALANCING.md.
_OWN = 2.0  # what a token that has to be computed for this request counts: it keeps conversations where they are
_JITTER = 0.02  # workers that see the same do not all choose the same


def round_robin(loads: Sequence[Load]) -> int:
    """The endpoint whose last request is the longest ago."""
    return min(range(len(loads)), key=lambda i: loads[i].last)


def least_loaded(loads: Sequence[Load]) -> int:
    """The endpoint with the fewest requests in flight; of equals, the one used the longest ago."""
    return min(range(len(loads)), key=lambda i: (loads[i].in_flight, loads[i].last))


def weighted_random(weights: Sequence[float], chance: Chance) -> int:
    """An endpoint by chance, in proportion to its weight."""
    left = chance() * sum(weights)
    for i, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return i
    return max(range(len(weights)), key=lambda i: weights[i])  # all weights are 0, or rounding left a rest


def adaptive(loads: Sequence[Load], now: float) -> int:
    """The endpoint with the best score: 0.7 for its load, 0.3 for its response time.

    load: 1 / (1 + requests in flight + failures of late), where a failure counts 2, a success takes 1 off, and 10
    seconds halve what is left. time: that of the fastest endpoint / its own, a mean of about the last ten answers; 1
    for one without answers yet. Both are in (0, 1]. Of equals, the one used the longest ago.
    """
    fastest = min((load.response_time for load in loads if load.response_time), default=0.0)

    def score(i: int) -> tuple[float, int]:
        load = loads[i]
        time = fastest / load.response_time if load.response_time else 1.0
        return 0.7 / (1.0 + load.in_flight + load.failures(now)) + 0.3 * time, -load.last

    return max(range(len(loads)), key=score)


def predicted_ttft(loads: Sequence[Load], uncached: Sequence[float], chance: Chance) -> int:
    """The endpoint from which the first token is expected soonest.

    That is (tokens waiting to be computed + own * tokens of this prompt that its cache lacks + each * requests in
    flight, others' and this one included) / tokens it computes in a second. What `each` is see Load.weigh.
    """
    best, soonest = 0, float("inf")
    for i, load in enumerate(loads):
        tokens = load.tokens + _OWN * uncached[i] + load.each * load.in_flight + load.others
        seconds = tokens / load.rate * (1.0 + _JITTER * chance())
        if seconds < soonest:
            best, soonest = i, seconds
    return best
