"""When an endpoint is asked and when not: the breaker's states, whatever happens in whatever order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from proxy.breaker import MOVES, Breaker, Change, Move, Outcome, State
from proxy.config import BreakerSettings

SUCCESS, FAILURE, NEUTRAL = Outcome
SETTINGS = BreakerSettings(failures=5, recovery=60.0, max_recovery=300.0, window=30.0, minimum=20)


def breaker(chance: float = 0.5, changes: list[Change] | None = None, **changed: float) -> Breaker:
    settings = BreakerSettings(**{"recovery": 60.0, "max_recovery": 300.0, **changed})  # type: ignore[arg-type]
    return Breaker(settings, lambda: chance, changes.append if changes is not None else lambda _: None)


def happen(b: Breaker, now: float, *outcomes: Outcome) -> None:
    for outcome in outcomes:
        b.record(outcome, now, b.begin(now))


def opened(now: float = 0.0, **changed: float) -> Breaker:
    b = breaker(**changed)
    happen(b, now, *[FAILURE] * 5)
    return b


def test_failures_in_a_row_open_it():
    b = breaker()
    happen(b, 0, *[FAILURE] * 4, SUCCESS, *[FAILURE] * 4)
    assert b.allow(0)
    happen(b, 0, FAILURE)
    assert not b.allow(0)


def test_clients_that_err_or_leave_neither_open_it_nor_hide_failures():
    b = breaker()
    happen(b, 0, *[NEUTRAL] * 100)
    assert b.state is State.CLOSED
    happen(b, 0, *[NEUTRAL, FAILURE] * 5)
    assert b.state is State.OPEN


def test_a_share_of_failures_in_the_window_opens_it():
    b = breaker()
    happen(b, 0, *[SUCCESS, FAILURE] * 9, SUCCESS)
    assert b.state is State.CLOSED
    happen(b, 0, FAILURE)
    assert b.state is State.OPEN


def test_what_was_before_the_window_is_forgotten():
    b = breaker()
    happen(b, 0, *[SUCCESS, FAILURE] * 9)
    happen(b, 90, SUCCESS, FAILURE, SUCCESS, FAILURE)
    assert b.state is State.CLOSED


def test_one_trial_at_a_time_tells_whether_it_closes():
    b = opened()
    assert not b.allow(59)
    assert b.allow(60)
    trial = b.begin(60)
    assert not b.allow(61)
    b.record(SUCCESS, 62, trial)
    assert b.state is State.CLOSED


def test_each_trial_that_fails_doubles_the_wait_up_to_its_limit():
    b, now, waits = opened(), 0.0, []
    for _ in range(5):
        waits.append(b.wait(now))
        now += waits[-1]
        happen(b, now, FAILURE)
    assert waits == [60, 120, 240, 300, 300]


def test_breakers_that_open_together_try_again_apart():
    waits = {opened(chance=chance).wait(0) for chance in (0.0, 0.5, 0.99)}
    assert len(waits) == 3
    assert all(48 <= wait <= 72 for wait in waits)


def test_a_trial_that_never_reports_does_not_wedge_it():
    b = opened()
    lost = b.begin(60)
    assert not b.allow(119)
    assert b.allow(120)
    happen(b, 120, SUCCESS)
    b.record(FAILURE, 121, lost)
    assert b.state is State.CLOSED


def test_a_trial_that_says_nothing_makes_room_for_another():
    b = opened()
    happen(b, 60, NEUTRAL)
    assert b.state is State.HALF_OPEN
    assert b.allow(60)


def test_what_began_before_a_change_no_longer_counts():
    b = breaker()
    old = [b.begin(0) for _ in range(20)]
    for ticket in old:
        b.record(FAILURE, 0, ticket)
    assert b.wait(0) == 60
    b.record(SUCCESS, 1, old[0])
    assert b.state is State.OPEN


def test_a_health_check_ends_the_wait():
    b = opened()
    b.recovered(1)
    assert b.allow(1)
    happen(b, 1, SUCCESS)
    assert b.state is State.CLOSED


def test_a_health_check_that_led_to_a_failure_is_not_believed_for_a_while():
    b = opened()
    b.recovered(1)
    happen(b, 1, FAILURE)
    b.recovered(4)
    assert not b.allow(4)
    b.recovered(5)
    assert b.allow(5)


@pytest.mark.parametrize(("asked", "rests"), [(7.0, 7.0), (3600.0, 60.0), (None, 1.0)])
def test_one_that_asks_for_a_rest_comes_last_for_as_long_and_no_longer_than_a_recovery(asked, rests):
    b = breaker()
    assert b.rest(0, asked) == rests
    assert b.avoid(rests - 0.1)
    assert not b.avoid(rests)
    assert b.allow(0)
    assert b.state is State.CLOSED


def test_another_process_begins_anew():
    b = opened()
    b.rest(0, 30)
    b.renew()
    assert b.allow(0)
    assert not b.avoid(0)


class Story(RuleBasedStateMachine):
    """Requests that begin, end in any order or never, while time passes and health checks come."""

    @initialize()
    def begin(self) -> None:
        self.changes: list[Change] = []
        self.breaker = breaker(changes=self.changes)
        self.now = 0.0
        self.under_way: list[int] = []

    @rule(seconds=st.floats(0, 400))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def ask(self) -> None:
        if self.breaker.allow(self.now):
            self.under_way.append(self.breaker.begin(self.now))
            if self.breaker.state is State.HALF_OPEN:
                assert not self.breaker.allow(self.now), "two trials at a time"

    @rule(which=st.integers(0, 100), outcome=st.sampled_from(Outcome))
    def end(self, which: int, outcome: Outcome) -> None:
        if self.under_way:
            self.breaker.record(outcome, self.now, self.under_way.pop(which % len(self.under_way)))

    @rule()
    def check(self) -> None:
        self.breaker.recovered(self.now)

    @rule(seconds=st.one_of(st.none(), st.floats(0, 1e6)))
    def rest(self, seconds: float | None) -> None:
        before = self.breaker.state
        self.breaker.rest(self.now, seconds)
        assert self.breaker.state is before

    @invariant()
    def every_change_is_in_the_table_and_told_once(self) -> None:
        for change in self.changes:
            assert change.after in {after for (before, _), after in MOVES.items() if before is change.before}
            assert change.before is not change.after
        states = [State.CLOSED, *(c.after for c in self.changes)]
        assert [c.before for c in self.changes] == states[:-1]
        assert self.breaker.state is states[-1]

    @invariant()
    def it_never_wedges(self) -> None:
        assert self.breaker.wait(self.now) <= 360
        assert self.breaker.allow(self.now + 1000)


TestStory = Story.TestCase
TestStory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.sampled_from([SUCCESS, NEUTRAL])))
def test_nothing_but_failures_opens_it(outcomes):
    b = breaker()
    happen(b, 0, *outcomes)
    assert b.state is State.CLOSED


def test_there_is_no_way_from_closed_but_to_open():
    moves = {move: after for (before, move), after in MOVES.items() if before is State.CLOSED}
    assert moves == {Move.FAILING: State.OPEN, Move.RENEWED: State.CLOSED}
