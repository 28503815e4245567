"""APGR and CPT, against their definitions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.routing.curves import Curve

ROWS = st.lists(
    st.tuples(st.floats(-9, 9), st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=1, max_size=60
).filter(lambda rows: sum(s - w for _, w, s in rows))


def test_asking_the_strong_model_exactly_where_it_helps_is_as_good_as_can_be():
    weak, strong = [0] * 5 + [1] * 5, [1] * 10
    curve = Curve([1.0] * 5 + [0.0] * 5, weak, strong)
    assert curve.apgr() == pytest.approx((0.1 + 0.3 + 0.5 + 0.7 + 0.9 + 5) / 10)
    assert (curve.cpt(0.5), curve.cpt(0.8)) == (0.3, 0.4)
    assert Curve([0.0] * 5 + [1.0] * 5, weak, strong).apgr() == pytest.approx(0.25)


def test_one_score_for_all_is_random_routing():
    curve = Curve([0.3] * 40, [0, 1] * 20, [1] * 40)
    assert curve.apgr() == pytest.approx(0.5)
    assert (curve.cpt(0.5), curve.cpt(0.8)) == (0.5, 0.8)


@given(ROWS)
def test_nothing_is_closed_without_strong_calls_and_all_with_strong_calls_only(rows):
    curve = Curve(*zip(*rows, strict=True))
    assert curve.pgr(0) == 0
    assert curve.pgr(1) == pytest.approx(1)
    assert curve.pgr(curve.cpt(0.5)) >= 0.5 - 1e-6


@given(ROWS)
def test_only_the_order_of_scores_counts(rows):
    scores, weak, strong = zip(*rows, strict=True)
    assert Curve([8 * s for s in scores], weak, strong).apgr() == Curve(scores, weak, strong).apgr()


def test_models_that_are_equally_good_have_no_curve():
    with pytest.raises(ValueError, match="equally often"):
        Curve([1.0, 2.0], [1, 0], [0, 1])
