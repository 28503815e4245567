"""What is under way at one endpoint, and what it has shown of itself."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

# Doubles of an endpoint that each worker writes for itself and sums over all. Those read for each pick:
IN_FLIGHT, TOKENS, LIVE = range(3)
# Those looked at a few times a second; the last five are told by the engine itself, to one worker:
CLOCK, PREFILLED, SECONDS, REQUESTS, ASKED, FOUND, FOREIGN, WAITING, KV_USAGE, CAPACITY, DISTRUST, SLOW = range(12)

_HALF_LIFE = 120.0  # seconds; of what was learned of an endpoint's speed
_ERROR_HALF_LIFE = 10.0
_PENALTY = 2.0  # requests that a failure counts for, as in the seed's adaptive selection; a success takes one off
_LAST_TEN = 0.1  # weight of the newest answer in the mean of about the last ten
_EACH = 36.0  # tokens of a prompt that a request in flight counts for: it slows each step of the engine
_FULL = 1.05  # share of the cache at which requests in flight would cost without end


class Scale:
    """How many tokens the bytes of a model's prompts make, learned from what its answers say they used."""

    __slots__ = ("_bytes", "_tokens")

    def __init__(self) -> None:
        # All mutable state: sums over prompts, older ones counting less; at first 4 bytes a token.
        self._bytes, self._tokens = 4000.0, 1000.0

    def __repr__(self) -> str:
        return f"<Scale {self.tokens_per_byte:.3f} tokens per byte>"

    @property
    def tokens_per_byte(self) -> float:
        return self._tokens / self._bytes

    def learn(self, size: int, tokens: int) -> None:
        """A prompt of so many bytes had so many tokens."""
        self._bytes = 0.99 * self._bytes + size
        self._tokens = 0.99 * self._tokens + tokens


class Load:
    """What is under way at one endpoint in all workers, as far as this one knows, and how fast the endpoint is.

    in_flight: requests. tokens: of prompts, those that no cache has, sent and not yet computed. clock: bytes of prompts
    that came new into its cache. rate: tokens of prompts it computes in a second. each: tokens that a request in flight
    counts for. others: what there is to do before a new request beside all that, as tokens. oldest: what the clock
    showed when the oldest came that is still in its cache. trust: share of what we take for cached that is.
    response_time: mean seconds of recent answers, 0.0 for none yet.
    """

    __slots__ = (
        "_failures", "_failures_at", "_learned_at", "_live", "_newest", "_slow", "clock", "each", "freed",
        "in_flight", "index", "last", "oldest", "others", "rate", "rated", "response_time", "scale", "tokens", "trust",
    )  # fmt: skip

    def __init__(
        self,
        live: "memoryview[float] | None" = None,
        slow: "memoryview[float] | None" = None,
        newest: "memoryview[float] | None" = None,
        *,
        index: int = 0,
        scale: Scale | None = None,
    ) -> None:
        """live, slow: this worker's doubles of the endpoint, LIVE and SLOW of them. newest: a double of all workers.

        Memory of its own if left out. index: of the endpoint in its model.
        """
        self.index = index
        self.scale = scale or Scale()
        # All mutable state: the doubles; what they and those of the other workers came to when last summed up, and has
        # changed since; when the endpoint's newest first token came to any worker; whether answers are rated,
        # which only one policy wants; whom to tell that a request is over;
        # the number of the last lease; how answers were of late, and when that was last faded.
        self._live = _doubles(LIVE) if live is None else live
        self._slow = _doubles(SLOW) if slow is None else slow
        self._newest = _doubles(1) if newest is None else newest
        self.rated = True
        self.freed: Callable[[], None] | None = None
        self.in_flight = 0.0
        self.tokens = 0.0
        self.clock = 0.0
        self.rate = PRIOR_RATE
        self.weigh()
        self.oldest = -_PRIOR_CAPACITY
        self.trust = 1.0
        self.last = 0
        self.response_time = 0.0
        self._failures = 0.0
        self._failures_at = 0.0
        self._learned_at = 0.0

    def __repr__(self) -> str:
        return f"<Load in_flight={self.in_flight:.0f} tokens={self.tokens:.0f} rate={self.rate:.0f}/s>"

    def move(
        self, live: "memoryview[float]", slow: "memoryview[float]", newest: "memoryview[float]", index: int
    ) -> None:
        """Go on in other doubles, with what there was in those before. index: as it is there."""
        for old, new in ((self._live, live), (self._slow, slow)):
            for i in range(len(old)):
                new[i], old[i] = old[i], 0.0
        newest[0] = max(newest[0], self._newest[0])
        self._live, self._slow, self._newest, self.index = live, slow, newest, index

    # Taking and giving back

    def lease(self, ask: "Ask | None" = None, now: float = 0.0, number: int = 0) -> "Lease":
        """Count one more request here until the lease is released. number: grows with each lease of the model."""
        self.in_flight += 1
        self._live[IN_FLIGHT] += 1
        self.last = number
        if ask is None:
            return Lease(self, _NOTHING, now)
        self._add(ask.uncached)
        self._slow[REQUESTS] += 1
        self._slow[ASKED] += ask.tokens
        self._slow[FOUND] += ask.tokens - ask.uncached
        return Lease(self, ask, now)

    def advance(self, size: float) -> float:
        """Move the clock by the bytes that come new into the cache; return what it shows."""
        self.clock += size
        self.oldest += size
        self._slow[CLOCK] += size
        return self.clock

    def _add(self, tokens: float) -> None:
        self.tokens += tokens
        self._live[TOKENS] += tokens

    def _end(self) -> None:
        self.in_flight -= 1
        self._live[IN_FLIGHT] -= 1
        if self.freed is not None:
            self.freed()

    # Learning

    def learn(self, slow: Sequence[float], mean: float) -> None:
        """Take the sums over all workers for the rest. mean: the rate of all endpoints of the model together.

        The mean counts as a second of observation: what was seen of an endpoint fades, so one that was slow once
        comes to be taken for an ordinary one, and is tried again.
        """
        self.clock = slow[CLOCK]
        self.rate = (slow[PREFILLED] + mean * _PRIOR_SECONDS) / (slow[SECONDS] + _PRIOR_SECONDS)
        waiting = slow[WAITING] * (slow[ASKED] - slow[FOUND]) / max(slow[REQUESTS], 1.0)
        self.weigh(slow[KV_USAGE], slow[FOREIGN], waiting)
        tokens = slow[CAPACITY]
        self.oldest = self.clock - (tokens / self.scale.tokens_per_byte if tokens else _PRIOR_CAPACITY)
        self.trust = 1.0 - slow[DISTRUST]

    def weigh(self, kv_usage: float = 0.0, foreign: float = 0.0, foreign_tokens: float = 0.0) -> None:
        """Take what an engine is kept busy with beside our prompts: requests in flight count for more as its cache
        fills up. kv_usage: share of its cache that running requests use. foreign: requests that others than this
        server sent it. foreign_tokens: of prompts of theirs that wait.
        """
        self.each = _EACH / (_FULL - kv_usage)
        self.others = foreign_tokens + self.each * (foreign + 1.0)

    def fade(self, now: float) -> None:
        """Let what was learned count for less."""
        factor = math.exp2((self._learned_at - now) / _HALF_LIFE)
        self._learned_at = now
        self._slow[PREFILLED] *= factor
        self._slow[SECONDS] *= factor

    def _prefilled(self, tokens: float, since: float, now: float) -> None:
        """A prompt was computed. An engine computes one after the other, so this one's turn began with the end of the
        one before: such spans do not overlap, and their sum is the time in which all these tokens were computed."""
        newest = self._newest[0]
        self._newest[0] = now
        self._slow[PREFILLED] += tokens
        self._slow[SECONDS] += max(now - max(since, newest), 0.0)

    def told(self, said: "Told") -> None:
        """Take what the engine says of itself. Whoever asks is the only worker that does."""
        self._slow[FOREIGN], self._slow[WAITING], self._slow[KV_USAGE] = said.foreign, said.waiting, said.kv_usage
        self._slow[CAPACITY], self._slow[DISTRUST] = said.capacity, said.distrust

    def _answered(self, seconds: float, now: float, *, failed: bool) -> None:
        failures = self.failures(now)
        self._failures = failures + _PENALTY if failed else max(failures - 1.0, 0.0)
        self._failures_at = now
        if not failed:
            mean = self.response_time or seconds
            self.response_time = mean + _LAST_TEN * (seconds - mean)

    def failures(self, now: float) -> float:
        """Return how many requests the failures of late count for; they fade."""
        if not self._failures:
            return 0.0
        return self._failures * math.exp2((self._failures_at - now) / _ERROR_HALF_LIFE)


