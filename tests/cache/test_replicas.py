"""Two replicas of the server that share a real Redis."""

import asyncio
import contextlib

import pytest

from proxy.cache.bulletin import Purge
from proxy.cache.redis import RedisStore, connect
from proxy.cache.settings import CacheSettings
from proxy.cache.shield import PATIENCE, Shield
from proxy.config import ApiKey, Config, EndpointSettings, ModelSettings, Server
from proxy.secret import Secret
from tests.cache.test_cached import said, stream, whole
from tests.fakes.one_worker import document, proxying, text_of
from tests.fakes.scripted_upstream import Step, eventually, ok, upstream

REFUSAL = ok(b'{"error":{"message":"no","type":"x","param":null,"code":null}}', b"content-type: application/json",
             status=b"400 Bad Request")  # fmt: skip


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Have replicas wait for Redis, since this machine may have other things to do. Returns what sets another time."""

    def wait(seconds):
        monkeypatch.setitem(Shield.__init__.__kwdefaults__, "patience", seconds)

    wait(20.0)
    return wait


def config(address, server, keys=()):
    kept = CacheSettings(store="redis", url=Secret(server.url))
    models = {"m": ModelSettings(endpoints=(EndpointSettings(base_url=f"{address}/v1"),))}
    return Config(models=models, cache=kept, server=Server(api_keys=keys))


@contextlib.asynccontextmanager
async def replicas(server, *plays, keys=()):
    """Two replicas before one upstream."""
    async with upstream(*plays) as up:
        settings = config(up.address, server, keys)
        async with proxying(settings) as one, proxying(settings) as other:
            yield one, other, up


def run(scenario):
    asyncio.run(scenario())


async def ask(proxy, **fields):
    return await proxy.ask(**{"temperature": 0, **fields})


async def held(server):
    """Wait until a replica has a claim."""
    await eventually(lambda: any(server.client.scan_iter("*:claim:*")))


async def kept(server):
    """Wait until an answer is in Redis, which is a moment after it was given, and nobody generates."""
    await eventually(lambda: any(server.client.scan_iter("*:entry:*")))
    await eventually(lambda: not any(server.client.scan_iter("*:claim:*")))


def test_a_replica_does_not_say_how_much_is_kept_elsewhere(server):
    async def scenario():
        async with replicas(server, [whole("Hello")]) as (one, _, _):
            assert said(await ask(one)) == "miss"
            await kept(server)
            await eventually(lambda: one.page().value("polyvox_cache_stores_total") == 1)
            assert not one.page().series("polyvox_cache_entries") + one.page().series("polyvox_cache_bytes")

    run(scenario)


@pytest.mark.parametrize("streams", [(False, False), (True, False), (False, True), (True, True)])
def test_what_one_has_kept_the_other_gives(server, streams):
    async def scenario():
        play = [stream("Hel", "lo")] if streams[0] else [whole("Hello")]
        async with replicas(server, play) as (one, other, up):
            first, second = await ask(one, stream=streams[0]), await ask(other, stream=streams[1])
            assert (said(first), said(second)) == ("miss", "hit")
            answer = text_of(second.text) if streams[1] else second.json()["choices"][0]["message"]["content"]
            assert answer == "Hello"
            assert len(up.requests) == 1

    run(scenario)


@pytest.mark.parametrize("streamed", [False, True])
def test_requests_that_are_alike_share_one_generation(server, streamed):
    async def scenario():
        play = [Step.STALL, stream("Hello") if streamed else whole("Hello")]
        async with replicas(server, play) as (one, other, up):
            first = asyncio.create_task(ask(one, stream=streamed))
            await held(server)
            second = [asyncio.create_task(ask(proxy, stream=streamed)) for proxy in (one, other, other)]
            await eventually(lambda: up.requests)
            up.release()
            answers = [await first, *await asyncio.gather(*second)]
            assert len(up.requests) == 1
            assert len({answer.text for answer in answers}) == 1

    run(scenario)


def test_where_the_first_fails_the_next_one_asks(server):
    async def scenario():
        async with replicas(server, [Step.STALL, REFUSAL], [whole("Hello")]) as (one, other, up):
            first = asyncio.create_task(ask(one))
            await held(server)
            second = asyncio.create_task(ask(other))
            await eventually(lambda: up.requests)
            up.release()
            assert (await first).status_code == 400
            assert (await second).json()["choices"][0]["message"]["content"] == "Hello"
            assert len(up.requests) == 2

    run(scenario)


def test_a_client_that_leaves_lets_the_other_replica_go_on(server):
    async def scenario():
        async with replicas(server, [Step.STALL], [whole("Hello")]) as (one, other, up):
            first = asyncio.create_task(ask(one))
            await held(server)
            second = asyncio.create_task(ask(other))
            await eventually(lambda: up.requests)
            first.cancel()
            assert (await second).json()["choices"][0]["message"]["content"] == "Hello"

    run(scenario)


def test_a_replica_that_dies_delays_the_others_no_longer_than_its_lease(server):
    async def scenario():
        async with replicas(server, [whole("Hello")]) as (one, other, up):
            key = bytes.fromhex((await ask(one)).headers["x-polyvox-cache-key"])
            dead = RedisStore(connect(server.url), 0.2)
            await dead.purge()
            claim = await dead.claim(key)
            answer = await ask(other)
            assert answer.json()["choices"][0]["message"]["content"] == "Hello"
            assert len(up.requests) == 2
            assert not await dead.put(key, await dead.get(key), claim), "it comes back, and its answer is refused"
            await dead.close()

    run(scenario)


def test_a_request_that_wants_no_kept_answer_gets_none_of_another_replica(server):
    async def scenario():
        async with replicas(server, [whole("one")], [whole("two")], [whole("three")]) as (one, other, _up):
            await ask(one)
            headers = {"cache-control": "no-cache"}
            body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": False, "temperature": 0}
            again = await other.client.post("/v1/chat/completions", json=body, headers=headers)
            assert again.content == document("two")
            while (await ask(one)).content != document("two"):  # it is there a moment later
                pass
            aged = await other.client.post("/v1/chat/completions", json={**body, "cache": {"max-age": 0}})
            assert aged.content == document("three")

    run(scenario)


def test_a_purge_at_one_is_a_purge_for_all(server):
    async def scenario():
        async with replicas(server, [whole("one")], [whole("two")]) as (one, other, _up):
            await ask(one)
            await kept(server)
            assert await other.cached.purge(Purge()) == 1
            assert (await ask(one)).content == document("two")

    run(scenario)


def test_what_is_being_made_during_a_purge_is_not_kept(server):
    async def scenario():
        async with replicas(server, [Step.STALL, whole("old")], [whole("new")]) as (one, other, up):
            first = asyncio.create_task(ask(one))
            await held(server)
            await eventually(lambda: up.requests)
            await other.cached.purge(Purge("m"))
            up.release()
            await first
            assert (await ask(other)).content == document("new")

    run(scenario)


def test_no_answer_goes_from_one_scope_to_another(server):
    async def scenario():
        keys = (ApiKey("secret-one"), ApiKey("secret-two"))
        async with replicas(server, [whole("one")], [whole("two")], keys=keys) as (one, other, _):
            body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
            answers = [
                await proxy.client.post(
                    "/v1/chat/completions", json=body, headers={"authorization": f"Bearer secret-{key}"}
                )
                for proxy, key in ((one, "one"), (other, "two"), (other, "one"), (one, "two"))
            ]
            assert [answer.content for answer in answers] == [document(t) for t in ("one", "two", "one", "two")]

    run(scenario)


@pytest.mark.parametrize("trouble", ["kill", "freeze"])
def test_without_redis_requests_go_on(server, trouble, patience):
    patience(PATIENCE if trouble == "freeze" else 20.0)

    async def scenario():
        async with replicas(server, [whole("one")], [whole("two")]) as (one, other, _up):
            await ask(one)
            await kept(server)
            getattr(server, trouble)()
            answers = [await ask(proxy, seed=n) for n, proxy in enumerate((one, other) * 3)]
            assert {said(answer) for answer in answers} == {"miss"}
            assert {answer.content for answer in answers} == {document("two")}
            server.clear()

    run(scenario)


def test_foreign_bytes_are_a_miss(server):
    async def scenario():
        async with replicas(server, [whole("one")], [whole("two")]) as (one, other, _):
            await ask(one)
            await kept(server)
            for name in server.client.scan_iter("*:entry:*"):
                server.client.set(name, b"\x80\x05pickled")
            answer = await ask(other)
            assert (said(answer), answer.content) == ("miss", document("two"))
            assert said(await ask(one)) == "hit"

    run(scenario)
