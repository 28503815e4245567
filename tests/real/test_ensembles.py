"""Several real models that answer one request."""

import httpx2
import pytest
from openai import OpenAI

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120, func_only=True)]

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"messages": FRANCE, "temperature": 0, "max_tokens": 12}


def test_a_model_agrees_with_itself(http: httpx2.Client):
    answer = http.post("/v1/chat/completions", json={"model": "twins", **GREEDY})
    body = answer.json()
    assert "Paris" in body["choices"][0]["message"]["content"]
    assert body["ensemble"]["agreement_score"] == 1.0
    assert body["usage"]["completion_tokens"] == 2 * body["ensemble"]["answers"][0]["usage"]["completion_tokens"]


def test_a_model_that_knows_is_surer_than_one_that_babbles(http: httpx2.Client):
    body = http.post("/v1/chat/completions", json={"model": "surest", **GREEDY}).json()
    assert body["ensemble"]["chosen"] == "smollm2"
    assert body["choices"][0]["logprobs"] is None
    sure = body["ensemble"]["confidence"]
    assert 0 < sure["tiny-qwen"] < sure["smollm2"] <= 1


def test_the_sdk_reads_what_a_model_writes_from_the_answers_of_others(client: OpenAI):
    usage = {"include_usage": True}
    stream = client.chat.completions.create(model="written", stream=True, stream_options=usage, **GREEDY)
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    (last,) = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    told = last.model_extra["ensemble"]
    assert [answer["status"] for answer in told["answers"]] == ["answered", "answered"]
    assert chunks[-1].usage.total_tokens == sum(
        part["usage"]["total_tokens"] for part in (*told["answers"], told["writer"])
    )
