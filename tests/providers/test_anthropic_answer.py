"""Answers of Anthropic's as a client of OpenAI's API gets them: documents, streams, errors."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.accounting import StreamAccount
from proxy.errors import MalformedAnswer, TruncatedAnswer
from proxy.providers.anthropic.document import completion, error
from proxy.providers.anthropic.stream import Stream

USAGE = {"input_tokens": 10, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2, "output_tokens": 1}
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "usage": USAGE}
END = {"type": "message_stop"}


def document(*content: dict[str, Any], **fields: Any) -> dict[str, Any]:
    message = {**MESSAGE, "content": content, "stop_reason": "end_turn", **fields}
    return json.loads(completion(json.dumps(message).encode(), 1700000000))


def event(data: dict[str, Any]) -> bytes:
    return b"event: " + data["type"].encode() + b"\ndata: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def start() -> dict[str, Any]:
    return {"type": "message_start", "message": {**MESSAGE, "content": [], "stop_reason": None}}


def stop(reason: str = "end_turn", **usage: Any) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 7, **usage}}


def block(index: int, opening: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": opening},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def text(index: int, *pieces: str) -> list[dict[str, Any]]:
    return block(index, {"type": "text", "text": ""}, *({"type": "text_delta", "text": p} for p in pieces))


def tool(index: int, name: str, *pieces: str) -> list[dict[str, Any]]:
    deltas = ({"type": "input_json_delta", "partial_json": p} for p in ("", *pieces))
    return block(index, {"type": "tool_use", "id": f"toolu_{index}", "name": name, "input": {}}, *deltas)


def thinking(index: int, *pieces: str) -> list[dict[str, Any]]:
    deltas: list[dict[str, Any]] = [{"type": "thinking_delta", "thinking": p} for p in pieces]
    signature = {"type": "signature_delta", "signature": "sig"}
    return block(index, {"type": "thinking", "thinking": "", "signature": ""}, *deltas, signature)


def translate(*pieces: bytes) -> bytes:
    stream = Stream(1700000000)
    return b"".join([*map(stream.feed, pieces), stream.end()])


def chunks(data: bytes) -> list[Any]:
    """Return the chunks of a whole stream, which ends as OpenAI's do."""
    *events, done, rest = data.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [json.loads(e.removeprefix(b"data: ")) for e in events if not e.startswith(b":")]


def story(*events: dict[str, Any]) -> list[Any]:
    return chunks(translate(*map(event, events)))


def collected(of: list[Any]) -> dict[str, Any]:
    """Put the deltas of a stream together as a client does, and check that they are where they may be."""
    *said, usage = of
    assert {(c["id"], c["model"], c["object"], c["created"]) for c in of} == {
        ("msg_1", "claude", "chat.completion.chunk", 1700000000)
    }
    assert usage["choices"] == []
    reasons = [c["choices"][0]["finish_reason"] for c in said]
    assert reasons[:-1] == [None] * (len(said) - 1)
    result: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": [], "usage": usage["usage"]}
    result["finish_reason"] = reasons[-1]
    deltas = [c["choices"][0]["delta"] for c in said]
    assert [d for d in deltas if "role" in d] == deltas[:1] == [{"role": "assistant", "content": ""}]
    for delta in deltas:
        result["content"] += delta.get("content", "")
        result["reasoning_content"] += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(result["tool_calls"])
                result["tool_calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
            result["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return result


# Documents


def test_a_message_is_a_chat_completion():
    result = document({"type": "text", "text": "Par"}, {"type": "text", "text": "is"})
    (choice,) = result.pop("choices")
    assert choice == {
        "index": 0, "logprobs": None, "finish_reason": "stop",
        "message": {"role": "assistant", "content": "Paris", "refusal": None},
    }  # fmt: skip
    assert (result["id"], result["object"], result["created"], result["model"]) == (
        "msg_1", "chat.completion", 1700000000, "claude",
    )  # fmt: skip


def test_the_tokens_of_a_prompt_are_all_of_them_and_the_cached_ones_are_told():
    usage = document(usage={**USAGE, "output_tokens": 5, "output_tokens_details": {"thinking_tokens": 4}})["usage"]
    assert usage == {
        "prompt_tokens": 15, "completion_tokens": 5, "total_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }  # fmt: skip


def test_calls_of_tools_keep_the_letters_of_their_arguments():
    block = b'{"type":"tool_use","id":"t","name":"f","input":{"a":1.50}}'
    message = b'{"id":"m","model":"c","stop_reason":"tool_use","content":[' + block + b"]}"
    (choice,) = json.loads(completion(message, 0))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {"id": "t", "type": "function", "function": {"name": "f", "arguments": '{"a":1.50}'}}
    ]


def test_thinking_is_reasoning_content_and_can_be_sent_back():
    blocks = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"}]
    message = document(*blocks, {"type": "text", "text": "a"})["choices"][0]["message"]
    assert message["reasoning_content"] == "hm"
    assert message["thinking_blocks"] == blocks


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"), ("tool_use", "tool_calls"),
     ("refusal", "content_filter"), ("model_context_window_exceeded", "length"), ("pause_turn", "stop"),
     ("something_new", "stop")],
)  # fmt: skip
def test_a_stop_reason_is_a_finish_reason_plain_and_streamed(stop_reason, finish_reason):
    assert document(stop_reason=stop_reason)["choices"][0]["finish_reason"] == finish_reason
    assert collected(story(start(), stop(stop_reason), END))["finish_reason"] == finish_reason


