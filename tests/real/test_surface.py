"""Every route of vLLM's server through the proxy, the bodies of coding agents, and clients that go away."""

import asyncio
import io
import json
import math
import struct
import wave
from collections.abc import Iterator

import httpx2
import pytest

from tests.serving import Server, eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120, func_only=True)]

MODEL = "smollm2"
ALIAS = "gpt-3.5-turbo"
QUESTION = "What is the capital of France?"
FRANCE = [{"role": "user", "content": QUESTION}]
FORECAST = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def post(http: httpx2.Client, path: str, body: dict[str, object]) -> dict[str, object]:
    """Return the decoded answer; fail with its body where the status is not 200."""
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    decoded: dict[str, object] = answer.json()
    return decoded


def events(http: httpx2.Client, path: str, body: dict[str, object]) -> list[dict[str, object]]:
    """Return the data of every event of a stream, less the closing [DONE]."""
    with http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.read()
        data = [line.removeprefix("data:").strip() for line in answer.iter_lines() if line.startswith("data:")]
    return [json.loads(d) for d in data if d != "[DONE]"]


# The answer is the engine's


def test_the_answer_of_the_engine_reaches_the_client_whole(server: Server, http: httpx2.Client) -> None:
    body = {"model": MODEL, "messages": FRANCE, "temperature": 0, "logprobs": True, "return_token_ids": True}
    with server.engine_client(MODEL) as engine:
        direct = post(engine, "/v1/chat/completions", body)
    proxied = post(http, "/v1/chat/completions", body)
    for answer in (direct, proxied):
        del answer["id"], answer["created"]
    assert proxied == direct
    assert proxied["prompt_token_ids"]


def test_a_plain_answer_carries_the_identifiers_of_the_request(http: httpx2.Client) -> None:
    body = {"model": ALIAS, "messages": FRANCE, "max_tokens": 1}
    named = http.post("/v1/chat/completions", json=body, headers={"x-request-id": "my-own"})
    unnamed = http.post("/v1/chat/completions", json=body)
    assert named.headers["x-request-id"] == "my-own"
    assert unnamed.headers["x-request-id"]
    assert named.headers["x-polyvox-model"] == MODEL
    assert MODEL in named.headers["x-polyvox-endpoint"]


# Anthropic's messages


def test_messages_names_the_capital_of_france(http: httpx2.Client) -> None:
    answer = post(http, "/v1/messages", {"model": ALIAS, "max_tokens": 40, "temperature": 0, "messages": FRANCE})
    assert answer["type"] == "message"
    assert answer["model"] == ALIAS
    assert answer["stop_reason"] == "end_turn"
    assert "Paris" in str(answer["content"])


def test_messages_streams_the_events_of_anthropic_in_order(http: httpx2.Client) -> None:
    body = {"model": ALIAS, "max_tokens": 40, "temperature": 0, "messages": FRANCE}
    seen = events(http, "/v1/messages?beta=true", body)
    kinds = [e["type"] for e in seen if e["type"] != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert seen[0]["message"]["model"] == ALIAS
    deltas = [e["delta"] for e in seen if e["type"] == "content_block_delta"]
    assert "Paris" in "".join(d["text"] for d in deltas)


def test_messages_calls_the_tool_that_it_must(http: httpx2.Client) -> None:
    tool = {"name": "forecast", "strict": True, "input_schema": FORECAST}
    body = {"model": MODEL, "max_tokens": 100, "temperature": 0, "messages": FRANCE, "tools": [tool]}
    answer = post(http, "/v1/messages", {**body, "tool_choice": {"type": "tool", "name": "forecast"}})
    (use,) = [block for block in answer["content"] if block["type"] == "tool_use"]
    assert use["name"] == "forecast"
    assert use["input"]["city"] in ("Paris", "Rome", "Oslo")


# Coding agents


AGENT_RULES = "Read the file before you make a change to it, and run the tests when it is made. " * 200
AGENT_TOOL_WORDS = "Use this tool when you need to read the contents of a file before you make a change. " * 10


def agent_schema(number: int) -> dict[str, object]:
    """Return a schema of the size and kind that coding agents describe their tools with."""
    path = {"type": "string", "description": "The absolute path to the file to read"}
    mode = {"type": "string", "enum": ["read", "write"], "description": f"How tool {number} opens the file"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"path": path, "mode": mode, "limit": {"type": "integer", "minimum": 0}},
        "required": ["path"],
        "additionalProperties": False,
    }


