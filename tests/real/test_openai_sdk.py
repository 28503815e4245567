"""Real vLLM behind the proxy, seen through the OpenAI SDK."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.serving import Server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120, func_only=True)]

MODEL = "smollm2"
ALIAS = "gpt-3.5-turbo"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]

PLACE = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome", "Oslo"]},
        "days": {"type": "integer", "maximum": 9, "minimum": 1},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
FORECAST = {
    "type": "function",
    "function": {"name": "forecast", "description": "Tells the weather", "parameters": PLACE, "strict": True},
}


def async_client(server: Server) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120)


# Chat


def test_a_chat_completion_names_the_capital_of_france(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.usage
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.completion_tokens > 0


def test_a_streamed_chat_says_in_pieces_what_the_plain_one_says_at_once(client: OpenAI) -> None:
    plain = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0)
    with client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, stream=True) as stream:
        chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
    assert "".join(pieces) == plain.choices[0].message.content
    assert len(pieces) > 1
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {c.model for c in chunks} == {MODEL}


def test_the_async_sdk_gets_plain_and_streamed_chats(server: Server) -> None:
    async def ask() -> tuple[str, str]:
        async with async_client(server) as sdk:
            plain = await sdk.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0)
            stream = await sdk.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, stream=True)
            pieces = [c.choices[0].delta.content or "" async for c in stream]
        return plain.choices[0].message.content or "", "".join(pieces)

    plain, streamed = asyncio.run(ask())
    assert "Paris" in plain
    assert streamed == plain


def test_a_stream_that_asks_for_usage_ends_with_the_usage_of_the_plain_answer(client: OpenAI) -> None:
    plain = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0)
    with client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *others, last = stream
    assert last.choices == []
    assert last.usage
    assert plain.usage
    assert last.usage.total_tokens == plain.usage.total_tokens
    assert all(c.usage is None for c in others)


def test_a_stream_that_does_not_ask_for_usage_has_none(client: OpenAI) -> None:
    with client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, stream=True) as stream:
        chunks = list(stream)
    assert all(c.usage is None for c in chunks)
    assert all(c.choices for c in chunks)


def test_n_gives_as_many_choices_plain_and_streamed(client: OpenAI) -> None:
    plain = client.chat.completions.create(model=MODEL, messages=FRANCE, n=2, max_tokens=8)
    with client.chat.completions.create(model=MODEL, messages=FRANCE, n=2, max_tokens=8, stream=True) as stream:
        seen = {choice.index for chunk in stream for choice in chunk.choices}
    assert [c.index for c in plain.choices] == [0, 1]
    assert seen == {0, 1}


def test_a_seed_repeats_a_random_answer(client: OpenAI) -> None:
    def answer(seed: int) -> str | None:
        story = [{"role": "user", "content": "Tell me a story."}]
        done = client.chat.completions.create(model=MODEL, messages=story, temperature=1, seed=seed, max_tokens=16)
        return done.choices[0].message.content

    assert answer(7) == answer(7)
    assert len({answer(seed) for seed in (7, 8, 9)}) > 1


def test_log_probabilities_come_for_every_token_with_the_alternatives_asked_for(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert answer.usage
    assert len(logprobs.content) in (answer.usage.completion_tokens, answer.usage.completion_tokens - 1)
    assert all(len(token.top_logprobs) == 3 for token in logprobs.content)
    assert all(token.logprob == max(t.logprob for t in token.top_logprobs) for token in logprobs.content)


def test_json_schema_answers_hold_to_the_schema(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=FRANCE,
        temperature=0,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}},
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), PLACE)


# Tools


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "forecast"}}, "required"])
def test_a_forced_tool_call_has_arguments_that_hold_to_the_schema(client: OpenAI, choice: object) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=FRANCE, tools=[FORECAST], tool_choice=choice, max_tokens=200, temperature=0
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "forecast"
    jsonschema.validate(json.loads(call.function.arguments), PLACE)


def test_a_streamed_tool_call_can_be_put_together(client: OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "forecast"}}
    with client.chat.completions.create(
        model=MODEL, messages=FRANCE, tools=[FORECAST], tool_choice=choice, temperature=0, max_tokens=200, stream=True
    ) as stream:
        calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    assert len(calls) > 1
    assert "".join(c.function.name or "" for c in calls if c.function) == "forecast"
    arguments = "".join(c.function.arguments or "" for c in calls if c.function)
    jsonschema.validate(json.loads(arguments), PLACE)


def test_the_result_of_a_tool_is_read_by_the_model(client: OpenAI) -> None:
    call = {"id": "call-1", "type": "function", "function": {"name": "forecast", "arguments": '{"city": "Oslo"}'}}
    asked = [*FRANCE, {"role": "assistant", "content": "", "tool_calls": [call]}]
    short = {"role": "tool", "tool_call_id": "call-1", "content": "sun"}
    long = {**short, "content": "sun " * 50}
    few, many = (
        client.chat.completions.create(
            model=MODEL, messages=[*asked, turn], tools=[FORECAST], temperature=0, max_tokens=8
        )
        for turn in (short, long)
    )
    assert few.choices[0].message.content
    assert few.usage
    assert many.usage
    assert many.usage.prompt_tokens >= few.usage.prompt_tokens + 49


# Completions


def test_a_completion_continues_its_prompt_plain_and_streamed(client: OpenAI) -> None:
    prompt = "The capital of France is"
    plain = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=8)
    with client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=8, stream=True) as stream:
        streamed = "".join(chunk.choices[0].text for chunk in stream)
    assert "Paris" in plain.choices[0].text
    assert streamed == plain.choices[0].text
    assert plain.choices[0].finish_reason == "length"


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="1, 2, 3, 4, 5,", temperature=0, max_tokens=40, stop=["8"])
    assert answer.choices[0].text.strip() == "6, 7,"
    assert answer.choices[0].finish_reason == "stop"


def test_completions_give_log_probabilities(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=4, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert len(logprobs.tokens or []) == 4
    assert all(p <= 0 for p in logprobs.token_logprobs or [1])


# Responses


def test_the_responses_api_names_the_capital_of_france(client: OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="What is the capital of France?", temperature=0)
    assert "Paris" in answer.output_text
    assert answer.status == "completed"
    assert answer.model == MODEL


def test_a_streamed_response_is_put_together_from_its_events(client: OpenAI) -> None:
    with client.responses.create(
        model=ALIAS, input="What is the capital of France?", temperature=0, stream=True
    ) as stream:
        events = list(stream)
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert events[0].response.model == events[-1].response.model == ALIAS
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert "Paris" in deltas
    assert deltas == events[-1].response.output_text


# Names


def test_an_alias_answers_under_the_name_that_was_asked_for(client: OpenAI) -> None:
    plain = client.chat.completions.create(model=ALIAS, messages=FRANCE, temperature=0)
    with client.chat.completions.create(model=ALIAS, messages=FRANCE, temperature=0, stream=True) as stream:
        chunks = list(stream)
    assert plain.model == ALIAS
    assert "Paris" in (plain.choices[0].message.content or "")
    assert {c.model for c in chunks} == {ALIAS}


def test_models_and_aliases_are_listed_and_found_one_by_one(client: OpenAI) -> None:
    names = {m.id for m in client.models.list()}
    models = {"smollm2", "gpt-3.5-turbo", "tiny-mistral", "tiny-qwen", "tiny-llama", "tiny-embedder", "tiny-whisper"}
    virtual = {"auto", "auto:cheap", "auto:best", "auto:fast"}
    assert names == models | virtual | {"twins", "surest", "written"}
    assert {client.models.retrieve(name).id for name in names} == names


def test_embeddings_have_the_length_of_the_hidden_state_and_tell_texts_apart(client: OpenAI) -> None:
    answer = client.embeddings.create(model="tiny-embedder", input=["Paris is a city", "a stone", "Paris is a city"])
    first, second, third = (item.embedding for item in answer.data)
    assert len(first) == len(second) == 64
    assert first == pytest.approx(third, abs=1e-4)
    assert first != pytest.approx(second, abs=1e-2)


# Many at once


def test_sixteen_requests_at_once_are_all_answered(server: Server) -> None:
    async def ask() -> list[str]:
        async with async_client(server) as sdk:
            asked = [
                sdk.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=20)
                for _ in range(16)
            ]
            return [a.choices[0].message.content or "" for a in await asyncio.gather(*asked)]

    answers = asyncio.run(ask())
    assert len(answers) == 16
    assert all("Paris" in answer for answer in answers)


def test_two_engines_answer_at_once_each_under_its_own_name(client: OpenAI) -> None:
    def ask(model: str) -> str:
        return client.chat.completions.create(model=model, messages=FRANCE, max_tokens=12, temperature=0).model

    models = [MODEL, "tiny-mistral"] * 4
    with ThreadPoolExecutor(len(models)) as pool:
        assert list(pool.map(ask, models)) == models


# Errors


def test_an_unknown_model_is_not_found_and_the_message_names_close_ones(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="smollm2") as caught:
        client.chat.completions.create(model="smollm", messages=FRANCE)
    assert caught.value.code == "model_not_found"


def test_no_model_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="model"):
        client.post("/chat/completions", body={"messages": FRANCE}, cast_to=object)


def test_malformed_json_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="JSON"):
        client.post("/chat/completions", content=b'{"model": "smollm2", ', cast_to=object)


@pytest.mark.parametrize("fields", [{"messages": "hello"}, {"max_tokens": "many"}, {"temperature": -3}, {"model": 5}])
def test_a_field_of_the_wrong_kind_is_a_bad_request(client: OpenAI, fields: dict[str, object]) -> None:
    body = {"model": MODEL, "messages": FRANCE, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert next(iter(fields)) in str(caught.value)


def test_a_prompt_longer_than_the_context_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "stone " * 3000}])


def test_a_path_that_is_not_served_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.post("/chat/inventions", body={"model": MODEL}, cast_to=object)


def test_a_method_that_is_not_served_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.get("/chat/completions", cast_to=object)
    assert caught.value.status_code == 405
