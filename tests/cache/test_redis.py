"""Entries in a real Redis: what comes back, what does not, and who may generate an answer."""

import asyncio
import contextlib
import ssl

import pytest
import redis
import trustme

from proxy.cache import Claim
from proxy.cache.redis import PREFIX, RedisStore, connect
from proxy.cache.shield import HELD, Shield
from tests.cache.entries import entry, key
from tests.cache.redis_server import PASSWORD


def run(server, scenario, lease=5.0):
    """Run a scenario with two stores, as two replicas have them."""

    async def both():
        stores = [RedisStore(connect(server.url), lease) for _ in range(2)]
        try:
            await scenario(*stores)
        finally:
            for store in stores:
                await store.close()

    asyncio.run(both())


def entry_key(name="k"):
    return f"{PREFIX}entry:{key(name).hex()}"


@pytest.mark.parametrize("foreign", [b"", b"no", b"1:m", b"1:mpvx1" + bytes(40), b"99999:x", b"\xff" * 99, b"pickle"])
def test_foreign_bytes_are_a_miss_and_make_room_for_an_answer(server, foreign):
    async def scenario(store, _):
        server.client.set(entry_key(), foreign)
        assert await store.get(key()) is None
        assert await store.claim(key()) is HELD
        assert isinstance(await store.claim(key()), Claim)

    run(server, scenario)


def test_a_key_of_another_type_is_a_miss(server):
    async def scenario(store, _):
        server.client.rpush(entry_key(), "x")
        assert await store.get(key()) is None
        assert await store.claim(key()) is HELD
        assert isinstance(await store.claim(key()), Claim)

    run(server, scenario)


def test_an_entry_moved_to_another_key_is_a_miss(server):
    async def scenario(store, _):
        await store.put(key(), entry())
        server.client.rename(entry_key(), entry_key("other"))
        assert await store.get(key("other")) is None

    run(server, scenario)


def test_redis_drops_an_entry_after_its_ttl(server):
    async def scenario(store, _):
        await store.put(key(), entry(ttl=60))
        assert 30_000 < server.client.pttl(entry_key()) <= 60_000
        claim = await store.claim(key("other"))
        await store.put(key("other"), entry(ttl=0.001), claim)
        while server.client.exists(entry_key("other")):
            await asyncio.sleep(0.001)
        assert await store.get(key("other")) is None

    run(server, scenario)


def test_all_our_keys_have_one_prefix(server):
    async def scenario(store, _):
        await store.put(key(), entry())
        await store.claim(key("other"))
        assert all(name.startswith(PREFIX.encode()) for name in server.client.scan_iter("*"))

    run(server, scenario)


def test_one_replica_at_a_time_has_the_claim(server):
    async def scenario(one, other):
        claim = await one.claim(key())
        assert isinstance(claim, Claim)
        assert await other.claim(key()) is HELD
        assert isinstance(await other.claim(key("another")), Claim)
        await one.release(claim)
        assert isinstance(await other.claim(key()), Claim)

    run(server, scenario)


def test_what_is_put_under_a_claim_is_what_others_get(server):
    async def scenario(one, other):
        claim = await one.claim(key())
        assert await one.put(key(), entry("Paris"), claim)
        assert (await other.claim(key())).body == b"Paris"
        assert not server.client.exists(f"{PREFIX}claim:{key().hex()}")

    run(server, scenario)


def test_tokens_grow(server):
    async def scenario(one, other):
        tokens = [(await store.claim(key(i))).token for i, store in enumerate([one, other, one, other])]
        assert tokens == sorted(set(tokens))

    run(server, scenario)


def test_a_claim_of_the_dead_ends_with_its_lease(server):
    async def scenario(one, other):
        await one.claim(key())
        assert await other.claim(key()) is HELD
        while (found := await other.claim(key())) is HELD:
            await asyncio.sleep(0.005)
        assert isinstance(found, Claim)

    run(server, scenario, lease=1.0)


