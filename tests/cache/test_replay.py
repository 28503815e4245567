"""A kept answer in either form: nothing that it says is lost."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache import Entry, replay
from proxy.sse import Events, data_of

TOKEN = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 1}}


def entry(body: bytes, *, stream: bool, operation: str = "chat") -> Entry:
    return Entry("m", "m/0", "m", operation, stream, b"", body, 0.0, 1.0)


def chunks(stream: bytes) -> list[dict[str, Any]]:
    data = [data_of(event) for event in Events().feed(stream)]
    assert data[-1] == b"[DONE]"
    return [json.loads(d) for d in data[:-1]]


def streamed(*choices: dict[str, Any], **top: Any) -> bytes:
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", **top}
    parts = [{**common, "choices": [choice]} for choice in choices] + [{**common, "choices": [], "usage": USAGE}]
    return b"".join(b"data: " + json.dumps(part).encode() + b"\n\n" for part in parts) + b"data: [DONE]\n\n"


def delta(index: int = 0, finish: str | None = None, logprobs: Any = None, **said: Any) -> dict[str, Any]:
    return {"index": index, "delta": said, "logprobs": logprobs, "finish_reason": finish}


def test_a_stream_becomes_a_document_with_all_of_its_fields() -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "now", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"zone":'}}
    rest = {"index": 0, "function": {"arguments": '"UTC"}'}}
    other = {"index": 1, "id": "call_2", "type": "function", "function": {"name": "then", "arguments": "{}"}}
    stream = streamed(
        delta(role="assistant", content=""),
        delta(reasoning="I ", logprobs={"content": [TOKEN]}),
        delta(reasoning="think", logprobs={"content": [TOKEN]}),
        delta(tool_calls=[call]),
        delta(tool_calls=[more]),
        delta(tool_calls=[rest, other]),
        {**delta(finish="tool_calls"), "stop_reason": 7},
        system_fingerprint="fp",
        service_tier="default",
    )
    whole = json.loads(replay.document(entry(stream, stream=True), "m"))
    assert whole["object"] == "chat.completion"
    assert (whole["id"], whole["system_fingerprint"], whole["service_tier"]) == ("chatcmpl-1", "fp", "default")
    assert whole["usage"] == USAGE
    (choice,) = whole["choices"]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": None,
            "reasoning": "I think",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"zone":"UTC"}'}},
                {"id": "call_2", "type": "function", "function": {"name": "then", "arguments": "{}"}},
            ],
        },
        "logprobs": {"content": [TOKEN, TOKEN]},
        "finish_reason": "tool_calls",
        "stop_reason": 7,
    }


def test_several_choices_and_a_refusal_keep_their_places() -> None:
    stream = streamed(
        delta(role="assistant", content=""),
        delta(1, role="assistant", content=""),
        delta(1, refusal="I can"),
        delta(content="yes"),
        delta(1, refusal="not"),
        delta(finish="stop"),
        delta(1, finish="stop"),
    )
    first, second = json.loads(replay.document(entry(stream, stream=True), "m"))["choices"]
    assert (first["message"]["content"], second["message"]["refusal"]) == ("yes", "I cannot")


MESSAGES = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.text(min_size=1)},
    optional={
        "reasoning": st.text(min_size=1),
        "refusal": st.text(min_size=1),
        "tool_calls": st.lists(
            st.builds(
                lambda name, arguments: {"id": name, "type": "function",
                                         "function": {"name": name, "arguments": arguments}},
                st.text(min_size=1), st.text(),
            ), min_size=1, max_size=2, unique_by=lambda call: call["id"],
        ),
        "annotations": st.lists(st.fixed_dictionaries({"type": st.just("url_citation"), "url": st.text()}), min_size=1),
    },
)  # fmt: skip


@given(st.lists(MESSAGES, min_size=1, max_size=3), st.booleans())
def test_a_document_survives_being_a_stream(messages: list[dict[str, Any]], pieces: bool) -> None:
    choices = [
        {"index": i, "message": message, "logprobs": {"content": [TOKEN]}, "finish_reason": "stop"}
        for i, message in enumerate(messages)
    ]
    whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": USAGE,
             "prompt_logprobs": [None]}  # fmt: skip
    body = json.dumps(whole).encode()
    stream = replay.events(entry(body, stream=False), "m", hide_usage=False, pieces=pieces)
    assert json.loads(replay.document(entry(stream, stream=True), "m")) == whole


def test_a_stream_of_a_document_reasons_first_then_speaks_and_then_calls_its_tools() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    message = {"role": "assistant", "tool_calls": [call], "content": "One moment.", "reasoning": "I need the time."}
    choice = {"index": 0, "message": message, "logprobs": {"content": [TOKEN]}, "finish_reason": "tool_calls"}
    document = json.dumps({"id": "1", "model": "m", "choices": [choice]}).encode()
    stream = replay.events(entry(document, stream=False), "m", hide_usage=True)
    told = [chunk["choices"][0] for chunk in chunks(stream)]
    assert [list(part["delta"]) for part in told] == [
        ["role", "content"],
        ["reasoning"],
        ["content"],
        ["tool_calls"],
        [],
    ]
    assert [part["logprobs"] is not None for part in told] == [False, False, True, False, False]


def test_a_completion_survives_being_a_stream() -> None:
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0], "text_offset": [0, 1], "top_logprobs": None}
    choice = {"index": 0, "text": "a b c", "logprobs": logprobs, "finish_reason": "length", "stop_reason": None}
    whole = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], "usage": USAGE}
    kept = entry(json.dumps(whole).encode(), stream=False, operation="text_completion")
    stream = replay.events(kept, "m", hide_usage=False, pieces=True)
    assert [c["text"] for chunk in chunks(stream) for c in chunk["choices"]] == ["a ", "b ", "c", ""]
    assert json.loads(replay.document(entry(stream, stream=True, operation="text_completion"), "m")) == whole


@pytest.mark.parametrize("hide", [True, False])
def test_usage_is_shown_to_those_who_ask_for_it(hide: bool) -> None:
    stream = streamed(delta(role="assistant", content="x"), delta(finish="stop"))
    shown = replay.events(entry(stream, stream=True), "m", hide_usage=hide)
    assert (b"usage" in shown) is not hide
    assert chunks(shown)


def test_a_stream_has_the_name_that_was_asked_for_and_keeps_its_events() -> None:
    stream = streamed(delta(role="assistant", content="x"), delta(content='"model":"m"'), delta(finish="stop"))
    shown = replay.events(entry(stream, stream=True), "other", hide_usage=False)
    assert {chunk["model"] for chunk in chunks(shown)} == {"other"}
    assert [c["choices"] for c in chunks(shown)] == [c["choices"] for c in chunks(stream)]