def test_a_refusal_says_why():
    details = {"type": "refusal", "category": "bio", "explanation": "no"}
    assert document(stop_reason="refusal", stop_details=details)["choices"][0]["message"]["refusal"] == "no"
    delta = {"stop_reason": "refusal", "stop_details": details}
    told = story(start(), {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 1}}, END)
    assert told[1]["choices"][0]["delta"] == {"refusal": "no"}


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>", b'{"id":1}', b"\xff", b"[" * 100000])
def test_what_is_no_message_is_a_malformed_answer(body):
    with pytest.raises(MalformedAnswer):
        completion(body, 0)


# Errors


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [
        (400, "invalid_request_error", ("invalid_request_error", None)),
        (404, "not_found_error", ("invalid_request_error", "model_not_found")),
        (413, "request_too_large", ("invalid_request_error", "request_too_large")),
        (429, "rate_limit_error", ("rate_limit_error", "rate_limit_exceeded")),
    ],
)
def test_an_error_is_told_in_openais_envelope(status, kind, told):
    body = {"type": "error", "error": {"type": kind, "message": "said"}, "request_id": "r"}
    envelope = json.loads(error(json.dumps(body).encode(), status))
    assert envelope == {"error": {"message": "said", "type": told[0], "param": None, "code": told[1]}}


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"error": "x"}', b"\xff"])
def test_an_error_without_an_envelope_is_told_with_its_status(body):
    assert "418" in json.loads(error(body, 418))["error"]["message"]


# Streams


def test_what_keeps_a_connection_alive_is_passed_on_as_a_comment():
    said = translate(event(start()), event({"type": "ping"}), b": more\n\n", event(stop()), event(END))
    assert said.count(b"\n\n: ping\n\n: ping\n\ndata: ") == 1


def test_each_kind_of_block_is_streamed():
    of = story(
        start(),
        {"type": "ping"},
        *thinking(0, "let ", "me"),
        *block(1, {"type": "redacted_thinking", "data": "xx"}),
        *text(2, "He", "llo"),
        *tool(3, "f", '{"a"', ":1}"),
        *tool(4, "g"),
        {"type": "something_new", "delta": {"type": "x"}},
        stop("tool_use", input_tokens=20),
        END,
    )
    result = collected(of)
    assert result == {
        "content": "Hello",
        "reasoning_content": "let me",
        "tool_calls": [
            {"id": "toolu_3", "name": "f", "arguments": '{"a":1}'},
            {"id": "toolu_4", "name": "g", "arguments": "{}"},
        ],
        "finish_reason": "tool_calls",
        "usage": {
            "prompt_tokens": 25, "completion_tokens": 7, "total_tokens": 32,
            "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2},
        },
    }  # fmt: skip
    kept = [
        c["choices"][0]["delta"]["thinking_blocks"] for c in of[:-1] if "thinking_blocks" in c["choices"][0]["delta"]
    ]
    assert kept == [
        [{"type": "thinking", "thinking": "", "signature": "sig"}],
        [{"type": "redacted_thinking", "data": "xx"}],
    ]


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
BLOCKS = st.lists(
    st.one_of(
        st.tuples(st.just("text"), st.lists(TEXTS, max_size=4)),
        st.tuples(st.just("thinking"), st.lists(TEXTS, max_size=4)),
        st.tuples(st.just("tool"), st.dictionaries(TEXTS, TEXTS, max_size=2).map(json.dumps).map(list)),
    ),
    max_size=4,
)