def test_the_put_of_a_late_holder_is_refused(server):
    async def scenario(one, other):
        late = await one.claim(key())
        server.client.delete(f"{PREFIX}claim:{key().hex()}")  # its lease ends
        newest = await other.claim(key())
        assert not await one.put(key(), entry("late"), late)
        await one.release(late)
        assert await one.get(key()) is None
        assert await one.claim(key()) is HELD, "it has taken the claim of another one away"
        assert await other.put(key(), entry("newest"), newest)
        assert not await one.put(key(), entry("late"), late)
        assert (await one.get(key())).body == b"newest"

    run(server, scenario)


@pytest.mark.parametrize("seconds", [None, 3600])
def test_a_claim_that_never_ends_or_too_late_keeps_nobody_waiting(server, seconds):
    async def scenario(store, _):
        server.client.set(f"{PREFIX}claim:{key().hex()}", 7, ex=seconds)
        claim = await store.claim(key())
        assert isinstance(claim, Claim)
        assert await store.put(key(), entry(), claim)

    run(server, scenario)


def test_a_renewed_claim_lasts(server):
    async def scenario(store, _):
        claims = [await store.claim(key(name)) for name in ("a", "b")]
        for name in ("a", "b"):
            server.client.pexpire(f"{PREFIX}claim:{key(name).hex()}", 3_000)
        await store.renew(claims)
        for name in ("a", "b"):
            assert server.client.pttl(f"{PREFIX}claim:{key(name).hex()}") > 4_000
        server.client.set(f"{PREFIX}claim:{key('a').hex()}", 999, px=3_000)  # of a newer holder
        await store.renew(claims)
        assert server.client.pttl(f"{PREFIX}claim:{key('a').hex()}") <= 3_000

    run(server, scenario)


def test_a_purge_takes_many_batches_and_nothing_of_others(server):
    async def scenario(store, _):
        server.client.set("somebody's", "own")
        for name in range(1200):
            await store.put(key(name), entry(model="large" if name % 3 else "small"))
        assert (await store.stats()).entries == 1200
        assert await store.purge("small") == 400
        assert await store.purge("sma") == 0
        assert await store.purge(None, key(1)[:4]) == 800  # one scope
        assert await store.purge() == 0
        assert server.client.get("somebody's") == b"own"

    run(server, scenario)


def test_the_address_is_never_shown(server):
    async def scenario(store, _):
        shown = repr(store) + repr(Shield(store))
        assert "sentinel" not in shown

    run(server, scenario)


def test_a_server_on_a_unix_socket_will_do(server):
    async def scenario():
        store = RedisStore(connect(f"unix://:sentinel-p%40ss@{server.socket}?db=1"), 5.0)
        with contextlib.closing(server.client):
            await store.put(key(), entry("Paris"))
            assert (await store.get(key())).body == b"Paris"
            assert server.client.exists(entry_key())
        await store.close()

    asyncio.run(scenario())


def test_a_server_behind_tls_will_do_and_its_certificate_is_checked(server, tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)

    async def forward(reader, writer):
        with contextlib.closing(writer):
            while data := await reader.read(65536):
                writer.write(data)

    async def terminate(reader, writer):
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(forward(reader, inner_writer), forward(inner_reader, writer))

    async def scenario():
        front = await asyncio.start_server(terminate, "127.0.0.1", 0, ssl=context)
        url = f"rediss://:{PASSWORD}@localhost:{front.sockets[0].getsockname()[1]}/1"
        trusting = RedisStore(connect(f"{url}?ssl_ca_certs={tmp_path / 'ca.pem'}"), 5.0)
        await trusting.put(key(), entry("Paris"))
        assert (await trusting.get(key())).body == b"Paris"
        other = RedisStore(connect(url), 5.0)
        with pytest.raises(redis.ConnectionError):
            await other.get(key())
        await asyncio.gather(trusting.close(), other.close())
        front.close()

    asyncio.run(scenario())
