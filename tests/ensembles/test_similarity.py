"""How alike texts are, in English, Russian and Japanese, and in code."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.ensembles.similarity import jaccard, terms


def alike(one: str, other: str) -> float:
    return jaccard(terms(one), terms(other))


CODE = "def f(a, b):\n    return a - b\n"


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("The capital of France is Paris.", "Paris is the capital of France!", "I took the train home."),
        ("Москва - столица России.", "Столицей России является Москва", "Реки впадают в северные моря."),
        ("Суд отказал истцу в иске", "суды отказали истцам в исках", "Суд удовлетворил жалобу ответчика"),
        ("東京は日本の首都です。", "日本の首都は東京です。", "富士山は日本で一番高い山です。"),
        ("ｶﾀｶﾅ ＡＢＣ　１２３", "カタカナ ABC 123", "ひらがな"),
        ("北京是中国的首都", "中国的首都是北京", "我喜欢吃苹果"),
        ("서울은 한국의 수도입니다", "한국의 수도는 서울입니다", "저는 사과를 좋아해요"),
        (CODE, "```python\ndef f( a,b ):\n  return a-b\n```", "def f(a, b):\n    return a + b\n"),
        (CODE, "def f(a,b):\n\treturn a-b", "def f(a, b):\n    return b - a\n"),
        ("if (x == y) { stop(); }", "if(x==y){stop();}", "if (x != y) { stop(); }"),
        ("2 + 2 = 4", "2+2=4", "2 - 2 = 0"),
        ("It costs 1,000 dollars", "it costs 1000 dollars", "it costs 1,500 dollars"),
    ],
)
def test_what_says_the_same_is_more_alike_than_what_does_not(text, near, far):
    assert alike(text, text) == 1.0
    assert alike(text, near) > alike(text, far)
    assert alike(text, near) >= 0.5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (CODE, "def f( a,b ):\n  return a-b"),
        ("- **Paris**\n- Rome", "Paris, Rome"),
        ("Её ответ: «да»", "ее ответ - да"),
        ("don’t", "Don't"),
        ("", "  \n"),
        ("!!!", "!!!"),
    ],
)
def test_looks_and_layout_make_no_difference(one, other):
    assert alike(one, other) == 1.0


@pytest.mark.parametrize(("one", "other"), [("!!!", "???"), ("Paris", "Rome"), ("東京", "京都"), ("", "x")])
def test_what_has_nothing_in_common_is_not_alike(one, other):
    assert alike(one, other) == 0.0


@given(st.text(), st.text())
def test_likeness_has_no_direction_and_is_whole_with_itself(one, other):
    assert alike(one, other) == alike(other, one)
    assert 0.0 <= alike(one, other) <= 1.0
    assert alike(one, one) == 1.0


def test_of_a_long_text_both_ends_are_compared():
    middle = "word " * 100_000
    assert alike(f"Paris {middle} Rome", f"Paris {middle} Rome") == 1.0
    assert alike(f"Paris {middle} Rome", f"Paris {middle} Oslo") < 1.0
