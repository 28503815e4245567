"""Requests as a model can take them."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import prompts
from proxy.errors import BadRequest
from proxy.prompts import CHAT, COMPLETIONS, adapters
from proxy.prompts.adapters import Adapter, AdapterSettings, family_of

STRICT = Adapter(merge_system=True, alternate=True, developer_is_system=True)
TURNS = Adapter(alternate=True)


def said(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def adapt(adapter: Adapter, *messages: dict[str, object], **fields: object) -> dict[str, object]:
    body = json.dumps({"model": "m", "messages": messages, **fields}).encode()
    return json.loads(prompts.adapt(CHAT, body, adapter).body)


def messages_of(adapter: Adapter, *messages: dict[str, object]) -> list[dict[str, object]]:
    return adapt(adapter, *messages)["messages"]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Vikhrmodels/Vistral-24B-Instruct", "mistral"),
        ("mistral-small-latest", "mistral"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "inst"),
        ("mixtral-8x7b-instruct", "inst"),
        ("Qwen/Qwen2.5-3B-Instruct", "qwen"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1"),
        ("llama3:8b", "llama3"),
        ("llama3.1:70b", "llama3.1"),
        ("alpaca-7b", "alpaca"),
        ("google/gemma-2-2b-it", "gemma"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "chatml"),
        ("gpt-4o", None),
        ("claude-sonnet", None),
    ],
)
def test_the_name_of_a_model_tells_its_family(name, family):
    assert family_of(name) == family


@pytest.mark.parametrize("name", [None, "gpt-4o", "anything"])
def test_a_model_that_needs_nothing_has_no_adapter(name):
    assert adapters.for_chats(None, name) is None


def test_what_is_configured_goes_over_what_was_found_and_that_over_the_family():
    def merges(configured: bool | None, found: bool | None, name: str) -> bool:
        adapter = adapters.for_chats(AdapterSettings(merge_system=configured), name, system_role=found)
        return bool(adapter and adapter.merge_system)

    assert merges(None, None, "gemma") and not merges(None, None, "qwen")
    assert merges(None, False, "qwen") and not merges(None, True, "gemma")
    assert merges(True, True, "qwen") and not merges(False, False, "gemma")


def test_a_request_that_needs_no_change_keeps_its_bytes():
    body = b'{ "messages" : [ {"content":"a","role":"user"} ], "model":"m" }'
    assert prompts.adapt(CHAT, body, STRICT).body is body


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/v1/messages"])
def test_what_is_no_chat_and_no_text_keeps_its_bytes(path):
    body = b'{"model":"m","temperature":2,"messages":[{"role":"system","content":"a"}]}'
    assert prompts.adapt(path, body, Adapter(merge_system=True, temperature=(0, 1))).body is body


def test_a_model_without_system_role_gets_it_in_the_first_turn():
    assert messages_of(STRICT, said("system", "S"), said("user", "U"), said("assistant", "A"), said("user", "V")) == [
        said("user", "S\n\nU"),
        said("assistant", "A"),
        said("user", "V"),
    ]


def test_parts_stay_parts_beside_a_system_message():
    parts = [{"type": "text", "text": "U"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    assert messages_of(STRICT, said("system", "S"), said("user", parts)) == [
        said("user", [{"type": "text", "text": "S"}, *parts])
    ]


def test_a_system_message_alone_is_said_by_the_user():
    assert messages_of(STRICT, said("system", "S")) == [said("user", "S")]


def test_a_developer_is_the_system():
    adapter = Adapter(developer_is_system=True)
    assert messages_of(adapter, said("developer", "D"), said("user", "U")) == [said("system", "D"), said("user", "U")]


def test_neighbours_of_one_role_become_one_turn():
    assert messages_of(TURNS, said("user", "a"), said("user", "b"), said("assistant", "c"), said("assistant", "d")) == [
        said("user", "a\n\nb"),
        said("assistant", "c\n\nd"),
    ]


def test_a_later_system_message_is_said_by_the_user_where_turns_alternate():
    assert messages_of(TURNS, said("system", "S"), said("user", "a"), said("system", "T"), said("assistant", "b")) == [
        said("system", "S"),
        said("user", "a\n\nT"),
        said("assistant", "b"),
    ]


def test_calls_of_tools_and_their_results_stay_apart():
    call = said("assistant", None, tool_calls=[{"id": "1"}])
    results = [said("tool", "x", tool_call_id="1"), said("tool", "y", tool_call_id="2")]
    asked = [said("user", "a"), call, *results, said("assistant", "b"), call]
    assert messages_of(TURNS, *asked, said("user", "c"), said("user", "d")) == [*asked, said("user", "c\n\nd")]


def test_a_picture_is_refused_by_name_where_the_model_takes_none():
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(BadRequest) as caught:
        adapt(Adapter(images=False), said("user", "hi"), said("user", parts))
    assert caught.value.param == "messages[1].content[1]" and "takes no images" in str(caught.value)
    assert adapt(Adapter(images=False), said("user", 'say "image_url"'))["messages"] == [
        said("user", 'say "image_url"')
    ]


@pytest.mark.parametrize(
    ("fields", "sent", "told"),
    [
        ({"temperature": 1.8}, {"temperature": 1.0}, ("temperature=1",)),
        ({"temperature": 0}, {"temperature": 0.1}, ("temperature=0.1",)),
        ({"temperature": 0.5, "max_tokens": 10}, {"temperature": 0.5, "max_tokens": 10}, ()),
        ({"max_tokens": 9000}, {"max_tokens": 4096}, ("max_tokens=4096",)),
        ({"max_completion_tokens": 1}, {"max_completion_tokens": 2}, ("max_completion_tokens=2",)),
        ({"temperature": None, "max_tokens": None}, {"temperature": None, "max_tokens": None}, ()),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_figures_outside_a_range_become_the_nearest_and_the_client_is_told(path, fields, sent, told):
    adapter = Adapter(temperature=(0.1, 1.0), max_tokens=(2, 4096))
    adapted = prompts.adapt(path, json.dumps({"model": "m", **fields}).encode(), adapter)
    assert json.loads(adapted.body) == {"model": "m", **sent}
    assert adapted.clamped == told


@pytest.mark.parametrize(("own", "sent"), [(None, ["E"]), ("a", ["a", "E"]), (["a", "E"], ["a", "E"])])
def test_what_ends_an_answer_is_added_to_what_the_client_says(own, sent):
    assert adapt(Adapter(stop=("E",)), said("user", "hi"), stop=own)["stop"] == sent


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"temperature": "hot"}, "temperature"), ({"max_tokens": 1.5}, "max_tokens"), ({"stop": [1]}, "stop[0]")],
)
def test_a_field_of_the_wrong_type_is_refused_by_name(fields, field):
    with pytest.raises(BadRequest) as caught:
        adapt(Adapter(temperature=(0, 1)), said("user", "hi"), **fields)
    assert caught.value.param == field


@pytest.mark.parametrize("messages", ["text", [1], [{"role": 1}], {"role": "user"}])
def test_messages_of_another_shape_are_refused_by_name(messages):
    with pytest.raises(BadRequest) as caught:
        prompts.adapt(CHAT, json.dumps({"messages": messages}).encode(), STRICT)
    assert caught.value.param.startswith("messages")


contents = st.text(max_size=5) | st.lists(
    st.builds(lambda t: {"type": "text", "text": t}, st.text(max_size=5)), max_size=2
)
chats = st.lists(
    st.builds(said, st.sampled_from(["system", "developer", "user", "assistant"]), contents), min_size=1, max_size=8
)


def texts(messages: list[dict[str, object]]) -> str:
    """All that is said, in any order and cut anywhere."""
    pieces = [c if isinstance(c, str) else "".join(p["text"] for p in c) for c in (m["content"] for m in messages)]
    return "".join(sorted("".join(pieces).replace("\n", "")))


@given(chats)
def test_turns_alternate_and_nothing_that_was_said_is_lost(messages):
    result = prompts.rewritten(messages, STRICT)
    roles = [m["role"] for m in result]
    assert all(a != b for a, b in pairwise(roles))
    assert set(roles) <= {"user", "assistant"}
    assert texts(result) == texts(messages)


@given(chats)
def test_what_was_rewritten_needs_no_rewriting(messages):
    once = prompts.rewritten(messages, STRICT)
    assert prompts.rewritten(once, STRICT) == once
