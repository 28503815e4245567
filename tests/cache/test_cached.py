"""A worker with a cache, before scripted upstreams on real sockets."""

import asyncio

import httpx2
import pytest

from proxy.auth import key_id
from proxy.cache.settings import CacheRule, CacheSettings
from proxy.config import ApiKey, Config, EndpointSettings, ModelSettings, Secret, Server
from proxy.cost import Price
from tests.fakes.one_worker import JSON, Proxy, document, events, proxying, text_of
from tests.fakes.scripted_upstream import Step, chunked, ok, upstream

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
USAGE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[],'
    b'"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}\n\n'
)


def config(*addresses: str, cache: CacheSettings | bool = True, **fields: object) -> Config:
    """A model `m` with an alias `a`, at some addresses."""
    endpoints = tuple(EndpointSettings(base_url=f"{address}/v1") for address in addresses)
    return Config(models={"m": ModelSettings(endpoints=endpoints)}, aliases={"a": "m"}, cache=cache, **fields)


def stream(*texts: str) -> bytes:
    *rest, done = events(*texts)
    return HEAD + chunked(*rest, USAGE, done)


def whole(text: str) -> bytes:
    return ok(document(text), JSON)


def said(answer: httpx2.Response) -> str:
    """What the cache did."""
    return answer.headers["x-polyvox-cache"]


async def ask(proxy: Proxy, model: str = "m", **fields: object) -> httpx2.Response:
    return await proxy.ask(model, temperature=0, **fields)


def run(coroutine: object) -> None:
    asyncio.run(coroutine)  # type: ignore[arg-type]


def test_the_same_question_is_answered_once() -> None:
    async def scenario() -> None:
        async with upstream([whole("one")], [whole("two")]) as up, proxying(config(up.address)) as proxy:
            first, second = await ask(proxy), await ask(proxy)
            assert (said(first), said(second)) == ("miss", "hit")
            assert first.json() == second.json()
            assert second.headers["age"] == "0"
            assert second.headers["x-polyvox-endpoint"] == "m/0"
            assert first.headers["x-polyvox-cache-key"] == second.headers["x-polyvox-cache-key"]
            assert first.headers["x-request-id"] != second.headers["x-request-id"]
            assert len(up.requests) == 1

    run(scenario())


def test_a_question_whose_answer_may_differ_is_asked_again() -> None:
    async def scenario() -> None:
        async with upstream([whole("one")], [whole("two")]) as up, proxying(config(up.address)) as proxy:
            first, second = await proxy.ask(temperature=0.7), await proxy.ask(temperature=0.7)
            assert (said(first), said(second)) == ("bypass", "bypass")
            assert first.json() != second.json()

    run(scenario())


@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"temperature": 0.0}, {"seed": 1}, {"temperature": 1, "seed": 0}]
)
def test_temperature_zero_or_a_seed_makes_an_answer_the_same(fields: dict[str, object]) -> None:
    async def scenario() -> None:
        async with upstream([whole("one")]) as up, proxying(config(up.address)) as proxy:
            await proxy.ask(**fields)
            assert said(await proxy.ask(**fields)) == "hit"

    run(scenario())


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/v1/rerank", "/v1/score", "/tokenize", "/v1/messages/count_tokens"]
)
def test_vectors_ranks_and_tokens_are_always_kept(path: str) -> None:
    async def scenario() -> None:
        answer = ok(b'{"object":"list","data":[],"model":"m","usage":{"prompt_tokens":3,"total_tokens":3}}', JSON)
        async with upstream([answer]) as up, proxying(config(up.address)) as proxy:
            body = {"model": "m", "input": "hi", "prompt": "hi"}
            first, second = [await proxy.client.post(path, json=body) for _ in range(2)]
            assert (said(first), said(second)) == ("miss", "hit")
            assert first.content == second.content

    run(scenario())


@pytest.mark.parametrize("streams", [(False, True), (True, False), (True, True)])
def test_an_answer_is_given_in_the_form_that_is_asked_for(streams: tuple[bool, bool]) -> None:
    async def scenario() -> None:
        plays = [[stream("Hel", "lo")] if streams[0] else [whole("Hello")]]
        async with upstream(*plays) as up, proxying(config(up.address)) as proxy:
            first, second = [await ask(proxy, stream=wanted) for wanted in streams]
            assert (said(first), said(second)) == ("miss", "hit")
            if streams[1]:
                assert text_of(second.text) == "Hello"
                assert "usage" not in second.text
            else:
                assert second.json()["choices"][0]["message"]["content"] == "Hello"
                assert second.json()["usage"]["completion_tokens"] == 2
            assert len(up.requests) == 1

    run(scenario())