class Ask(msgspec.Struct, frozen=True, gc=False):
    """What a request asks of the endpoint chosen. tokens: of its prompt, uncached: those of them to be computed."""

    size: int
    tokens: float
    uncached: float
    streamed: bool


class Told(NamedTuple):
    """What an engine's own metrics say, see gauges. waiting: of the foreign requests, those whose turn has not come.

    capacity: tokens, 0.0 if unknown. distrust: share of what we take for cached that is not.
    """

    foreign: float = 0.0
    waiting: float = 0.0
    kv_usage: float = 0.0
    capacity: float = 0.0
    distrust: float = 0.0


class Lease:
    """One request at one endpoint. `release()` may be called any number of times; it counts once.

    pending: tokens of its prompt that are still to be computed.
    """

    __slots__ = ("_ask", "_load", "_since", "pending")

    def __init__(self, load: Load, ask: Ask, since: float) -> None:
        # All mutable state: the load until released, and the tokens still to be computed.
        self._load: Load | None = load
        self.pending = ask.uncached
        self._ask = ask
        self._since = since

    def __repr__(self) -> str:
        return f"<Lease {'held' if self._load else 'released'} {self.pending:.0f} tokens pending>"

    def token(self, now: float | None) -> None:
        """The first token is here: the prompt is computed. now: None if that is only supposed."""
        load, pending = self._load, self.pending
        if load is None or not pending:
            return
        self.pending = 0.0
        load._add(-pending)
        if now is not None and self._ask.streamed:
            load._prefilled(pending, self._since, now)

    def release(self, now: float = 0.0, *, failed: bool = False, tokens_in: int = 0) -> None:
        """The request is over. failed: by the endpoint's fault. tokens_in: of the prompt, if the answer told."""
        load = self._load
        if load is None:
            return
        if self.pending:
            self.token(None)
        self._load = None
        if load.rated:
            load._answered(now - self._since, now, failed=failed)
        if tokens_in and self._ask.size:
            load.scale.learn(self._ask.size, tokens_in)
        load._end()


def _doubles(count: int) -> "memoryview[float]":
    return memoryview(bytearray(8 * count)).cast("d")


_NOTHING = Ask(0, 0.0, 0.0, True)
PRIOR_RATE = 5000.0  # tokens a second, of an endpoint of which nothing is known yet
_PRIOR_SECONDS = 1.0
_PRIOR_CAPACITY = 2e6  # bytes of prompts: half a million tokens, as the cache of a GPU with 80 GB has
