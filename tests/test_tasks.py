"""Telling tasks apart."""

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ConfigError
from proxy.routing import features, tasks
from proxy.routing.features import Judge
from proxy.routing.wishes import Wishes
from tests.labelled_tasks import EVERYDAY, LABELLED, TRICKY

TABLE = tasks.tasks()


@pytest.mark.parametrize("task", LABELLED)
def test_most_prompts_are_given_the_task_that_a_reader_gives_them(task):
    right = [tasks.classify(prompt, TABLE) == task for prompt in LABELLED[task]]
    assert sum(right) / len(right) >= 0.85


@pytest.mark.parametrize("task", EVERYDAY)
def test_everyday_prompts_are_given_their_task_in_all_three_languages(task):
    wrong = [prompt for prompt in EVERYDAY[task] if tasks.classify(prompt, TABLE) != task]
    assert len(wrong) <= 0.1 * len(EVERYDAY[task]), wrong


def test_an_english_word_is_known_with_japanese_right_behind_it():
    assert tasks.classify("Pythonで逆順にする方法", TABLE) == "code"


@pytest.mark.parametrize(("task", "prompt"), TRICKY)
def test_words_of_one_task_inside_another_do_not_mislead(task, prompt):
    assert tasks.classify(prompt, TABLE) == task


@given(st.text(max_size=3000))
def test_any_text_has_a_task(text):
    assert tasks.classify(text, TABLE) in {*tasks.PATTERNS, tasks.GENERAL}


@pytest.mark.parametrize("filler", ["so it is. ", "вот и всё. ", "というわけで。"])
def test_of_a_long_prompt_the_start_and_the_end_say_what_it_asks_for(filler):
    assert tasks.classify("Translate this into French: " + filler * 5000, TABLE) == "translation"
    assert tasks.classify(filler * 5000 + "Переведи это на английский.", TABLE) == "translation"
    assert tasks.classify(filler * 2500 + "Translate this into French." + filler * 2500, TABLE) == "general"


def test_the_case_of_letters_and_their_width_do_not_matter():
    assert tasks.classify("TRANSLATE THIS", TABLE) == "translation"
    assert tasks.classify("ПЕРЕВЕДИ НА АНГЛИЙСКИЙ", TABLE) == "translation"
    assert tasks.classify("ｔｒａｎｓｌａｔｅ", TABLE) == "translation"


def test_a_configured_pattern_adds_to_a_shipped_task_and_a_new_name_is_a_new_task():
    table = tasks.tasks({"legal": ["Mietrecht"], "cooking": [r"\brecipe\b", "レシピ"]})
    assert tasks.classify("Eine Frage zum mietrecht", table) == "legal"
    assert tasks.classify("A recipe for borscht", table) == "cooking"
    assert tasks.classify("What about my landlord?", table) == "legal"
    assert tasks.classify("A recipe for borscht", TABLE) == "general"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"code": ["fine", "(unclosed"]}, r"tasks\.code\[1\]: not a regular expression: .*position 0"),
        ({"code": ["a*"]}, r"tasks\.code\[0\]: matches the empty text"),
        ({"code": ["x" * 501]}, r"tasks\.code\[0\]: 501 characters; .* at most 500"),
        ({"code": ["x"] * 65}, r"tasks\.code: 65 patterns; at most 64"),
        ({"general": ["x"]}, r"tasks\.general: has no patterns"),
        ({f"t{i}": ["x"] for i in range(33)}, r"tasks: 33 tasks; at most 32"),
    ],
)
def test_a_pattern_that_is_no_good_is_refused_by_name(extra, message):
    with pytest.raises(ConfigError, match=message):
        tasks.tasks(extra)


class Listener:
    """Keeps the text whose complexity is asked for, which is also that of the task."""

    text = "nothing"

    def score(self, text):
        self.text = text
        return 0.5


def asked_for(messages):
    listener = Listener()
    fields = {"messages": msgspec.Raw(msgspec.json.encode(messages))}
    features.read("/v1/chat/completions", fields, Wishes(), Judge(TABLE, listener, 0.4, 0.6))
    return listener.text


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], ""),
        ([{"role": "system", "content": "You write Python."}, {"role": "user", "content": "Hi"}], "Hi"),
        (
            [
                {"role": "user", "content": "first"},
                {"role": "assistant", "content": None, "tool_calls": []},
                {"role": "tool", "content": "def noise():"},
            ],
            "first",
        ),
        ([{"role": "user", "content": "first"}, {"role": "user", "content": "second"}], "second"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}, {"text": "b"}]}], "a\nb"),
        ([{"role": "user", "content": 5}], ""),
    ],
)
def test_the_task_is_read_from_the_last_turn_of_the_user(messages, text):
    assert asked_for(messages) == text


@pytest.mark.parametrize("pattern", [p for patterns in tasks.PATTERNS.values() for p in patterns])
def test_a_pattern_of_a_script_has_its_letters_in_each_alternative(pattern):
    """So that a text without such letters need not be searched for it."""
    script = next((s for s in (r"[а-яё]", r"[\u3040-\u30ff\u3400-\u9fff]") if re.search(s, pattern)), None)
    alternatives = _alternatives(re._parser.parse(pattern))
    assert script is None or all(re.search(script, text) for text in alternatives)


def _alternatives(parsed) -> list[str]:
    """The literal letters of each way through a pattern, as far as branches at the outermost two levels go."""
    found = [""]
    for op, value in parsed:
        name = str(op)
        if name == "LITERAL":
            found = [text + chr(value) for text in found]
        elif name == "BRANCH":
            found = [text + more for text in found for branch in value[1] for more in _alternatives(branch)]
        elif name == "SUBPATTERN":
            found = [text + more for text in found for more in _alternatives(value[-1])]
        elif name == "MAX_REPEAT" and value[0] > 0:
            found = [text + more for text in found for more in _alternatives(value[2])]
        elif name == "IN" and all(str(kind) == "LITERAL" for kind, _ in value):
            found = [text + chr(letter) for text in found for _, letter in value]
    return found
