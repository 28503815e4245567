"""Chats with a server that takes text only: what it is asked, and its answer as a chat."""

import asyncio
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import providers
from proxy.config import Config, EndpointSettings, ModelSettings
from proxy.errors import BadRequest, MalformedAnswer, PathNotServed, TruncatedAnswer
from proxy.prompts.adapters import AdapterSettings
from proxy.providers.completions.answer import Chunks, chat_completion
from tests.fakes.one_worker import JSON, ROLE, event, proxying, text_of
from tests.fakes.scripted_upstream import Step, ok, upstream
from tests.providers.asking import asked, endpoint, sent

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def there(**settings: object):
    return endpoint("completions", "http://127.0.0.1:1/v1", **{"model": "qwen2.5", **settings})


def request(**fields: object) -> dict[str, object]:
    return json.loads(sent(there(), asked(CHAT, {"messages": HI, **fields})).body)


def test_a_chat_becomes_the_text_that_its_model_was_taught():
    out = sent(there(), asked(CHAT, {"messages": HI}))
    body = json.loads(out.body)
    assert out.path == b"/v1/completions"
    assert body["model"] == "qwen2.5"
    assert body["prompt"].endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert body["max_tokens"] == 1024 and "messages" not in body


def test_what_text_can_be_asked_for_passes():
    fields = {"temperature": 0.3, "seed": 1, "stop": ["x"], "n": 2, "response_format": {"type": "json_object"}}
    assert {name: request(**fields)[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("asked_for", "sent_there"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 6, "max_tokens": 5}, {"max_tokens": 6}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"tools": [], "tool_choice": "none", "logprobs": False}, {}),
    ],
)
def test_what_has_another_name_there_gets_it(asked_for, sent_there):
    body = request(**asked_for)
    assert {name: body[name] for name in sent_there} == sent_there
    assert not {"max_completion_tokens", "top_logprobs", "tools", "tool_choice"} & body.keys()
    assert ("logprobs" in body) == ("logprobs" in sent_there)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [*HI, {"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[1]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0]"),
        ({"messages": "hi"}, "messages"),
        ({"max_tokens": "many"}, "max_tokens"),
    ],
)
def test_what_cannot_be_said_in_text_is_refused_by_name(fields, field):
    with pytest.raises(BadRequest) as caught:
        request(**fields)
    assert caught.value.param == field


def test_a_partial_answer_ends_the_text():
    body = request(messages=[*HI, {"role": "assistant", "content": "Well, "}], continue_final_message=True)
    assert body["prompt"].endswith("<|im_start|>assistant\nWell, ")


def test_chats_go_on_there_when_they_broke_elsewhere():
    assert there().continues and not there(continues=False).continues


def test_text_passes_as_it_is():
    out = sent(there(), asked("/v1/completions", {"prompt": "Once"}))
    assert json.loads(out.body) == {"model": "qwen2.5", "prompt": "Once"}


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/v1/messages"])
def test_a_path_that_is_neither_is_not_served(path):
    with pytest.raises(PathNotServed):
        sent(there(), asked(path, {"input": "x"}))


# Answers

