"""What tokens cost: what is known, and what is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.accounting import Usage
from proxy.cost import Price, Tariff, cost, dearest, estimate, faded, hosted, work

PRICE = Price(input=0.15, output=0.60, cached_input=0.075)
counts = st.integers(0, 10**7)
dollars = st.floats(0, 1000)


def test_cached_tokens_have_a_price_of_their_own():
    assert cost(PRICE, Usage(1_000_000, 500_000, 400_000)) == pytest.approx(0.6 * 0.15 + 0.4 * 0.075 + 0.5 * 0.60)


def test_cached_tokens_cost_as_much_as_others_where_nothing_else_is_said():
    assert cost(Price(input=2, output=3), Usage(1000, 0, 900)) == cost(Price(input=2, output=3), Usage(1000, 0, 0))


@given(counts, counts, counts, dollars, dollars)
def test_no_usage_costs_less_than_nothing(tokens_in, tokens_out, cached, reading, writing):
    price = Price(input=reading, output=writing, cached_input=0)
    assert 0 <= cost(price, Usage(tokens_in, tokens_out, cached)) <= estimate(price, tokens_in, tokens_out) * 1.000001


@given(counts, counts, counts, st.integers(1, 50))
def test_the_cost_of_many_requests_is_that_of_their_tokens_together(tokens_in, tokens_out, cached, many):
    cached = min(cached, tokens_in)
    one = cost(PRICE, Usage(tokens_in, tokens_out, cached))
    assert one * many == pytest.approx(cost(PRICE, Usage(tokens_in * many, tokens_out * many, cached * many)))


def test_a_long_prompt_has_the_price_of_the_highest_step_below_it():
    steps = tuple((above, Price(input=dollars, output=1)) for above, dollars in [(200, 2.0), (100, 1.5)])
    tariff = Tariff(Price(input=1, output=1), steps)
    assert [tariff.at(tokens).input for tokens in (0, 100, 101, 200, 201)] == [1, 1, 1.5, 1.5, 2]


def test_an_engine_that_has_done_nothing_has_no_price():
    assert hosted(2.10, 0.0, 0.0) is None
    assert hosted(2.10, 5.0, 0.0) is None


@given(st.floats(0.1, 100), st.floats(0.1, 1e6), st.lists(st.tuples(counts, st.integers(1, 10**6)), min_size=1))
def test_the_price_of_an_engine_spreads_its_busy_time_over_all_tokens(usd_per_hour, busy, requests):
    usages = [Usage(tokens_in, tokens_out) for tokens_in, tokens_out in requests]
    price = hosted(usd_per_hour, busy, sum(map(work, usages)))
    assert price is not None
    assert sum(cost(price, usage) for usage in usages) == pytest.approx(usd_per_hour * busy / 3600)


def test_tokens_that_the_engine_had_cached_took_it_nothing():
    price = hosted(3.6, 1.0, work(Usage(1000, 0, 900)))
    assert price is not None
    assert cost(price, Usage(1000, 0, 900)) == pytest.approx(0.001)


def test_an_engine_that_gets_faster_gets_cheaper():
    slow, fast = 0.0, 0.0
    for _ in range(5000):
        slow, fast = faded(slow, 1.0), faded(fast, 100.0)
    for _ in range(5000):
        slow, fast = faded(slow, 0.1), faded(fast, 100.0)
    assert slow / fast == pytest.approx(0.1 / 100, rel=0.1)


def test_the_dearest_model_depends_on_what_was_asked():
    reading, writing = Price(input=10, output=1), Price(input=1, output=10)
    assert dearest([reading, writing], Usage(1000, 10)) == cost(reading, Usage(1000, 10))
    assert dearest([reading, writing], Usage(10, 1000)) == cost(writing, Usage(10, 1000))
    assert dearest([], Usage(10, 1000)) is None
