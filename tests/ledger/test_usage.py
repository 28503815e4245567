"""What a ledger is asked, and what it reports."""

import pytest

from proxy.cost import Price
from proxy.errors import BadRequest
from proxy.ledger.usage import Query, Sums, parse, report

NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2027-01-15", NOW - 8 * 3600),
        ("2027-01-15T08:00:00Z", NOW),
        ("2027-01-15T11:00:00+03:00", NOW),
        ("90s", NOW - 90),
        ("24h", NOW - 86400),
        ("2w", NOW - 14 * 86400),
        ("", None),
    ],
)
def test_a_moment_may_be_said_in_several_ways(text, expected):
    assert parse({"since": text}, NOW) == Query(since=expected)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"since": "yesterday"}, "since"),
        ({"until": "2027-13-01"}, "until"),
        ({"until": "9" * 400}, "until"),
        ({"group_by": "colour"}, "group_by"),
        ({"groupby": "model"}, "groupby"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(asked, param):
    with pytest.raises(BadRequest) as caught:
        parse(asked, NOW)
    assert caught.value.param == param
    assert any(allowed in str(caught.value) for allowed in ("2026-01-31", "model, key, alias, day", "known: since"))


def group(name: str, **changed: object) -> Sums:
    usual = {"requests": 4, "tokens_in": 1000, "tokens_out": 2000, "tokens_cached": 0, "usd": 1.0, "unpriced": 0,
             "seconds": 8.0, "good": 3, "priced_in": 1000, "priced_out": 2000, "priced_cached": 0}  # fmt: skip
    return Sums(group=name, **{**usual, **changed})  # type: ignore[arg-type]


def test_the_saving_is_against_the_dearest_model_for_the_same_tokens():
    made = report(Query(), [group("a"), group("b", usd=None, unpriced=4)], [Price(1, 2), Price(1000, 3000)])
    a, b = made.data
    assert (a.average_seconds, a.success_rate) == (2.0, 0.75)
    assert a.usd_on_dearest == pytest.approx(7.0)
    assert a.saving == pytest.approx(6.0)
    assert (b.usd, b.usd_on_dearest, b.saving) == (None, None, None)
    assert (made.total.requests, made.total.usd, made.total.unpriced) == (8, 1.0, 4)


def test_no_other_model_is_dearer_than_one_that_cost_more():
    (line,) = report(Query(), [group("a", usd=9.0)], [Price(1, 2)]).data
    assert (line.usd_on_dearest, line.saving) == (9.0, 0.0)


def test_nothing_adds_up_to_nothing():
    total = report(Query(), [], [Price(1, 2)]).total
    assert (total.requests, total.usd, total.saving) == (0, None, None)