def test_a_stream_is_given_again_byte_for_byte() -> None:
    async def scenario() -> None:
        async with upstream([stream("a", "b")]) as up, proxying(config(up.address)) as proxy:
            options = {"include_usage": True}
            first, hidden = await ask(proxy, stream=True, stream_options=options), await ask(proxy, stream=True)
            again = await ask(proxy, stream=True, stream_options=options)
            assert first.text == again.text
            assert '"usage":{' in again.text
            assert hidden.text == "".join(e.decode() for e in events("a", "b"))

    run(scenario())


def test_an_alias_shares_the_answer_of_its_model_and_is_called_by_its_own_name() -> None:
    async def scenario() -> None:
        async with upstream([stream("x")]) as up, proxying(config(up.address)) as proxy:
            await ask(proxy, stream=True)
            plain, streamed = await ask(proxy, "a"), await ask(proxy, "a", stream=True)
            assert said(plain) == said(streamed) == "hit"
            assert plain.json()["model"] == "a"
            assert '"model":"a"' in streamed.text
            assert '"model":"m"' not in streamed.text

    run(scenario())


def test_a_key_never_gets_the_answer_of_another() -> None:
    async def scenario() -> None:
        server = Server(api_keys=(ApiKey("one-key"), ApiKey("two-key")))
        async with upstream([whole("1")], [whole("2")]) as up, proxying(config(up.address, server=server)) as proxy:
            answers = []
            for secret in ("one-key", "two-key", "one-key"):
                proxy.client.headers["authorization"] = f"Bearer {secret}"
                answers.append(await ask(proxy))
            assert [said(a) for a in answers] == ["miss", "miss", "hit"]
            assert answers[0].json() == answers[2].json() != answers[1].json()

    run(scenario())


def test_a_shared_scope_is_for_all_keys() -> None:
    async def scenario() -> None:
        server = Server(api_keys=(ApiKey("one-key"), ApiKey("two-key")))
        cache = CacheSettings(models={"m": CacheRule(scope="shared")})
        async with upstream([whole("1")]) as up, proxying(config(up.address, cache=cache, server=server)) as proxy:
            for secret, result in (("one-key", "miss"), ("two-key", "hit")):
                proxy.client.headers["authorization"] = f"Bearer {secret}"
                assert said(await ask(proxy)) == result

    run(scenario())


BROKEN = {
    "an error": [ok(b'{"error":{"message":"no"}}', JSON, status=b"400 Bad Request")],
    "a stream that is cut": [HEAD + b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in events("x")[:2]), Step.CLOSE],
    "a stream without an end": [HEAD + chunked(*events("x")[:2])],
    "an error event": [HEAD + chunked(events("x")[0], b'data: {"error":{"message":"no"}}\n\n')],
    "an error in a document": [ok(b'{"error":{"message":"no"},"choices":[{"finish_reason":"stop"}]}', JSON)],
    "a document without an end": [ok(b'{"choices":[{"message":{},"finish_reason":null}]}', JSON)],
}


@pytest.mark.parametrize("play", BROKEN.values(), ids=BROKEN.keys())
def test_only_a_complete_success_is_kept(play: list[bytes]) -> None:
    async def scenario() -> None:
        streams = play[0].startswith(HEAD)
        good = [stream("good")] if streams else [whole("good")]
        async with upstream(play, play, play, play, good) as up, proxying(config(up.address)) as proxy:

            async def once() -> httpx2.Response:
                return await ask(proxy, stream=streams)

            first = await once()
            assert said(first) == "miss" if "x-polyvox-cache" in first.headers else first.status_code >= 400
            while len(up.requests) < 5:
                await once()
            assert "good" in (await once()).text
            assert len(up.requests) == 5

    run(scenario())