@given(BLOCKS, st.data(), st.sampled_from([b"\n", b"\r\n"]))
def test_the_same_is_said_wherever_the_bytes_are_cut(blocks, data, newline):
    make = {"text": text, "thinking": thinking, "tool": lambda i, *pieces: tool(i, "f", *pieces)}
    events = [start(), *(e for i, (kind, said) in enumerate(blocks) for e in make[kind](i, *said)), stop(), END]
    stream = b"".join(map(event, events)).replace(b"\n", newline)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    whole = translate(*pieces)
    assert whole == translate(stream)
    result = collected(chunks(whole))
    for kind, field in (("text", "content"), ("thinking", "reasoning_content")):
        assert result[field] == "".join(p for k, said in blocks if k == kind for p in said)
    assert [c["arguments"] for c in result["tool_calls"]] == ["".join(said) for k, said in blocks if k == "tool"]


@given(st.data())
def test_a_stream_that_ends_early_never_looks_complete(data):
    stream = b"".join(map(event, [start(), *text(0, "Hé", "llo"), *tool(1, "f", "{}"), stop(), END]))
    cut = data.draw(st.integers(0, len(stream) - 1))
    translation = Stream(0)
    said = translation.feed(stream[:cut])
    assert b"[DONE]" not in said
    assert b'"finish_reason":"' not in said
    with pytest.raises(TruncatedAnswer):
        translation.end()


@pytest.mark.parametrize("kind", ["overloaded_error", "api_error", "new_error"])
def test_an_error_in_a_stream_is_an_error_event_with_words_of_ours_and_no_done(kind):
    failed = {"type": "error", "error": {"type": kind, "message": "at /srv/secret.py on 10.1.2.3"}}
    said = translate(*map(event, [start(), *text(0, "Hel"), failed, *text(1, "LATE"), stop(), END]))
    *_, last, rest = said.split(b"\n\n")
    assert rest == b""
    envelope = json.loads(last.removeprefix(b"data: "))["error"]
    assert (envelope["type"], envelope["code"]) == ("server_error", "upstream_error")
    assert "secret" not in envelope["message"]
    assert b"LATE" not in said
    account = StreamAccount()
    account.feed(said)
    assert account.tally.failed


@pytest.mark.parametrize("data", [b"data: {}\n\n", b"data: <html>\n\n", b'data: {"type": 5}\n\n', b"data: \xff\n\n"])
def test_what_is_no_event_is_a_malformed_answer(data):
    with pytest.raises(MalformedAnswer):
        Stream(0).feed(data)


def test_an_end_without_a_reason_is_a_malformed_answer():
    with pytest.raises(MalformedAnswer, match="stop_reason"):
        translate(event(start()), event(END))


def test_a_long_stream_is_not_kept():
    stream = Stream(0)
    stream.feed(event(start()))
    for e in text(0, *["x" * 1000] * 1000)[:-1]:
        stream.feed(event(e))
    kept = [value for name, value in vars(stream).items() if name != "_events"]
    assert len(repr(kept)) < 1000
    assert stream._events.rest == b""


def test_what_was_used_is_read_by_the_accounts():
    account = StreamAccount(hide_usage=True)
    said = account.feed(translate(*map(event, [start(), *text(0, "Hi"), stop("max_tokens"), END]))) + account.end()
    usage = account.tally.usage
    assert usage is not None
    assert (usage.tokens_in, usage.tokens_out, usage.cached) == (15, 7, 3)
    assert account.tally.finish_reason == "length"
    assert b"usage" not in said
    assert said.endswith(b"data: [DONE]\n\n")
