"""A worker that answers questions which mean the same, with an embedding model of its own or of others."""

import asyncio
import contextlib
import json

import pytest

from proxy.cache.settings import CacheRule, CacheSettings, Embeddings, Semantic
from proxy.config import ApiKey, Config, EndpointSettings, ModelSettings, Server
from proxy.secret import Secret
from tests.cache.test_cached import said, stream, whole
from tests.fakes.one_worker import JSON, proxying, text_of
from tests.fakes.scripted_upstream import Step, ok, upstream


def vector(*numbers):
    answer = {"object": "list", "model": "e", "data": [{"object": "embedding", "index": 0, "embedding": numbers}],
              "usage": {"prompt_tokens": 3, "total_tokens": 3}}  # fmt: skip
    return [ok(json.dumps(answer).encode(), JSON)]


NEAR, SAME, FAR = vector(1, 0), vector(0.99, 0.14), vector(0, 1)  # the cosine of the first two is .990


@contextlib.asynccontextmanager
async def serving(answers, vectors, keys=(), elsewhere=False, **settings):
    """A worker whose alias `bot` of the model `m` compares questions; yields it and both upstreams."""
    async with upstream(*answers) as up, upstream(*vectors) as embedder:
        models = {
            "m": ModelSettings(endpoints=(EndpointSettings(base_url=f"{up.address}/v1"),)),
            "e": ModelSettings(endpoints=(EndpointSettings(base_url=f"{embedder.address}/v1"),)),
        }
        there = Embeddings(f"{embedder.address}/v1", "their-model", Secret("sk-sentinel"))
        semantic = Semantic(**{"embeddings": there if elsewhere else "e", "timeout": 10, **settings})
        cache = CacheSettings(models={"bot": CacheRule(when="always", semantic=semantic)})
        given = Server(api_keys=keys, admin_keys=(Secret("secret-admin"),))
        made = Config(models=models, aliases={"bot": "m"}, cache=cache, server=given)
        async with proxying(made) as proxy:
            yield proxy, up, embedder


async def ask(proxy, question, model="bot", key=None, **fields):
    messages = [{"role": "user", "content": question}]
    headers = {"authorization": f"Bearer {key}"} if key else {}
    body = {"model": model, "messages": messages, **fields}
    return await proxy.client.post("/v1/chat/completions", json=body, headers=headers)


def words(answer):
    return answer.json()["choices"][0]["message"]["content"]


def run(scenario):
    asyncio.run(scenario())


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_question_that_means_the_same_is_answered_from_the_cache(elsewhere):
    async def scenario():
        async with serving([[whole("Paris")], [whole("Rain")]], [NEAR, SAME, FAR], elsewhere=elsewhere) as parts:
            proxy, _up, embedder = parts
            first = await ask(proxy, "capital of France?")
            second = await ask(proxy, "France's capital?")
            third = await ask(proxy, "weather?")
            assert [said(answer) for answer in (first, second, third)] == ["miss", "hit", "miss"]
            assert second.json()["choices"] == first.json()["choices"]
            assert second.headers["x-polyvox-cache-similarity"] == "0.9901"
            assert "x-polyvox-cache-similarity" not in first.headers
            assert words(third) == "Rain"
            body = json.loads(embedder.requests[0].body)
            assert body == {"model": "their-model" if elsewhere else "e", "input": "capital of France?"}
            sent = embedder.requests[0].values(b"authorization")
            assert sent == ([b"Bearer sk-sentinel"] if elsewhere else [])

    run(scenario)


def test_it_is_answered_in_the_form_that_is_asked_for():
    async def scenario():
        async with serving([[stream("Pa", "ris")]], [NEAR, SAME]) as (proxy, up, _):
            await ask(proxy, "capital of France?", stream=True)
            plain, streamed = await ask(proxy, "France's capital?"), await ask(proxy, "France's capital?", stream=True)
            assert words(plain) == "Paris"
            assert plain.json()["model"] == "bot"
            assert text_of(streamed.text) == "Paris"
            assert len(up.requests) == 1

    run(scenario)