def test_an_answer_over_the_limit_is_not_kept() -> None:
    async def scenario() -> None:
        cache = CacheSettings(max_entry_bytes=1000)
        async with (
            upstream([whole("x" * 1000)], [stream(*["y" * 100] * 20)]) as up,
            proxying(config(up.address, cache=cache)) as proxy,
        ):
            assert said(await ask(proxy)) == "miss"
            answer = await ask(proxy, stream=True)
            assert said(answer) == "miss"
            assert text_of(answer.text) == "y" * 2000
            await ask(proxy, stream=True)
            assert len(up.requests) == 3

    run(scenario())


@pytest.mark.parametrize(
    "wish", [{"headers": {"cache-control": "no-cache"}}, {"fields": {"cache": {"no-cache": True}}}]
)
def test_no_cache_asks_anew_and_keeps_the_new_answer(wish: dict[str, dict[str, object]]) -> None:
    async def scenario() -> None:
        async with upstream([whole("old")], [whole("new")]) as up, proxying(config(up.address)) as proxy:
            await ask(proxy)
            again = await asking(proxy, wish)
            assert said(again) == "bypass"
            assert "new" in again.text
            kept = await ask(proxy)
            assert (said(kept), kept.json()) == ("hit", again.json())
            assert all(b'"cache"' not in request.body for request in up.requests)

    run(scenario())


@pytest.mark.parametrize(
    "wish", [{"headers": {"cache-control": "no-store"}}, {"fields": {"cache": {"no-store": True}}}]
)
def test_no_store_leaves_the_cache_alone(wish: dict[str, dict[str, object]]) -> None:
    async def scenario() -> None:
        async with upstream([whole("1")], [whole("2")]) as up, proxying(config(up.address)) as proxy:
            assert said(await asking(proxy, wish)) == "bypass"
            assert said(await ask(proxy)) == "miss"
            assert len(up.requests) == 2

    run(scenario())


def test_max_age_wants_a_younger_answer() -> None:
    async def scenario() -> None:
        async with upstream([whole("1")], [whole("2")]) as up, proxying(config(up.address)) as proxy:
            await ask(proxy)
            assert said(await asking(proxy, {"headers": {"cache-control": "max-age=60"}})) == "hit"
            assert said(await asking(proxy, {"headers": {"cache-control": "max-age=0"}})) == "miss"
            assert "2" in (await ask(proxy)).text

    run(scenario())


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"headers": {"cache-control": "max-age=soon"}}, "cache-control"),
        ({"fields": {"cache": {"nocache": True}}}, "cache"),
        ({"fields": {"cache": {"ttl": -1}}}, "cache"),
        ({"fields": {"cache": "off"}}, "cache"),
    ],
)
def test_a_wish_that_is_none_is_refused_by_name(wish: dict[str, dict[str, object]], param: str) -> None:
    async def scenario() -> None:
        async with upstream([whole("1")]) as up, proxying(config(up.address)) as proxy:
            answer = await asking(proxy, wish)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == param

    run(scenario())


def test_when_can_be_asked_for_unless_the_server_says_never() -> None:
    async def scenario() -> None:
        cache = CacheSettings(models={"never": CacheRule(when="never")})
        async with upstream([whole("1")]) as up:
            endpoint = EndpointSettings(base_url=f"{up.address}/v1")
            models = {"m": ModelSettings(endpoints=(endpoint,)), "never": ModelSettings(endpoints=(endpoint,))}
            async with proxying(Config(models=models, cache=cache)) as proxy:
                for model, results in (("m", ["miss", "hit"]), ("never", ["bypass", "bypass"])):
                    assert [said(await proxy.ask(model, cache={"when": "always"})) for _ in results] == results

    run(scenario())


def test_without_a_cache_answers_say_nothing_of_it_and_its_field_does_not_pass() -> None:
    async def scenario() -> None:
        async with upstream([whole("1")]) as up, proxying(config(up.address, cache=False)) as proxy:
            answers = [await ask(proxy, cache={"no-store": True}) for _ in range(2)]
            assert all("x-polyvox-cache" not in answer.headers for answer in answers)
            assert len(up.requests) == 2
            assert b'"cache"' not in up.requests[0].body

    run(scenario())


async def asking(proxy: Proxy, wish: dict[str, dict[str, object]]) -> httpx2.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": False, "temperature": 0}
    return await proxy.client.post(
        "/v1/chat/completions", json=body | wish.get("fields", {}), headers=wish.get("headers", {})
    )


