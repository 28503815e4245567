"""How much may be tried again, how long a prompt is, and what a failure means."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import errors, failures
from proxy.breaker import Outcome
from proxy.config import RetrySettings
from proxy.errors import UpstreamFailed
from proxy.length import Length
from proxy.retries import Budget, backoff


@given(st.lists(st.sampled_from(["earn", "spend", "second"]), max_size=400), st.floats(0, 1), st.floats(0, 5))
def test_retries_are_a_share_of_the_requests_and_a_rate(steps, share, rate):
    budget, now, earned, spent = Budget(RetrySettings(share=share, per_second=rate)), 100.0, 0, 0
    for step in steps:
        if step == "earn":
            budget.earn()
            earned += 1
        elif step == "second":
            now += 1
        else:
            spent += budget.spend(now)
    assert spent <= earned * share + rate * (10 + now - 100) + 1e-6


def test_what_is_saved_up_has_a_limit():
    budget = Budget(RetrySettings(share=0.2, per_second=1))
    for _ in range(100_000):
        budget.earn()
    assert sum(budget.spend(1.0) for _ in range(1000)) == 30


def test_the_guaranteed_rate_comes_back_with_time():
    budget = Budget(RetrySettings(share=0, per_second=2))
    assert sum(budget.spend(1.0) for _ in range(100)) == 20
    assert sum(budget.spend(4.0) for _ in range(100)) == 6


@given(st.floats(0, 1))
def test_a_backoff_has_full_jitter_and_is_short(chance):
    assert 0 <= backoff(1, chance) <= 0.25
    assert 0 <= backoff(3, chance) <= 1.0


def length(**fields: object) -> Length:
    return Length.of({name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()})


def test_a_prompt_has_bounds_that_its_bytes_tell_and_room_for_the_answer():
    measured = length(messages=[{"role": "user", "content": "word " * 1000}], max_tokens=100)
    assert measured.least < 1100 < measured.most
    assert length(prompt="x", max_tokens=50).least >= 50


def test_pictures_make_no_prompt_long_for_sure():
    picture = [{"role": "user", "content": [{"image_url": {"url": "data:image/png;base64," + "A" * 100_000}}]}]
    assert length(messages=picture).least == 0


@pytest.mark.parametrize("value", ["many", None, -5, 2.5])
def test_what_is_no_number_of_tokens_counts_as_none(value):
    assert length(max_tokens=value).most == 0


@pytest.mark.parametrize(
    ("error", "outcome", "elsewhere"),
    [
        (errors.ConnectFailed(), Outcome.FAILURE, True),
        (errors.ConnectTimeout(), Outcome.FAILURE, True),
        (errors.PoolTimeout(), Outcome.NEUTRAL, True),
        (errors.FirstByteTimeout(), Outcome.FAILURE, True),
        (errors.FirstTokenTimeout(), Outcome.FAILURE, True),
        (errors.BetweenBytesTimeout(), Outcome.FAILURE, True),
        (errors.MalformedAnswer(), Outcome.FAILURE, True),
        (errors.TruncatedAnswer(), Outcome.FAILURE, True),
        (errors.InvalidRequest(), Outcome.NEUTRAL, False),
        (errors.ErrorEvent(b'{"error":{"code":500}}'), Outcome.FAILURE, True),
        (errors.ErrorEvent(b'{"error":"?"}'), Outcome.FAILURE, True),
        (errors.ErrorEvent(b'{"error":{"code":400}}'), Outcome.NEUTRAL, False),
        (errors.ErrorEvent(b'{"error":{"code":429}}'), Outcome.FAILURE, True),
        (errors.BadRequest("x"), Outcome.NEUTRAL, False),
        (errors.BadGateway("x"), Outcome.NEUTRAL, True),
        (UpstreamFailed(500, None), Outcome.FAILURE, True),
        (UpstreamFailed(503, None), Outcome.FAILURE, True),
        (UpstreamFailed(503, 5), Outcome.NEUTRAL, True),
        (UpstreamFailed(501, None), Outcome.NEUTRAL, False),
    ],
)
def test_each_failure_says_something_of_the_endpoint_and_where_to_go(error, outcome, elsewhere):
    said = failures.verdict(error)
    assert (said.outcome, said.elsewhere) == (outcome, elsewhere)
