"""A chat completion's request, field by field, as Anthropic is asked."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import providers
from proxy.config import EndpointSettings
from proxy.errors import BadRequest, PathNotServed, WrongSetting
from tests.providers.asking import KEY, asked, endpoint, sent

USER = {"role": "user", "content": "hi"}
TEXT = {"type": "text", "text": "hi"}
FUNCTION = {"name": "f", "description": "does f", "parameters": {"type": "object", "properties": {"a": {}}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "call.1:0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1.50}'}}
USE = {"type": "tool_use", "id": "call_1_0", "name": "f", "input": {"a": 1.5}}


def translated(options: dict[str, Any] | None = None, **body: Any) -> dict[str, Any]:
    there = endpoint("anthropic", "https://api.anthropic.com", options=options or {})
    return json.loads(sent(there, asked("/v1/chat/completions", {"messages": [USER], **body})).body)


def refusal(options: dict[str, Any] | None = None, **body: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        translated(options, **body)
    assert caught.value.param
    assert str(caught.value).startswith(caught.value.param)
    return caught.value


def test_the_least_request_gets_the_name_there_and_the_max_tokens_that_anthropic_requires():
    turn = {"role": "user", "content": [TEXT]}
    assert translated() == {"model": "there", "max_tokens": 8192, "messages": [turn]}


@pytest.mark.parametrize(
    ("said", "there"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 1.7}, {"temperature": 1.0}),
        ({"top_p": 0.9, "top_k": 5}, {"top_p": 0.9, "top_k": 5}),
        ({"stop": "END"}, {"stop_sequences": ["END"]}),
        ({"stop": ["a", "b\n"]}, {"stop_sequences": ["a", "b\n"]}),
        ({"user": "u1"}, {"metadata": {"user_id": "u1"}}),
        ({"user": "u1", "safety_identifier": "s1"}, {"metadata": {"user_id": "s1"}}),
        ({"stream": True}, {"stream": True}),
        ({"service_tier": "default"}, {"service_tier": "standard_only"}),
        ({"tools": [TOOL]},
         {"tools": [{"name": "f", "description": "does f", "input_schema": FUNCTION["parameters"]}]}),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
         {"tools": [{"name": "f", "strict": True, "input_schema": {"type": "object", "properties": {}}}]}),
        ({"tools": [TOOL], "tool_choice": "auto"}, {"tool_choice": {"type": "auto"}}),
        ({"tools": [TOOL], "tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
        ({"tools": [TOOL], "tool_choice": "none"}, {"tool_choice": {"type": "none"}}),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
         {"tool_choice": {"type": "tool", "name": "f"}}),
        ({"tools": [TOOL], "parallel_tool_calls": False},
         {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
        ({"tools": [TOOL], "parallel_tool_calls": False, "tool_choice": "required"},
         {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}),
        ({"tools": [TOOL], "parallel_tool_calls": False, "tool_choice": "none"}, {"tool_choice": {"type": "none"}}),
        ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}),
        ({"reasoning_effort": "minimal"}, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}, "reasoning_effort": "low"},
         {"thinking": {"type": "enabled", "budget_tokens": 2000}}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
          "reasoning_effort": "high"},
         {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}, "effort": "high"}}),
    ],
)  # fmt: skip
def test_a_field_is_translated(said, there):
    result = translated(**said)
    assert {name: result.get(name) for name in there} == there


@pytest.mark.parametrize(
    "said",
    [
        {"n": 1, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        {"seed": 3, "store": True, "metadata": {"a": "b"}, "prompt_cache_key": "k", "unknown": None},
        {"response_format": {"type": "text"}, "verbosity": "medium", "modalities": ["text"]},
        {"stream_options": {"include_usage": True}, "tool_choice": "auto", "parallel_tool_calls": True},
    ],
)
def test_what_asks_for_nothing_is_left_out(said):
    assert translated(**said).keys() == {"model", "max_tokens", "messages"}


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"functions": []}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"anything_new": 1}, "anything_new"),
        ({"temperature": 2.5}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"stop": ["a", "\n"]}, "stop"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "c", "type": "custom"}]}]},
         "messages[1].tool_calls[0].type"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [
            {"id": "c", "function": {"name": "f", "arguments": "[1]"}}]}]},
         "messages[1].tool_calls[0].function.arguments"),
        ({"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}}]}, "messages[1].function_call"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/x"}}]}]},
         "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/tiff;base64,AA"}}]}]},
         "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "system", "content": [
            {"type": "image_url", "image_url": "https://x/y.png"}]}, USER]}, "messages[0].content"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused_by_name(said, field):
    error = refusal(**said)
    assert error.param == field
    assert error.status == 400


@pytest.mark.parametrize(
    ("said", "allowed"),
    [
        ({"service_tier": "flex"}, "auto, default"),
        ({"messages": [{"role": "function"}]}, "assistant, developer, system"),
    ],
)
def test_a_word_that_there_is_not_is_refused_with_those_that_there_are(said, allowed):
    assert f"is none of {allowed}" in str(refusal(**said))


KEYS = st.sampled_from(
    ("role", "content", "type", "text", "image_url", "url", "file", "file_data", "tool_calls", "id", "function", "name",
     "arguments", "tool_call_id", "thinking_blocks", "cache_control", "parameters", "json_schema", "schema")
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=3),
    st.sampled_from(("user", "assistant", "system", "tool", "text", "image_url", "file", "function", "json_schema",
                     "data:image/png;base64,AA", "{}", "required", "high")),
)  # fmt: skip
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))
FIELDS = st.sampled_from(
    ("max_tokens", "temperature", "stop", "tools", "tool_choice", "response_format", "reasoning_effort", "thinking",
     "user", "n", "logit_bias", "service_tier", "parallel_tool_calls", "cache_control", "stream_options", "new")
)  # fmt: skip


@given(ANYTHING | st.lists(st.dictionaries(KEYS, ANYTHING), max_size=3), st.dictionaries(FIELDS, ANYTHING, max_size=3))
def test_whatever_is_asked_is_translated_or_refused_by_name(messages, fields):
    try:
        result = translated(messages=messages, **fields)
    except BadRequest as error:
        assert error.param
    else:
        assert result["messages"]
        assert all(turn["content"] for turn in result["messages"])


def test_system_and_developer_messages_are_the_system_prompt_in_their_order():
    messages = [{"role": "system", "content": "one"}, USER, {"role": "developer", "content": [TEXT]}]
    result = translated(messages=messages)
    assert result["system"] == [{"type": "text", "text": "one"}, TEXT]
    assert [m["role"] for m in result["messages"]] == ["user"]


def test_messages_of_one_role_in_a_row_are_one_turn_and_empty_text_is_none():
    messages = [USER, {"role": "user", "content": ""}, USER, {"role": "assistant", "content": "x"}, USER]
    turns = translated(messages=messages)["messages"]
    assert [(t["role"], len(t["content"])) for t in turns] == [("user", 2), ("assistant", 1), ("user", 1)]


def test_calls_of_tools_and_their_results_are_blocks_and_the_results_are_said_by_the_user():
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "b", "function": {"name": "g"}}]},
        {"role": "tool", "tool_call_id": "call.1:0", "content": "42"},
        {"role": "tool", "tool_call_id": "b", "content": []},
        {"role": "user", "content": "and?"},
    ]
    _, calls, results = translated(messages=messages, tools=[TOOL])["messages"]
    assert calls == {"role": "assistant", "content": [USE, {"type": "tool_use", "id": "b", "name": "g", "input": {}}]}
    assert results["role"] == "user"
    assert results["content"] == [
        {"type": "tool_result", "tool_use_id": "call_1_0", "content": [{"type": "text", "text": "42"}]},
        {"type": "tool_result", "tool_use_id": "b"},
        {"type": "text", "text": "and?"},
    ]


def test_blocks_of_thinking_go_back_as_they_came():
    kept = [{"type": "thinking", "thinking": "hm", "signature": "sig"}, {"type": "redacted_thinking", "data": "xx"}]
    answer = {"role": "assistant", "content": "x", "reasoning_content": "hm", "thinking_blocks": kept}
    assert translated(messages=[USER, answer, USER])["messages"][1]["content"] == [*kept, {"type": "text", "text": "x"}]


@pytest.mark.parametrize(
    ("part", "block"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
         {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}),
        ({"type": "image_url", "image_url": "data:image/jpg;base64,AA=="},
         {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "AA=="}}),
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png?b=c"}},
         {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png?b=c"}}),
        ({"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}},
         {"type": "document", "title": "a.pdf",
          "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}}),
        ({"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}},
         {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}),
        ({"type": "refusal", "refusal": "no"}, {"type": "text", "text": "no"}),
    ],
)  # fmt: skip
def test_a_part_of_a_message_is_a_block(part, block):
    assert translated(messages=[{"role": "user", "content": [part]}])["messages"][0]["content"] == [block]


def test_an_answer_is_gone_on_with_from_its_last_letter():
    begun = [USER, {"role": "assistant", "content": "Paris is \n"}]
    flags = {"continue_final_message": True, "add_generation_prompt": False, "reasoning_effort": "high"}
    result = translated(messages=begun, **flags)
    assert result["messages"][-1] == {"role": "assistant", "content": [{"type": "text", "text": "Paris is"}]}
    assert "thinking" not in result


def test_a_model_that_continues_no_answer_is_not_asked_to():
    begun = [USER, {"role": "assistant", "content": "Paris"}]
    assert refusal({"prefill": False}, messages=begun).param == "messages"


@pytest.mark.parametrize(
    ("effort", "max_tokens", "thinking"),
    [
        ("high", None, {"type": "enabled", "budget_tokens": 8191}),
        ("low", 4096, {"type": "enabled", "budget_tokens": 1024}),
        ("medium", 1024, None),
    ],
)
def test_for_older_models_an_effort_is_a_budget_that_leaves_room_for_an_answer(effort, max_tokens, thinking):
    result = translated({"thinking": "budget"}, reasoning_effort=effort, max_tokens=max_tokens)
    assert result.get("thinking") == thinking
    assert "output_config" not in result


def test_a_model_that_takes_no_sampling_parameters_gets_none():
    result = translated({"sampling": False}, temperature=0.5, top_p=0.9, top_k=5, stop="END")
    assert result.keys() == {"model", "max_tokens", "messages", "stop_sequences"}


@pytest.mark.parametrize("base_url", ["https://api.anthropic.com", "https://api.anthropic.com/v1/"])
def test_it_goes_to_messages_with_our_key_and_not_the_clients(base_url):
    there = endpoint("anthropic", base_url)
    question = asked("/v1/chat/completions", {"messages": [USER]}, b"beta=true", authorization="Bearer x")
    outgoing = sent(there, question)
    headers = dict(outgoing.headers)
    assert outgoing.path == b"/v1/messages"
    assert headers[b"x-api-key"] == KEY.encode()
    assert headers[b"anthropic-version"] == b"2023-06-01"
    assert b"authorization" not in headers


@pytest.mark.parametrize(("options", "hidden"), [(None, True), ({"include_usage": True}, False), ({}, True)])
def test_usage_is_shown_only_to_a_client_that_asks_for_it(options, hidden):
    body = {"messages": [USER], "stream": True, **({} if options is None else {"stream_options": options})}
    there = endpoint("anthropic", "https://api.anthropic.com")
    assert sent(there, asked("/v1/chat/completions", body)).hide_usage is hidden


def test_its_own_api_passes_with_no_change_but_the_name():
    body = {"max_tokens": 5, "messages": [USER], "new_field": {"a": [1, 2.50]}}
    there = endpoint("anthropic", "https://api.anthropic.com")
    outgoing = sent(there, asked("/v1/messages", body, b"beta=true", anthropic_version="2099-01-01"))
    assert outgoing.path == b"/v1/messages?beta=true"
    assert outgoing.body == json.dumps({"model": "there", **body}).encode()
    assert [v for n, v in outgoing.headers if n == b"anthropic-version"] == [b"2099-01-01"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/completions", "/v1/responses", "/tokenize"])
def test_a_path_that_anthropic_has_not_is_refused_by_name(path):
    with pytest.raises(PathNotServed) as caught:
        sent(endpoint("anthropic", "https://api.anthropic.com"), asked(path, {}))
    assert path in str(caught.value)
    assert "anthropic" in str(caught.value)


@pytest.mark.parametrize("options", [{"max_token": 5}, {"max_tokens": 0}, {"thinking": "much"}, {"prefill": "perhaps"}])
def test_options_that_it_has_not_are_refused(options):
    with pytest.raises(WrongSetting, match="known: max_tokens, prefill, sampling, thinking"):
        providers.named("anthropic").check(EndpointSettings(base_url="https://x", options=options))
