"""The model of complexity: what it reads, and what it says of prompts."""

import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ConfigError
from proxy.routing import complexity

ANY = st.text(st.characters(), max_size=3000)  # lone surrogates too
HARD = {
    "en": "Prove that the integral of the function equals the sum of its derivatives, and compute it for n = 12.",
    "ru": "Докажи, что интеграл функции на отрезке равен сумме её производных, и вычисли его значение при n = 12.",
    "ja": "この関数の積分が微分の和に等しいことを証明し、n = 12 のときの値を計算してください。",
}
EASY = {"en": "What do people drink in the morning?", "ru": "Что люди пьют утром?", "ja": "人々は朝に何を飲みますか？"}


@given(ANY)
def test_any_text_has_a_complexity_between_0_and_1(text):
    assert 0 <= complexity.shipped().score(text) <= 1


def test_the_empty_prompt_and_blanks_have_one_too():
    assert 0 <= complexity.shipped().score("") == complexity.shipped().score(" \n ") <= 1


@pytest.mark.parametrize("language", HARD)
def test_a_proof_is_harder_than_small_talk_in_every_language(language):
    assert complexity.shipped().score(HARD[language]) > complexity.shipped().score(EASY[language])


def test_another_process_gives_the_same_score():
    prompt = HARD["ja"] + HARD["ru"] + HARD["en"]
    script = f"from proxy.routing import complexity; print(repr(complexity.shipped().score({prompt!r})))"
    done = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    assert {d.stdout.strip() for d in done} == {repr(complexity.shipped().score(prompt))}


def test_the_answers_to_choose_from_are_not_read():
    question = "What is the derivative of x^2 in x?"
    assert complexity.read(f"{question}\nA. 2x\nB. x\n(C) 0\nd) 1\nAnswer:") == complexity.read(question)


def test_of_a_long_prompt_the_ends_are_read():
    start, end = "Solve this. ", " Why is it so?"
    one = complexity.read(start + "ab " * 5_000 + end)
    assert one.buckets == complexity.read(start + "ab " * 500_000 + end).buckets
    assert complexity.read("Solve").buckets < one.buckets
    assert len(complexity.read("is it so").buckets & one.buckets) == 5  # three words, two pairs
    assert one != complexity.read(start + "ab " * 5_000 + " List them.")


def test_words_of_the_glossary_count_as_the_english_ones():
    assert complexity.read("функция").buckets == complexity.read("function").buckets
    assert complexity.read("関数").buckets == complexity.read("function").buckets
    assert complexity.read("функциональный").buckets == complexity.read("function").buckets
    assert complexity.read("небо").buckets != complexity.read("не").buckets


def test_digits_are_all_one_number_whatever_their_width():
    assert complexity.read("add 12 and 3,500.5").buckets == complexity.read("add 7 and ９").buckets


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nonsense", "not a model of complexity"),
        (b"{}", "not a model of complexity"),
        (b'{"bits":1}', "not a model of complexity"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path, content, message):
    file = tmp_path / "m.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"m.json: .*{message}"):
        complexity.load(file)


@pytest.mark.parametrize("change", [{"bits": 17}, {"means": ()}, {"words": b""}, {"words": b"x"}])
def test_a_model_of_another_shape_is_refused(tmp_path, change):
    file = tmp_path / "m.json"
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(complexity.shipped().coefficients, **change)))
    with pytest.raises(ConfigError, match=r"m.json: (a model|not a model) of complexity"):
        complexity.load(file)
