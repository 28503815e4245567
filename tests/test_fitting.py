"""Fitting the model of complexity."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.routing import complexity, fitting
from proxy.routing.complexity import Model
from proxy.routing.fitting import Example

SUBJECTS = {"apple": 0.0, "tensor": 1.0}


def prompts(size, seed=0):
    chance = random.Random(seed)
    words = ["the", "of", "on", "and", "with", "some", "more", "very"]
    rows = []
    for i in range(size):
        subject = list(SUBJECTS)[i % 2]
        text = " ".join([*chance.choices(words, k=8), subject])
        rows.append((text, SUBJECTS[subject]))
    return rows


def examples(size, seed=0):
    return [Example(complexity.read(text), target) for text, target in prompts(size, seed)]


def test_what_tells_hard_from_easy_is_learned():
    model = Model(fitting.fit(examples(200)))
    assert model.score("with the tensor of some") > 0.5 > model.score("with the apple of some")


def test_the_same_examples_give_the_same_model():
    assert fitting.fit(examples(60)) == fitting.fit(examples(60))


def test_few_examples_adjust_the_model_to_start_from_and_leave_the_rest_of_it():
    start = Model(fitting.fit(examples(200)))
    more = [Example(complexity.read(f"of the zebra {text}"), target) for text, target in prompts(20, seed=2)]
    model = Model(fitting.fit(more, start))
    assert model.score("some more tensor") > model.score("some more apple")


def test_a_long_prompt_is_harder_by_half_of_what_length_explains():
    length = complexity.SHAPE.index("length")
    long = [Example(complexity.read("word " * n), n / 100) for n in range(10, 110)]
    fitted = fitting.fit(long, ridge=1e-6, rarest=10_000)
    free = fitting.fit([Example(e.reading, 2 * e.target) for e in long], ridge=1e-6, rarest=10_000)
    assert fitted.weights[length] > 0
    assert free.weights[length] == pytest.approx(2 * fitted.weights[length], rel=1e-3)


def test_targets_that_are_all_equal_are_no_error():
    model = Model(fitting.fit([Example(complexity.read("one"), 1.0)] * 5))
    assert 0 <= model.score("one") <= 1


def test_without_examples_there_is_nothing_to_fit():
    with pytest.raises(ValueError, match="no examples"):
        fitting.fit([])


def test_scores_out_of_fold_come_from_models_that_did_not_see_the_prompt():
    seen = []

    def learn(places):
        seen.append(set(places))
        return fitting.fit([rows[i] for i in places])

    rows = examples(50)
    folds = fitting.shuffled_folds(50)
    scores = fitting.out_of_fold([e.reading for e in rows], learn, folds)
    assert seen == [{i for i in range(50) if folds[i] != f} for f in range(5)]
    assert all((score > 0.5) == bool(e.target) for score, e in zip(scores, rows, strict=True))


@given(st.integers(5, 200), st.integers(2, 5))
def test_folds_are_equally_large(size, folds):
    sizes = [fitting.shuffled_folds(size, folds).count(f) for f in range(folds)]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=50, unique=True), st.floats(0, 1))
def test_the_threshold_gives_the_share_of_strong_calls_that_was_asked_for(scores, share):
    threshold = fitting.threshold_for_share(scores, share)
    assert sum(score >= threshold for score in scores) == round(share * len(scores))


def test_the_share_for_a_cost_spends_it():
    assert fitting.share_for_cost(0.5, 0.2, 2.2) == pytest.approx(0.15)


@pytest.mark.parametrize(("cost", "weak", "strong"), [(0.1, 0.2, 2.2), (3, 0.2, 2.2), (1, 2, 1), (1, 1, 1), (1, -1, 2)])
def test_a_cost_that_no_share_has_is_refused(cost, weak, strong):
    with pytest.raises(ValueError, match=r"^(cost|prices): "):
        fitting.share_for_cost(cost, weak, strong)
