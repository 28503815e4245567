"""Which requests are compared by their meaning: words in turns, and nothing else."""

import msgspec
import pytest

from proxy.cache import question

ASK = {"role": "user", "content": "What is the capital of France?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def read(messages, path=question.PATH, max_turns=1, **fields):
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return question.read(path, {"messages": msgspec.Raw(msgspec.json.encode(messages)), **raw}, max_turns)


def said(role, text):
    return {"role": role, "content": text}


def test_a_question_is_the_words_of_the_user():
    assert read([ASK]).text == "What is the capital of France?"


def test_parts_of_text_are_words():
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}]
    assert read([{"role": "user", "content": parts}]).text == "What is\nthis?"


def test_instructions_are_kept_apart():
    with_system, without = read([SYSTEM, ASK]), read([ASK])
    assert with_system.text == without.text
    assert with_system.instructions != without.instructions


def test_turns_are_all_in_the_text():
    found = read([said("user", "a"), said("assistant", "b"), said("user", "c")], max_turns=2)
    assert found.text == "user: a\n\nassistant: b\n\nuser: c"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [SYSTEM],
        [said("user", "a"), said("assistant", "b"), said("user", "c")],  # two questions where one is allowed
        [said("user", "a"), said("assistant", "b")],
        [said("assistant", "b")],
        [ASK, SYSTEM],
        [said("tool", "x")],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}],
        [{"role": "user", "content": "x", "name": "Ann"}],
        [{"role": "assistant", "content": "x", "tool_calls": []}],
        [{"role": "user", "content": None}],
        [said("user", "  ")],
        [said("user", "x" * 9000)],
        "text",
    ],
)
def test_what_is_more_or_less_than_words_in_turns_is_no_question(messages):
    assert read(messages) is None


@pytest.mark.parametrize("field", ["tools", "functions"])
def test_a_request_with_tools_is_no_question(field):
    assert read([ASK], **{field: [{"type": "function"}]}) is None
    assert read([ASK], **{field: None}) is not None


def test_only_chats_have_questions():
    assert read([ASK], path="/v1/completions") is None