ADMIN = {"authorization": "Bearer admin-key"}
SECURE = Server(api_keys=(ApiKey("one-key"), ApiKey("two-key")), admin_keys=(Secret("admin-key"),))


def test_an_admin_sees_and_drops_what_is_kept() -> None:
    async def scenario() -> None:
        async with upstream([whole("1")]) as up, proxying(config(up.address, server=SECURE)) as proxy:
            keys = {}
            for secret in ("one-key", "two-key", "one-key"):
                proxy.client.headers["authorization"] = f"Bearer {secret}"
                keys[secret] = (await ask(proxy)).headers["x-polyvox-cache-key"]
            report = (await proxy.client.get("/admin/cache", headers=ADMIN)).json()
            assert (report["entries"], report["hit"], report["miss"], report["stored"]) == (2, 1, 2, 2)
            assert report["hit_rate"] == pytest.approx(1 / 3)

            async def drop(**asked: str) -> int:
                answer = await proxy.client.delete("/admin/cache", params=asked, headers=ADMIN)
                return answer.json()["purged"]

            assert keys["one-key"][:16] == key_id(b"one-key")
            assert await drop(key_prefix=keys["one-key"][:16]) == 1
            assert (said(await ask(proxy)), await drop(model="a"), said(await ask(proxy))) == ("miss", 2, "miss")
            assert await drop() == 1

    run(scenario())


@pytest.mark.parametrize(
    ("asked", "status", "param"),
    [
        ({"model": "nothing"}, 404, "model"),
        ({"key_prefix": "xyz"}, 400, "key_prefix"),
        ({"key_prefix": "abc"}, 400, "key_prefix"),
        ({"modle": "m"}, 400, "modle"),
    ],
)
def test_what_cannot_be_dropped_is_named(asked: dict[str, str], status: int, param: str) -> None:
    async def scenario() -> None:
        async with proxying(config("http://127.0.0.1:1", server=SECURE)) as proxy:
            answer = await proxy.client.delete("/admin/cache", params=asked, headers=ADMIN)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
            assert (await proxy.client.get("/admin/cache")).status_code == 401

    run(scenario())


def test_what_the_cache_saves_is_counted() -> None:
    async def scenario() -> None:
        async with upstream([whole("1")]) as up:
            endpoint = EndpointSettings(base_url=f"{up.address}/v1")
            model = ModelSettings(endpoints=(endpoint,), price=Price(input=1_000_000.0, output=2_000_000.0))
            async with proxying(Config(models={"m": model})) as proxy:
                first, second = await ask(proxy), await ask(proxy)
                assert (float(first.headers["x-polyvox-cost"]), float(second.headers["x-polyvox-cost"])) == (5.0, 0.0)
                options = {"include_usage": True, "include_cost": True}
                streamed = await ask(proxy, stream=True, stream_options=options)
                assert '"cost":0.0' in streamed.text
                page = proxy.page()
                assert page.value("polyvox_cache_saved_usd_total") == 10.0
                assert page.value("polyvox_cost_usd_total") == 5.0
                assert page.value("polyvox_cache_entries") == 1
                assert page.value("polyvox_cache_stores_total") == 1

    run(scenario())


def test_a_kept_answer_can_be_given_at_a_pace() -> None:
    async def scenario() -> None:
        async with upstream([whole("one two three")]) as up, proxying(config(up.address)) as proxy:
            await ask(proxy)
            paced = await ask(proxy, stream=True, cache={"pace": 1000})
            assert said(paced) == "hit"
            assert text_of(paced.text) == "one two three"
            assert paced.text.count('"content":') == 4

    run(scenario())


def test_an_answer_of_a_model_of_the_chain_is_not_kept_as_that_of_the_first() -> None:
    async def scenario() -> None:
        bad = ok(b"{}", status=b"500 Internal Server Error")
        async with upstream([bad], [whole("mine")]) as first, upstream([whole("other")]) as second:
            models = {
                name: ModelSettings(endpoints=(EndpointSettings(base_url=f"{up.address}/v1"),))
                for name, up in (("m", first), ("n", second))
            }
            async with proxying(Config(models=models, fallbacks={"m": ("n",)})) as proxy:
                assert "other" in (await ask(proxy)).text
                again = await ask(proxy)
                assert (said(again), "mine" in again.text) == ("miss", True)

    run(scenario())