def messages_of_an_agent() -> dict[str, object]:
    """Return a body as coding agents send it to Anthropic's API."""
    cached = {"cache_control": {"type": "ephemeral"}}
    tools = [{"name": f"tool_{i}", "description": AGENT_TOOL_WORDS, "input_schema": agent_schema(i)} for i in range(40)]
    return {
        "model": "tiny-qwen",
        "max_tokens": 16,
        "temperature": 1,
        "metadata": {"user_id": "user_1"},
        "system": [{"type": "text", "text": AGENT_RULES, **cached}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Fix the bug.", **cached}]}],
        "tools": tools,
    }


def response_of_an_agent() -> dict[str, object]:
    """Return a body as coding agents send it to OpenAI's Responses API."""
    tools = [
        {
            "type": "function",
            "name": f"tool_{i}",
            "description": AGENT_TOOL_WORDS,
            "strict": False,
            "parameters": agent_schema(i),
        }
        for i in range(40)
    ]
    text = [{"type": "input_text", "text": "Fix the bug."}]
    return {
        "model": "tiny-qwen",
        "instructions": AGENT_RULES,
        "input": [{"type": "message", "role": "user", "content": text}],
        "tools": tools,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "store": False,
        "include": [],
        "prompt_cache_key": "a-conversation",
        "max_output_tokens": 16,
    }


def test_the_messages_of_a_coding_agent_are_answered_plain_and_streamed(http: httpx2.Client) -> None:
    body = messages_of_an_agent()
    assert len(json.dumps(body)) > 60_000
    plain = post(http, "/v1/messages?beta=true", body)
    streamed = events(http, "/v1/messages?beta=true", body)
    assert plain["usage"]["input_tokens"] > 5_000, "the tools did not reach the model"
    assert plain["content"]
    assert streamed[-1]["type"] == "message_stop"


def test_the_responses_of_a_coding_agent_are_answered_plain_and_streamed(http: httpx2.Client) -> None:
    body = response_of_an_agent()
    assert len(json.dumps(body)) > 60_000
    plain = post(http, "/v1/responses", body)
    streamed = events(http, "/v1/responses", body)
    assert plain["usage"]["input_tokens"] > 5_000, "the tools did not reach the model"
    assert plain["output"]
    assert streamed[-1]["type"] in ("response.completed", "response.incomplete")


# Tokens


def test_tokens_of_a_prompt_give_the_prompt_back(http: httpx2.Client) -> None:
    tokens = post(http, "/tokenize", {"model": MODEL, "prompt": QUESTION})
    text = post(http, "/detokenize", {"model": MODEL, "tokens": tokens["tokens"]})
    assert tokens["count"] == len(tokens["tokens"]) > 3
    assert text["prompt"] == QUESTION


# Pooling


def test_embeddings_come_as_numbers(http: httpx2.Client) -> None:
    answer = post(http, "/v1/embeddings", {"model": "tiny-embedder", "input": "Paris is a city"})
    (item,) = answer["data"]
    assert len(item["embedding"]) == 64
    assert math.hypot(*item["embedding"]) == pytest.approx(1, abs=1e-3)


def test_a_score_is_highest_for_the_same_text(http: httpx2.Client) -> None:
    body = {"model": "tiny-embedder", "text_1": "Paris is a city", "text_2": ["a stone", "Paris is a city"]}
    other, same = (item["score"] for item in post(http, "/v1/score", body)["data"])
    assert same == pytest.approx(1, abs=1e-3)
    assert other < same


def test_rerank_puts_the_same_text_first(http: httpx2.Client) -> None:
    body = {"model": "tiny-embedder", "query": "Paris is a city", "documents": ["a stone", "Paris is a city"]}
    answer = post(http, "/v1/rerank", body)
    assert [result["index"] for result in answer["results"]] == [1, 0]


# Audio


def tone(seconds: float = 0.5, rate: int = 16_000) -> bytes:
    """Return a WAV file of a tone of 440 Hz."""
    samples = (int(8000 * math.sin(2 * math.pi * 440 * i / rate)) for i in range(int(seconds * rate)))
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"".join(struct.pack("<h", s) for s in samples))
    return buffer.getvalue()


def test_a_recording_is_transcribed(http: httpx2.Client) -> None:
    form = {"model": "tiny-whisper", "language": "en", "max_completion_tokens": "8"}
    answer = http.post("/v1/audio/transcriptions", data=form, files={"file": ("tone.wav", tone(), "audio/wav")})
    assert answer.status_code == 200, answer.text
    assert answer.json()["text"]
    assert answer.json()["usage"]["seconds"] == 1


def test_a_recording_for_an_unknown_model_is_not_found(http: httpx2.Client) -> None:
    files = {"file": ("tone.wav", tone(), "audio/wav")}
    answer = http.post("/v1/audio/transcriptions", data={"model": "tiny-whispers"}, files=files)
    assert answer.status_code == 404
    assert "tiny-whisper" in answer.json()["error"]["message"]


# Clients that go away: the engine is idle before it has made half of the answer.

LONG = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "max_tokens": 1900,
    "ignore_eos": True,
}
SOON = 60.0  # seconds
RUNNING, GENERATED = "vllm:num_requests_running", "vllm:generation_tokens_total"


@pytest.fixture
def idle(server: Server) -> Iterator[float]:
    """The number of tokens generated so far by an engine that is idle before the test and is so after it."""
    eventually(lambda: server.gauge(MODEL, RUNNING) == 0, SOON)
    before = server.gauge(MODEL, GENERATED)
    yield before
    eventually(lambda: server.gauge(MODEL, RUNNING) == 0, SOON, lambda: "the engine goes on generating")
    assert server.gauge(MODEL, GENERATED) - before < LONG["max_tokens"] / 2


def test_a_client_that_leaves_a_stream_ends_the_generation(server: Server, http: httpx2.Client, idle: float) -> None:
    with http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as answer:
        chunks = answer.iter_raw()
        received = b"".join(next(chunks) for _ in range(3))
        assert b"data:" in received
        assert server.gauge(MODEL, RUNNING) == 1
        answer.close()
    eventually(lambda: server.gauge(MODEL, RUNNING) == 0, SOON)
    assert server.gauge(MODEL, GENERATED) > idle


def test_a_client_that_leaves_before_a_plain_answer_ends_the_generation(server: Server, idle: float) -> None:
    async def ask_and_leave() -> None:
        async with httpx2.AsyncClient(base_url=server.base_url, timeout=120) as http:
            asked = asyncio.create_task(http.post("/v1/chat/completions", json=LONG))
            await asyncio.to_thread(eventually, lambda: server.gauge(MODEL, GENERATED) > idle, SOON)
            assert not asked.done()
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(ask_and_leave())
    eventually(lambda: server.gauge(MODEL, RUNNING) == 0, SOON)
