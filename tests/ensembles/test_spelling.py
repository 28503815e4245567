"""Which spellings of a short answer are one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.ensembles.spelling import short_answer


@pytest.mark.parametrize(
    ("canonical", "spellings"),
    [
        ("1000", ["1,000", "1 000", "1\u00a0000", "1\u202f000", "1'000", "1000.0", "１０００", "**1,000**",
                  "The answer is 1,000.", "$\\boxed{1000}$", "Ответ: 1 000", "答えは1,000です。", "\\(1000\\)"]),
        ("1000000", ["1,000,000", "1 000 000"]),
        ("3.14", ["3,14", "3.140", "Ответ: 3,14."]),
        ("0.5", [".5", "0,5", "0.50"]),
        ("-5", ["−5", "- 5", "–5", "-5.0"]),
        ("7", ["007", "7."]),
        ("paris", ["Paris", "PARIS!", '"Paris"', "Final answer: Paris", "*Paris*", "  paris \n"]),
        ("eiffel tower", ["The Eiffel Tower", "an Eiffel  tower.", "Eiffel-Tower"]),
        ("да", ["Да.", "ДА!", "Ответ - да"]),
        ("елка", ["Ёлка", "ёлка."]),
        ("東京", ["東京。", "答えは東京です。", "「東京」"]),
        ("はい", ["はい。", "はい！"]),
        ("50%", ["50 %", "50%."]),
        ("b", ["B.", "(b)", "Answer: B"]),
    ],
)  # fmt: skip
def test_spellings_of_one_answer_are_one(canonical, spellings):
    assert {short_answer(spelling) for spelling in (canonical, *spellings)} == {canonical}


@pytest.mark.parametrize(
    ("one", "other"),
    [("5", "-5"), ("1,000", "1,5"), ("1.10.2", "1.1.2"), ("C", "C++"), ("C", "C#"), ("50", "50%"), ("yes", "no"),
     ("1/2", "12"), ("A", "B"), ("да", "нет"), ("10", "100"), ("0.5", "5"), ("!", "?")],
)  # fmt: skip
def test_different_answers_stay_different(one, other):
    assert short_answer(one) != short_answer(other)


@given(st.text())
def test_every_text_has_a_spelling_and_one_that_differs_in_space_around_it_has_the_same(text):
    assert short_answer(f"  {text}\n") == short_answer(text)


@given(st.integers(-(10**12), 10**12))
def test_a_number_is_the_same_with_and_without_its_thousands(number):
    assert short_answer(f"{number:,}") == str(number)


@given(st.decimals(-10000, 10000, places=3))
def test_a_fraction_is_the_same_with_a_comma_and_a_dot(number):
    # Three digits behind a comma are thousands, unless the number could not be written so.
    text = f"{number:.2f}"
    assert short_answer(text) == short_answer(text.replace(".", ","))
