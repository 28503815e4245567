"""The architectures and chat formats of Vistral (Mistral), Qwen and Llama, as tiny checkpoints in real vLLM."""

import httpx2
import pytest
from openai import OpenAI

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120, func_only=True)]

SYSTEM = {"role": "system", "content": "Be kind."}
QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris."}

RENDERED = {
    "tiny-mistral": (
        "<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]What is the capital of France?[/INST]Paris.</s>"
        "[INST]What is the capital of France?[/INST]"
    ),
    "tiny-qwen": (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nParis.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "tiny-llama": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is the capital of France?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nParis.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is the capital of France?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}
MODELS = sorted(RENDERED)


@pytest.mark.parametrize("model", MODELS)
def test_the_messages_are_rendered_in_the_chat_format_of_the_model(http: httpx2.Client, model: str) -> None:
    messages = [SYSTEM, QUESTION, ANSWER, QUESTION]
    tokens = http.post("/tokenize", json={"model": model, "messages": messages}).raise_for_status().json()
    text = http.post("/detokenize", json={"model": model, "tokens": tokens["tokens"]}).raise_for_status().json()
    assert text["prompt"] == RENDERED[model]


@pytest.mark.parametrize("model", MODELS)
def test_every_architecture_chats_plain_and_streamed(client: OpenAI, model: str) -> None:
    asked = {"model": model, "messages": [SYSTEM, QUESTION], "temperature": 0, "max_tokens": 12}
    options = {"extra_body": {"ignore_eos": True}}
    plain = client.chat.completions.create(**asked, **options)
    with client.chat.completions.create(**asked, **options, stream=True) as stream:
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert plain.model == model
    assert plain.usage
    assert plain.usage.completion_tokens == 12
    assert plain.choices[0].message.content
    assert streamed == plain.choices[0].message.content


@pytest.mark.parametrize("model", MODELS)
def test_a_chat_takes_as_many_tokens_as_its_rendered_prompt_has(
    client: OpenAI, http: httpx2.Client, model: str
) -> None:
    tokens = http.post("/tokenize", json={"model": model, "messages": [QUESTION]}).raise_for_status().json()
    answer = client.chat.completions.create(model=model, messages=[QUESTION], max_tokens=1)
    assert answer.usage
    assert answer.usage.prompt_tokens == tokens["count"]


def test_tools_are_rendered_in_the_format_that_qwen_was_taught(http: httpx2.Client) -> None:
    function = {"name": "forecast", "parameters": {"type": "object", "properties": {}}}
    body = {"model": "tiny-qwen", "messages": [QUESTION], "tools": [{"type": "function", "function": function}]}
    tokens = http.post("/tokenize", json=body).raise_for_status().json()["tokens"]
    prompt = http.post("/detokenize", json={"model": "tiny-qwen", "tokens": tokens}).raise_for_status().json()["prompt"]
    assert "<tools>" in prompt
    assert '"name": "forecast"' in prompt
