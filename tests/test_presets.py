"""What a preset makes of a request."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.registry import Group, Preset
from proxy.routing import presets

PRESET = Preset(
    "legal", Group("any", ()), "You are a lawyer.",
    {"temperature": msgspec.Raw(b"0.2"), "max_tokens": msgspec.Raw(b"2048")},
)  # fmt: skip
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


def put(path, **fields):
    raw = {name: msgspec.Raw(json.dumps(value).encode()) for name, value in fields.items()}
    return {name: json.loads(bytes(value)) for name, value in presets.applied(PRESET, path, raw).items()}


def test_a_chat_gets_the_system_prompt_in_front():
    assert put(CHAT, messages=[USER])["messages"] == [{"role": "system", "content": "You are a lawyer."}, USER]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_clients_own_system_prompt_comes_after_it_in_one_message(role):
    own = {"role": role, "content": "Be brief.", "name": "x"}
    merged = {"role": role, "content": "You are a lawyer.\n\nBe brief.", "name": "x"}
    assert put(CHAT, messages=[own, USER])["messages"] == [merged, USER]


def test_a_system_prompt_of_parts_gets_one_more():
    own = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert put(CHAT, messages=[own, USER])["messages"][0]["content"] == [
        {"type": "text", "text": "You are a lawyer."}, {"type": "text", "text": "Be brief."}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "fields", "field", "value"),
    [
        ("/v1/completions", {"prompt": "hi"}, "prompt", "You are a lawyer.\n\nhi"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "prompt", ["You are a lawyer.\n\na", "You are a lawyer.\n\nb"]),
        ("/v1/responses", {"input": "hi"}, "instructions", "You are a lawyer."),
        ("/v1/responses", {"input": "hi", "instructions": "Brief."}, "instructions", "You are a lawyer.\n\nBrief."),
        ("/v1/messages", {"messages": [USER]}, "system", "You are a lawyer."),
        ("/v1/messages", {"messages": [USER], "system": "Brief."}, "system", "You are a lawyer.\n\nBrief."),
        ("/v1/messages/count_tokens", {"messages": [USER]}, "system", "You are a lawyer."),
    ],
)
def test_each_api_has_its_place_for_the_system_prompt(path, fields, field, value):
    assert put(path, **fields)[field] == value


def test_a_prompt_of_tokens_is_refused():
    with pytest.raises(BadRequest, match="prompt: "):
        put("/v1/completions", prompt=[1, 2])


def test_defaults_are_for_what_the_client_leaves_out():
    assert put(CHAT, messages=[USER])["temperature"] == 0.2
    assert put(CHAT, messages=[USER], temperature=None)["temperature"] == 0.2
    assert put(CHAT, messages=[USER], temperature=0)["temperature"] == 0


def test_a_limit_of_the_answer_by_another_name_is_one():
    assert "max_tokens" not in put(CHAT, messages=[USER], max_completion_tokens=5)
    assert put("/v1/responses", input="hi")["max_output_tokens"] == 2048
    assert put("/v1/responses", input="hi", max_output_tokens=5)["max_output_tokens"] == 5


def test_counting_tokens_takes_no_defaults_and_other_paths_nothing():
    assert "temperature" not in put("/v1/messages/count_tokens", messages=[USER])
    assert put("/v1/embeddings", input="hi") == {"input": "hi"}


@pytest.mark.parametrize("messages", [5, "hi", None, [5], [None], [[]], {}])
def test_messages_that_are_none_are_left_to_the_server(messages):
    assert put(CHAT, messages=messages)["messages"] == messages


@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers() | st.text(), max_size=3), max_size=4))
def test_messages_keep_their_bytes(rest):
    items = [msgspec.Raw(json.dumps(item, indent=1).encode()) for item in ({"role": "user"}, *rest)]
    fields = {"messages": msgspec.Raw(b"[" + b" ,\n".join(map(bytes, items)) + b"]")}
    found = msgspec.json.decode(presets.applied(PRESET, CHAT, fields)["messages"], type=list[msgspec.Raw])
    assert [bytes(item) for item in found[1:]] == [bytes(item) for item in items]
