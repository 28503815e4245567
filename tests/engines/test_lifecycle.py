"""The decisions: moves, commands, restart delays, hangs."""

from itertools import product
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engines.lifecycle import (
    MOVES,
    HangWatch,
    IllegalMove,
    Sample,
    check_command,
    describe_exit,
    move,
    next_delay,
)
from engines.spec import Restart, State

STATES = get_args(State)
LEGAL = {
    ("stopped", "starting"),
    ("starting", "ready"),
    ("starting", "draining"),
    ("starting", "failed"),
    ("ready", "draining"),
    ("ready", "failed"),
    ("draining", "stopped"),
    ("failed", "starting"),
    ("failed", "stopped"),
}


@pytest.mark.parametrize(("current", "target"), sorted(LEGAL))
def test_a_legal_move_gives_the_new_state(current: State, target: State) -> None:
    assert move(current, target) == target


@pytest.mark.parametrize(("current", "target"), sorted(set(product(STATES, STATES)) - LEGAL))
def test_an_illegal_move_raises_and_names_both_states(current: State, target: State) -> None:
    with pytest.raises(IllegalMove, match=f"{current} to {target}"):
        move(current, target)


@pytest.mark.parametrize("state", STATES)
def test_every_state_can_be_reached_from_every_other(state: State) -> None:
    reached = {state}
    while more := {target for source in reached for target in MOVES[source]} - reached:
        reached |= more
    assert reached == set(STATES)


def test_a_command_that_makes_no_sense_names_the_engine_its_state_and_the_legal_states() -> None:
    with pytest.raises(IllegalMove, match=r"unload engine tiny/0 while it is stopped.*failed, ready, starting"):
        check_command("unload", "tiny/0", "stopped")


@pytest.mark.parametrize("state", ["starting", "ready"])
def test_loading_what_is_loaded_is_allowed(state: State) -> None:
    check_command("load", "tiny/0", state)


def test_delays_grow_by_the_factor_up_to_the_longest() -> None:
    policy = Restart(first_delay=1, factor=2, max_delay=5, give_up_after=10)
    assert [next_delay([0.0] * crashes, 0.0, policy) for crashes in (1, 2, 3, 4)] == [1, 2, 4, 5]


def test_the_supervisor_gives_up_after_the_last_allowed_crash_in_the_window() -> None:
    policy = Restart(give_up_after=3, window=100)
    assert next_delay([0, 50], 50, policy) is not None
    assert next_delay([0, 50, 100], 100, policy) is None


def test_crashes_before_the_window_are_forgiven() -> None:
    policy = Restart(first_delay=1, give_up_after=3, window=100)
    assert next_delay([0, 50, 101], 101, policy) == 2


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=20), st.integers(1, 10), st.floats(1, 1000))
def test_a_delay_is_within_its_bounds_and_missing_only_after_too_many_crashes(
    crashes: list[float], give_up_after: int, window: float
) -> None:
    policy = Restart(first_delay=0.5, factor=3, max_delay=30, give_up_after=give_up_after, window=window)
    now = max(crashes)
    delay = next_delay(sorted(crashes), now, policy)
    recent = [t for t in crashes if now - t <= window]
    assert (delay is None) == (len(recent) >= give_up_after)
    assert delay is None or 0.5 <= delay <= 30


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (137, "ended by SIGKILL"),
        (255, "ended by signal 127"),
        (-9, "its guard process was ended by SIGKILL"),
    ],
)
def test_an_exit_is_described_by_its_code_or_its_signal(status: int, text: str) -> None:
    assert describe_exit(status) == text


class Hanging(RuleBasedStateMachine):
    """An engine that works, idles, stands still or is silent in any order; every look is a second apart."""

    LIMIT = 5.0

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.iterations = 0
        self.watch = HangWatch().step(Sample(0.0, answered=True))
        self.standing_still = 0
        self.silent = 0

    def look(self, answered: bool, in_flight: int) -> None:
        self.now += 1.0
        self.watch = self.watch.step(Sample(self.now, answered, in_flight, self.iterations))
        self.silent = 0 if answered else self.silent + 1

    @rule(in_flight=st.integers(0, 3))
    def works(self, in_flight: int) -> None:
        self.iterations += 1
        self.standing_still = 0
        self.look(answered=True, in_flight=in_flight)

    @rule()
    def idles(self) -> None:
        self.look(answered=True, in_flight=0)

    @rule(in_flight=st.integers(1, 3))
    def stands_still(self, in_flight: int) -> None:
        self.standing_still += 1
        self.look(answered=True, in_flight=in_flight)

    @rule()
    def is_silent(self) -> None:
        self.look(answered=False, in_flight=0)

    @invariant()
    def counts_as_hung_when_it_was_still_or_silent_for_long_enough(self) -> None:
        assert self.watch.hung(self.LIMIT) == (max(self.standing_still, self.silent) >= self.LIMIT)


TestAnEngineCountsAsHungExactlyWhenItStoodStillOrWasSilentForTheLimit = Hanging.TestCase
TestAnEngineCountsAsHungExactlyWhenItStoodStillOrWasSilentForTheLimit.settings = settings(max_examples=50)


def test_a_gap_in_which_nobody_looked_does_not_make_an_engine_hung() -> None:
    watch = HangWatch().step(Sample(0, answered=True, in_flight=1))
    assert not watch.step(Sample(3600, answered=True, in_flight=1)).hung(60)