LOGPROBS = {"tokens": ["He", "llo"], "token_logprobs": [-0.1, None], "top_logprobs": [{"He": -0.1, "Ho": -2.0}, None]}
DOCUMENT = {
    "id": "cmpl-1", "object": "text_completion", "created": 5, "model": "there",
    "choices": [
        {"index": 0, "text": "Hello", "logprobs": LOGPROBS, "finish_reason": "stop"},
        {"index": 1, "text": "Hi", "logprobs": None, "finish_reason": "length"},
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}  # fmt: skip


def test_a_document_is_a_chat_completion():
    chat = json.loads(chat_completion(json.dumps(DOCUMENT).encode()))
    assert (chat["id"], chat["object"], chat["created"]) == ("chatcmpl-1", "chat.completion", 5)
    assert [c["message"] for c in chat["choices"]] == [
        {"role": "assistant", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    assert [c["finish_reason"] for c in chat["choices"]] == ["stop", "length"]
    assert chat["usage"] == DOCUMENT["usage"]


def test_logprobs_have_the_form_of_a_chat():
    first, second = json.loads(chat_completion(json.dumps(DOCUMENT).encode()))["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("He", -0.1, [72, 101])
    assert [(t["token"], t["logprob"]) for t in first["top_logprobs"]] == [("He", -0.1), ("Ho", -2.0)]
    assert (second["token"], second["logprob"], second["top_logprobs"]) == ("llo", None, [])


@pytest.mark.parametrize("body", [b"", b"[]", b'{"choices": 1}', b"<html>"])
def test_a_document_that_is_no_answer_is_malformed(body):
    with pytest.raises(MalformedAnswer):
        chat_completion(body)


def piece(text: str, index: int = 0, finish: str | None = None, **more: object) -> bytes:
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
    event = {"id": "cmpl-1", "object": "text_completion", "created": 5, "model": "there", "choices": [choice], **more}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


USAGE = b'data: {"id":"cmpl-1","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = piece("Hel") + piece("lo", finish="stop") + USAGE + DONE


@given(st.lists(st.integers(min_value=1, max_value=len(STREAM) - 1), max_size=8))
def test_a_stream_is_the_chunks_of_a_chat_wherever_it_is_cut(cuts):
    chunks, at = Chunks(), [0, *sorted(cuts), len(STREAM)]
    got = b"".join(chunks.feed(STREAM[a:b]) for a, b in pairwise(at)) + chunks.end()
    assert text_of(got.decode()) == "Hello"
    assert json.loads(got.split(b"\n\n")[-3][6:])["usage"]["total_tokens"] == 5


def test_each_of_several_answers_begins_with_its_role():
    chunks = Chunks()
    got = chunks.feed(piece("a") + piece("b", 1) + piece("c", 0) + DONE)
    deltas = [json.loads(line[6:])["choices"][0] for line in got.decode().split("\n\n")[:-2]]
    assert [(d["index"], d["delta"].get("role")) for d in deltas if "role" in d["delta"]] == [
        (0, "assistant"),
        (1, "assistant"),
    ]


def test_a_stream_without_its_end_is_cut():
    chunks = Chunks()
    chunks.feed(piece("Hel", finish="stop"))
    with pytest.raises(TruncatedAnswer):
        chunks.end()


def test_an_error_in_a_stream_passes_for_the_walk_to_see():
    error = b'data: {"error":{"message":"no","code":500}}\n\n'
    assert Chunks().feed(piece("a") + error).endswith(error)


# All of it


async def through(play: list[bytes | Step], *, stream: bool, **fields: object):
    async with upstream(play) as there:
        only = EndpointSettings(base_url=f"{there.address}/v1", provider="completions", model="llama-3")
        adapter = AdapterSettings(temperature=(0.0, 1.0), stop=("END",))
        config = Config(models={"m": ModelSettings(endpoints=(only,), adapter=adapter)})
        providers.prepare(config)
        async with proxying(config) as proxy:
            answer = await proxy.ask(stream=stream, **fields)
    return answer, json.loads(there.requests[0].body)


def test_a_client_has_a_chat_with_a_server_of_text():
    answer, got = asyncio.run(through([ok(json.dumps(DOCUMENT).encode(), JSON)], stream=False, temperature=2))
    assert answer.json()["choices"][0]["message"]["content"] == "Hello"
    assert answer.json()["model"] == "m"
    assert answer.headers["x-polyvox-adapted"] == "temperature=1"
    assert got["temperature"] == 1.0 and got["stop"] == ["END", "<|eot_id|>"]


def test_a_client_streams_a_chat_from_a_server_of_text():
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    answer, got = asyncio.run(through([head, STREAM, Step.CLOSE], stream=True))
    assert text_of(answer.text) == "Hello"
    assert "usage" not in answer.text  # we asked for it, the client did not
    assert got["stream_options"]["include_usage"] is True


def test_a_chat_that_broke_elsewhere_goes_on_at_a_server_of_text():
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    broken = [head, ROLE, event(content="Once "), event(content="upon"), Step.RESET]
    rest = [head, piece(" a"), piece(" time", finish="stop"), DONE, Step.CLOSE]

    async def story() -> None:
        async with upstream(broken) as chats, upstream(rest) as texts:
            there = (
                EndpointSettings(base_url=f"{chats.address}/v1", weight=1.0),
                EndpointSettings(base_url=f"{texts.address}/v1", provider="completions", weight=1.0, model="qwen"),
            )
            first, then = (ModelSettings(endpoints=(each,)) for each in there)
            config = Config(models={"m": first, "n": then}, fallbacks={"m": ("n",)})
            providers.prepare(config)
            async with proxying(config) as proxy:
                answer = await proxy.ask(stream=True)
            assert text_of(answer.text) == "Once upon a time"
            assert json.loads(texts.requests[0].body)["prompt"].endswith("<|im_start|>assistant\nOnce upon")

    asyncio.run(story())