@pytest.mark.parametrize(
    "changed",
    [
        {"max_tokens": 5}, {"temperature": 0.5}, {"model": "m", "temperature": 0},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [{"role": "system", "content": "Shout."}, {"role": "user", "content": "France's capital?"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,A"}}]}]},
        {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]},
    ],
)  # fmt: skip
def test_what_differs_in_more_than_the_words_of_one_question_is_asked(changed):
    async def scenario():
        async with serving([[whole("Paris")], [whole("other")]], [NEAR, SAME]) as (proxy, _up, _):
            await ask(proxy, "capital of France?")
            answer = await ask(proxy, "France's capital?", **{"model": "bot", **changed})
            assert said(answer) == "miss"
            assert words(answer) == "other"

    run(scenario)


def test_no_answer_goes_from_one_key_to_another():
    async def scenario():
        keys = (ApiKey("secret-one"), ApiKey("secret-two"))
        async with serving([[whole("mine")], [whole("yours")]], [NEAR, SAME], keys=keys) as (proxy, _, _e):
            await ask(proxy, "capital of France?", key="secret-one")
            answer = await ask(proxy, "France's capital?", key="secret-two")
            assert words(answer) == "yours"

    run(scenario)


def test_a_shadow_tells_what_would_be_hit_and_answers_nothing():
    async def scenario():
        answers = [[whole("It is Paris")], [whole("It is Paris")], [whole("Rain")]]
        async with serving(answers, [NEAR, SAME, FAR], shadow=True) as (proxy, _up, _):
            for question in ("capital of France?", "France's capital?", "weather?"):
                answer = await ask(proxy, question)
                assert said(answer) == "miss"
                assert "x-polyvox-cache-similarity" not in answer.headers
            told = await proxy.client.get("/admin/cache/semantic", headers={"authorization": "Bearer secret-admin"})
            assert told.json().keys() == {"object", "models"}
            report = told.json()["models"]["bot"]
            assert {k: report[k] for k in ("shadow", "questions", "unanswered", "hits")} == {
                "shadow": True, "questions": 3, "unanswered": 0, "hits": 1,
            }  # fmt: skip
            page = proxy.page()
            assert page.value("polyvox_semantic_hits_total", model_name="bot") == 1
            assert page.value("polyvox_semantic_similarity_bucket", model_name="bot", le="0.99") == 1
            assert page.value("polyvox_semantic_similarity_bucket", model_name="bot", le="+Inf") == 2
            assert report["steps"][0] == {"least": 0.99, "questions": 1, "answers_alike": 1.0}

    run(scenario)


@pytest.mark.parametrize(
    "vectors", [[[ok(b"no", JSON)]], [[ok(b"{}", JSON, status=b"500 Internal Server Error")]], [[Step.CLOSE]]]
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_without_vectors_requests_go_on(vectors, elsewhere):
    async def scenario():
        async with serving([[whole("Paris")]], vectors, elsewhere=elsewhere) as (proxy, _up, _):
            answers = [await ask(proxy, f"question {n}?") for n in range(6)]
            assert {answer.status_code for answer in answers} == {200}
            assert {said(answer) for answer in answers} == {"miss"}

    run(scenario)


def test_an_embedding_model_that_hangs_delays_a_request_no_longer_than_told():
    async def scenario():
        async with serving([[whole("Paris")]], [[Step.STALL]], timeout=0.02) as (proxy, _up, _):
            assert words(await ask(proxy, "capital of France?")) == "Paris"

    run(scenario)


def test_a_request_for_no_cache_is_not_compared():
    async def scenario():
        async with serving([[whole("one")], [whole("two")]], [NEAR, SAME]) as (proxy, _, embedder):
            await ask(proxy, "capital of France?")
            answer = await ask(proxy, "France's capital?", cache={"no-cache": True})
            assert words(answer) == "two"
            assert len(embedder.requests) == 1

    run(scenario)


def test_vectors_of_a_model_of_ours_are_in_the_metrics():
    async def scenario():
        async with serving([[whole("Paris")]], [NEAR]) as (proxy, _, _e):
            await ask(proxy, "capital of France?")
            page = proxy.page()
            assert page.value("polyvox_requests_total", model_name="e", endpoint="e/0", operation="embeddings") == 1

    run(scenario)
