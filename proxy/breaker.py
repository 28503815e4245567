"""Whether an endpoint is asked at all: a circuit breaker. And whether others come first, as it wants a rest. Pure.

Time and chance are arguments. The pattern is Nygard's ("Release It!"); that an outcome counts only for the state in
which its request began is sony/gobreaker's; the window is the two-bucket estimate that nginx' and Cloudflare's rate
limits use.

    CLOSED     --failing-->    OPEN         so many failures in a row, or such a share of failures in the window
    OPEN       --waited-->     HALF_OPEN    the recovery time is over, or a health check says that it is back
    HALF_OPEN  --succeeded-->  CLOSED
    HALF_OPEN  --failed-->     OPEN         for twice as long as the last time
    any        --renewed-->    CLOSED       another process is there, of which nothing is known
"""

from collections.abc import Callable
from enum import Enum
from typing import Final

import msgspec

from proxy.config import BreakerSettings


class State(Enum):
    """CLOSED: all requests may go. OPEN: none. HALF_OPEN: one at a time, as a trial."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Outcome(Enum):
    """How a request to an endpoint ended. NEUTRAL says nothing of it: the client went, or asked for what cannot be."""

    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"


class Move(Enum):
    """What changes a state."""

    FAILING = "failing"
    WAITED = "waited"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RENEWED = "renewed"


MOVES: Final[dict[tuple[State, Move], State]] = {
    (State.CLOSED, Move.FAILING): State.OPEN,
    (State.OPEN, Move.WAITED): State.HALF_OPEN,
    (State.HALF_OPEN, Move.SUCCEEDED): State.CLOSED,
    (State.HALF_OPEN, Move.FAILED): State.OPEN,
    **{(state, Move.RENEWED): State.CLOSED for state in State},
}

_CLOSED: Final = State.CLOSED  # looking a member up in its class takes longer than all the rest of allow()
_SUCCESS, _FAILURE, _NEUTRAL = Outcome
_SPREAD: Final = 0.2  # of a recovery time, each way: breakers that opened together try again apart
_DISBELIEF: Final = 4.0  # seconds; how long a health check is not believed after the first trial that it led to failed
_A_MOMENT: Final = 1.0  # seconds; what a trial takes, and being busy, as far as we know


class Change(msgspec.Struct, frozen=True):
    """A breaker has changed. seconds: for how long it is open, 0 unless it is."""

    before: State
    after: State
    seconds: float = 0.0


def _nobody(change: Change) -> None:
    pass


class Breaker:
    """The breaker of one endpoint in one worker.

    `allow` asks, `begin` says that a request goes, `record` how it ended, under the ticket that `begin` gave.
    """

    __slots__ = (
        "_avoid_until", "_bad", "_bad_before", "_believe_at", "_changed", "_good", "_good_before", "_openings",
        "_random", "_row", "_ticket", "_until", "_window", "settings", "state",
    )  # fmt: skip

    def __init__(
        self, settings: BreakerSettings, random: Callable[[], float], changed: Callable[[Change], None] = _nobody
    ) -> None:
        self._random = random
        self._changed = changed
        # All mutable state: the settings, which may be others later; the state, and a number for it that grows with
        # each change and each trial.
        self.settings = settings
        self.state = State.CLOSED
        self._ticket = 0
        # Closed: failures in a row; those and successes in the current window, which has a number, and the one before.
        self._row = 0
        self._window = 0
        self._good = self._bad = self._good_before = self._bad_before = 0
        # Open: until when, openings in a row, and from when a health check is believed. Half open: until when the
        # trial that is under way may take; 0 for none.
        self._until = 0.0
        self._openings = 0
        self._believe_at = 0.0
        # Whatever the state: until when others come before it.
        self._avoid_until = 0.0

    def __repr__(self) -> str:
        return f"<Breaker {self.state.value}, {self._row} failures in a row, {self._openings} openings>"

    def allow(self, now: float) -> bool:
        """Say whether a request may go. Changes nothing."""
        return self.state is _CLOSED or now >= self._until

    def avoid(self, now: float) -> bool:
        """Say whether others are to be asked first."""
        return now < self._avoid_until

    def wait(self, now: float) -> float:
        """Return the seconds until a request may go, as far as that is known."""
        return {State.CLOSED: 0.0, State.OPEN: max(0.0, self._until - now), State.HALF_OPEN: _A_MOMENT}[self.state]

    def begin(self, now: float) -> int:
        """A request goes, which is allowed: return its ticket."""
        if self.state is not _CLOSED:
            self._begin_trial(now)
        return self._ticket

    def record(self, outcome: Outcome, now: float, ticket: int) -> int:
        """A request has ended, or shown how it will. Return the ticket for what is still to be said of it."""
        if ticket != self._ticket:  # it began before the last change, or its trial took too long
            return ticket
        if self.state is _CLOSED:
            if outcome is not _NEUTRAL:
                self._count(outcome is _SUCCESS, now)
        elif outcome is _NEUTRAL:
            self._until = 0.0  # the trial was none: another may follow
        elif outcome is _SUCCESS:
            self._move(Move.SUCCEEDED)
        else:
            self._open(Move.FAILED, now)
        return self._ticket

    def rest(self, now: float, seconds: float | None) -> float:
        """The endpoint is too busy, for some seconds, or a moment if it did not say. Return until when."""
        asked = _A_MOMENT if seconds is None else min(seconds, self.settings.recovery)
        self._avoid_until = max(self._avoid_until, now + asked)
        return self._avoid_until

    def recovered(self, now: float) -> None:
        """A health check was passed. It ends the wait for a trial, unless the last such trial failed just now."""
        if self.state is State.OPEN and now >= self._believe_at:
            self._move(Move.WAITED)
            self._until = 0.0

    def renew(self) -> None:
        """Another process is at the endpoint."""
        self._avoid_until = 0.0
        self._move(Move.RENEWED)

    def _begin_trial(self, now: float) -> None:
        if self.state is State.OPEN:
            self._move(Move.WAITED)
        self._ticket += 1  # an earlier trial that never reported is given up
        self._until = now + self.settings.recovery

    def _count(self, good: bool, now: float) -> None:
        window = int(now // self.settings.window)
        if window != self._window:
            self._turn(window)
        if good:
            self._row = 0
            self._good += 1
            return
        self._row += 1
        self._bad += 1
        if self._row >= self.settings.failures or self._too_many(now):
            self._open(Move.FAILING, now)

    def _turn(self, window: int) -> None:
        """A new window begins; of the last one what is left counts less and less."""
        follows = window == self._window + 1
        self._good_before, self._bad_before = (self._good, self._bad) if follows else (0, 0)
        self._good = self._bad = 0
        self._window = window

    def _too_many(self, now: float) -> bool:
        settings = self.settings
        left = 1.0 - (now / settings.window) % 1.0
        good, bad = self._good + left * self._good_before, self._bad + left * self._bad_before
        return good + bad >= settings.minimum and bad >= settings.error_rate * (good + bad)

    def _open(self, move: Move, now: float) -> None:
        self._openings += 1
        doubled = self.settings.recovery * 2.0 ** min(self._openings - 1, 30)
        wait = min(doubled, self.settings.max_recovery) * (1 - _SPREAD + 2 * _SPREAD * self._random())
        self._until = now + wait
        failed = self._openings - 1
        self._believe_at = now + (min(_DISBELIEF * 2.0 ** min(failed - 1, 30), wait) if failed else 0.0)
        self._move(move, wait)

    def _move(self, move: Move, seconds: float = 0.0) -> None:
        before, self.state = self.state, MOVES[self.state, move]
        self._ticket += 1
        if self.state is State.CLOSED:
            self._row = self._openings = self._good = self._bad = self._good_before = self._bad_before = 0
            self._until = 0.0
        if self.state is not before:
            self._changed(Change(before, self.state, seconds))
