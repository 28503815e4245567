"""A Redis that is down, slow, full or restarted: requests go on, and all is well again when it is."""

import asyncio
import contextlib
import json
import time

import pytest

from proxy.cache import Claim
from proxy.cache.bulletin import Bulletin
from proxy.cache.redis import PREFIX, RedisStore, connect
from proxy.cache.settings import CacheSettings
from proxy.cache.shield import PATIENCE, Shield
from proxy.cache.supervision import Supervision
from proxy.cached import Cached
from proxy.caching import store_elsewhere
from proxy.config import Config
from proxy.errors import StoreUnavailable
from proxy.secret import Secret
from tests.cache.entries import entry, key


class Clock:
    """The time that breakers see. It moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def shielded(server, clock=None, lease=5.0, patience=20.0):
    """A shield that is patient, since this machine may have other things to do."""
    store = RedisStore(connect(server.url), lease)
    shield = Shield(store, patience=patience, lease=lease, clock=clock or Clock(), chance=lambda: 0.5)
    try:
        yield shield
    finally:
        await shield.close()


async def put(shield, *arguments):
    """Have an entry put, and wait until it is."""
    shield.put(*arguments)
    await shield.settle()


async def release(shield, claim):
    shield.release(claim)
    await shield.settle()


async def until(condition):
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.002)


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "polyvox.cache"]


async def recovered(shield, clock, text="kept"):
    """The store answers again: the breaker lets a trial go after its time, and that succeeds."""

    async def found() -> bool:
        clock.now += 20
        entry = await shield.get(key())
        return entry is not None and entry.body == text.encode()

    await until(found)


def test_a_request_waits_fifty_milliseconds_at_most():
    assert PATIENCE == 0.05


def test_a_server_that_is_down_is_a_miss_and_comes_back_by_itself(server, caplog):
    async def scenario():
        clock = Clock()
        async with shielded(server, clock) as shield:
            await put(shield, key(), entry("before"))
            server.kill()
            for _ in range(20):
                assert await shield.get(key()) is None
                assert await shield.claim(key(), 5) is None
                await put(shield, key(), entry("lost"))
            server.start()
            clock.now += 20
            await put(shield, key(), entry("after"))
            await recovered(shield, clock, "after")

    asyncio.run(scenario())
    failing, again = said(caplog)
    assert "fails" in failing
    assert again == "the cache's store answers again"


def test_a_server_that_hangs_is_a_miss_and_comes_back_by_itself(server, caplog):
    async def scenario():
        clock = Clock()
        async with shielded(server) as patient:
            await put(patient, key(), entry("kept"))
        async with shielded(server, clock, patience=PATIENCE) as shield:
            server.freeze()
            assert await asyncio.gather(*(shield.get(key()) for _ in range(40))) == [None] * 40
            assert await shield.claim(key(), 5) is None
            server.thaw()
            await recovered(shield, clock)

    asyncio.run(scenario())
    assert said(caplog) == [
        "the cache's store fails (no answer in 50 ms); requests go on without it",
        "the cache's store answers again",
    ]


def test_a_store_is_not_blamed_for_what_this_process_was_late(server, caplog):
    async def scenario():
        async with shielded(server) as patient:
            await put(patient, key(), entry("kept"))
        patience = 0.5  # in which a server answers that has as little time as we
        async with shielded(server, time.monotonic, patience=patience) as shield:
            await shield.get(key())  # it is connected
            for _ in range(2):
                asking = asyncio.create_task(shield.get(key()))
                for _ in range(5):
                    await asyncio.sleep(0)  # until it is sent
                time.sleep(2 * patience)
                assert (await asking).body == b"kept"

    asyncio.run(scenario())
    assert said(caplog) == []


def test_while_it_is_left_alone_nothing_reaches_it(server):
    async def scenario():
        async with shielded(server) as shield:
            server.kill()
            for _ in range(3):
                await shield.get(key())
            server.start()
            before = server.client.info("stats")["total_connections_received"]
            assert await shield.get(key()) is None
            assert server.client.info("stats")["total_connections_received"] == before

    asyncio.run(scenario())


def test_a_server_restarted_between_two_requests_costs_a_few_misses_at_most(server, caplog):
    async def scenario():
        async with shielded(server) as shield:
            await asyncio.gather(*(shield.get(key(n)) for n in range(20)))  # so many connections
            claim = await shield.claim(key(), 5)
            server.kill()
            server.start()
            assert await shield.get(key()) is None
            await release(shield, claim)  # the server does not know its scripts any more

            async def stored() -> bool:
                await put(shield, key(), entry("new"))
                return await shield.get(key()) is not None

            await until(stored)

    asyncio.run(scenario())
    assert said(caplog) == []


def test_a_full_server_takes_nothing_and_still_gives(server, caplog):
    async def scenario():
        async with shielded(server) as shield:
            await put(shield, key(), entry("kept"))
            server.client.config_set("maxmemory-policy", "noeviction")
            server.client.config_set("maxmemory", 1)
            for name in range(10):
                await put(shield, key(name), entry("no room"))
                assert await shield.claim(key(name), 5) is None
            assert (await shield.get(key())).body == b"kept"
            server.client.config_set("maxmemory", 0)
            claim = await shield.claim(key("new"), 5)
            await put(shield, key("new"), entry("room"), claim)
            assert (await shield.get(key("new"))).body == b"room"

    asyncio.run(scenario())
    assert said(caplog) == [
        "the cache's store takes no entries (it has no memory left); those that it has are used",
        "the cache's store takes entries again",
    ]


def test_a_wrong_password_is_a_miss_and_never_shown(server, caplog):
    async def scenario():
        store = RedisStore(connect(server.url.replace("sentinel", "sentinel-wrong")), 5.0)
        shield = Shield(store)
        for _ in range(5):
            assert await shield.get(key()) is None
        await shield.close()

    asyncio.run(scenario())
    assert said(caplog) == ["the cache's store fails (AuthenticationError); requests go on without it"]
    assert "sentinel" not in caplog.text


def test_who_looks_after_a_store_that_is_away_is_told(server):
    async def scenario():
        async with shielded(server) as shield:
            server.kill()
            with pytest.raises(StoreUnavailable):
                await shield.stats()
            with pytest.raises(StoreUnavailable):
                await shield.purge()

    asyncio.run(scenario())


def test_who_looks_after_a_store_that_hangs_is_told_soon(server):
    async def scenario():
        async with shielded(server) as shield:
            server.freeze()
            async with asyncio.timeout(20):  # less than what a long purge may take
                with pytest.raises(StoreUnavailable):
                    await shield.stats()
                with pytest.raises(StoreUnavailable):
                    await shield.purge()
            server.thaw()

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def supervised(server):
    """What looks after the caches of a server with one worker."""
    config, bulletin = Config(cache=CacheSettings(store="redis", url=Secret(server.url))), Bulletin()
    cached = Cached(Shield(RedisStore(connect(server.url), 5.0)), config.cache, bulletin)
    looking = asyncio.create_task(cached.run())
    try:
        yield Supervision(lambda: config, bulletin, store_elsewhere)
    finally:
        looking.cancel()
        await cached.close()


def test_the_process_above_the_workers_counts_and_purges_what_all_of_them_share(server):
    async def scenario():
        async with shielded(server) as shield:
            await put(shield, key(), entry())
        async with supervised(server) as supervision:
            status, told = await supervision.stats(b"")
            report = json.loads(told)
            assert (status, report["entries"]) == (200, 1)
            assert report["bytes"] > len(entry().body)
            assert await supervision.purge(b"{}") == (200, b'{"purged":1}')
            assert json.loads((await supervision.stats(b""))[1])["entries"] == 0

    asyncio.run(scenario())


def test_a_purge_of_a_store_that_is_away_is_not_said_to_be_done(server):
    async def scenario():
        server.kill()
        async with supervised(server) as supervision:
            for asked in (supervision.purge, supervision.stats):
                status, told = await asked(b"{}")
                assert (status, json.loads(told)["error"]["code"]) == (503, "cache_unavailable")

    asyncio.run(scenario())


def test_whoever_waits_gets_what_the_holder_puts(server):
    async def scenario():
        async with shielded(server) as one, shielded(server) as other:
            claim = await one.claim(key(), 5)
            waiting = [asyncio.create_task(shield.claim(key(), 5)) for shield in (one, other, other)]
            await asyncio.sleep(0)
            await put(one, key(), entry("Paris"), claim)
            assert [found.body for found in await asyncio.gather(*waiting)] == [b"Paris"] * 3

    asyncio.run(scenario())


def test_a_claim_given_back_is_for_who_waits(server):
    async def scenario():
        async with shielded(server) as one, shielded(server) as other:
            claim = await one.claim(key(), 5)
            waiting = asyncio.create_task(other.claim(key(), 5))
            await asyncio.sleep(0)
            await release(one, claim)
            assert isinstance(await waiting, Claim)

    asyncio.run(scenario())


def test_a_holder_that_dies_delays_nobody_past_its_lease(server):
    async def scenario():
        async with shielded(server, lease=0.3) as other:
            async with shielded(server, lease=0.3) as one:
                claim = await one.claim(key(), 5)
            assert isinstance(claim, Claim)  # and its process is gone
            assert isinstance(await other.claim(key(), 60), Claim)

    asyncio.run(scenario())


def test_a_claim_that_comes_too_late_is_given_back(server):
    async def scenario():
        async with shielded(server, lease=600.0) as other, shielded(server, lease=600.0, patience=PATIENCE) as one:
            server.freeze()
            assert await one.claim(key(), 5) is None
            leaving = asyncio.create_task(other.claim(key("left"), 5))
            await asyncio.sleep(0)
            leaving.cancel()
            server.thaw()
            while not isinstance(await other.claim(key(), 0), Claim):
                await asyncio.sleep(0.002)
            while not isinstance(await other.claim(key("left"), 0), Claim):
                await asyncio.sleep(0.002)

    asyncio.run(scenario())


def test_nobody_waits_longer_than_told(server):
    async def scenario():
        clock = Clock()
        async with shielded(server) as one, shielded(server, clock) as other:
            await one.claim(key(), 5)
            assert await other.claim(key(), 0) is None
            waiting = asyncio.create_task(other.claim(key(), 7))
            await asyncio.sleep(0)
            clock.now += 7
            assert await waiting is None

    asyncio.run(scenario())


def test_a_claim_lasts_while_its_holder_generates(server):
    async def scenario():
        async with shielded(server, lease=3.0) as shield:
            claim = await shield.claim(key(), 5)
            name = f"{PREFIX}claim:{key().hex()}"
            server.client.pexpire(name, 2_500)

            async def renewed() -> bool:
                return server.client.pttl(name) > 2_500

            await until(renewed)
            await put(shield, key(), entry("Paris"), claim)
            assert (await shield.get(key())).body == b"Paris"

    asyncio.run(scenario())


def test_closing_leaves_no_task(server):
    async def scenario():
        async with shielded(server) as shield:
            await shield.claim(key(), 5)
            server.freeze()
            asking = asyncio.create_task(shield.get(key()))
            await asyncio.sleep(0)
        assert await asking is None
        server.thaw()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())
