"""What every store does, in memory and in a real Redis alike."""

import asyncio
import inspect
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from proxy.cache import Claim
from proxy.cache.memory import MemoryStore
from proxy.cache.redis import RedisStore, connect
from proxy.cache.shield import HELD, Shield
from tests.cache.entries import entry, key

ROOM = 16 * 1024 * 1024


class Wall:
    """The time of day, for a store that takes one."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


async def settled(value):
    return await value if inspect.isawaitable(value) else value


async def put(store, *arguments):
    """Have an entry put, and wait until it is."""
    store.put(*arguments)
    if isinstance(store, Shield):
        await store.settle()


@pytest.fixture(params=["memory", "redis"])
def open_store(request):
    if request.param == "memory":
        return lambda: MemoryStore(ROOM)
    server = request.getfixturevalue("server")
    return lambda: Shield(RedisStore(connect(server.url), 5.0), patience=10.0)


@pytest.fixture
def run(open_store):
    def run(scenario):
        async def with_store():
            store = open_store()
            try:
                await scenario(store)
            finally:
                await store.close()

        asyncio.run(with_store())

    return run


def test_what_is_put_comes_back_whole(run):
    kept = entry("Paris", stream=True, body=bytes(range(256)) * 100, finish_reason=None, usage=None)

    async def scenario(store):
        await put(store, key(), kept)
        assert await settled(store.get(key())) == kept

    run(scenario)


def test_what_was_never_put_is_a_miss(run):
    async def scenario(store):
        assert await settled(store.get(key())) is None

    run(scenario)


def test_the_newest_entry_of_a_key_counts(run):
    async def scenario(store):
        await put(store, key(), entry("old"))
        await put(store, key(), entry("new"))
        assert (await settled(store.get(key()))).body == b"new"

    run(scenario)


def test_an_entry_is_gone_after_its_ttl(run):
    async def scenario(store):
        await put(store, key(), entry("old", ttl=0.001))
        while await settled(store.get(key())) is not None:
            await asyncio.sleep(0.001)

    run(scenario)


def test_who_asks_first_may_generate(run):
    async def scenario(store):
        claim = await settled(store.claim(key(), 0))
        assert claim is None or isinstance(claim, Claim)
        await put(store, key(), entry("Paris"), claim)
        assert (await settled(store.get(key()))).body == b"Paris"
        assert (await settled(store.get(key()))).body == b"Paris"

    run(scenario)


def test_a_claim_that_came_to_nothing_can_be_had_again(run):
    async def scenario(store):
        for _ in range(3):
            claim = await settled(store.claim(key(), 0))
            if claim is not None:
                store.release(claim)
                await store.settle()

    run(scenario)


def test_a_purge_takes_what_it_names(run):
    async def scenario(store):
        for scope, model in (("one", "a"), ("one", "b"), ("two", "a"), ("two", "a:b*")):
            await put(store, key(model, scope), entry(model, model=model))
        assert await settled(store.purge("a:b*")) == 1
        assert await settled(store.purge("a", key("a", "two")[:8])) == 1
        assert await settled(store.get(key("a", "one"))) is not None
        assert await settled(store.purge(None, key("b", "one")[:8])) == 2
        assert await settled(store.purge()) == 0

    run(scenario)


def test_statistics_count(run):
    async def scenario(store):
        for name in range(3):
            await put(store, key(name), entry())
        stats = await settled(store.stats())
        assert (stats.entries, stats.stored, stats.evicted) == (3, 3, 0)
        assert stats.bytes and stats.bytes >= 3 * len(entry().body)
        assert store.told().stored == 3

    run(scenario)


NAMES = st.integers(0, 3)
SCOPES = st.sampled_from(["one", "two"])
MODELS = st.sampled_from(["a", "b"])


class Storing(RuleBasedStateMachine):
    """A store against a dict. Time passes where a store can be told so."""

    open_store = staticmethod(lambda: (MemoryStore(ROOM), None))

    @initialize()
    def begin(self):
        self.loop = asyncio.new_event_loop()
        self.store, self.wall = self.open_store()
        self.kept = {}

    def teardown(self):
        if hasattr(self, "loop"):
            self.do(self.store.purge())
            self.do(self.store.close())
            self.loop.close()

    def do(self, value):
        return self.loop.run_until_complete(settled(value))

    @rule(name=NAMES, scope=SCOPES, model=MODELS, text=st.text(max_size=3), ttl=st.integers(50, 200))
    def put(self, name, scope, model, text, ttl):
        at = self.wall.now if self.wall else time.time()
        made = entry(text, model=model, ttl=ttl, stored_at=at)
        self.do(put(self.store, key(name, scope), made))
        self.kept[key(name, scope)] = made

    @rule(name=NAMES, scope=SCOPES)
    def get(self, name, scope):
        assert self.do(self.store.get(key(name, scope))) == self.kept.get(key(name, scope))

    @rule(seconds=st.integers(1, 60))
    def pass_time(self, seconds):
        if self.wall:
            self.wall.now += seconds
            self.kept = {k: e for k, e in self.kept.items() if e.stored_at + e.ttl > self.wall.now}

    @rule(scope=SCOPES, model=st.none() | MODELS)
    def purge(self, scope, model):
        prefix = key(0, scope)[:8]
        gone = {k for k, e in self.kept.items() if k.startswith(prefix) and model in (None, e.model)}
        said = self.do(self.store.purge(model, prefix))
        assert said == len(gone) if self.wall is None else said >= len(gone)  # those too old may still be there
        self.kept = {k: e for k, e in self.kept.items() if k not in gone}

    @invariant()
    def nothing_else_is_there(self):
        if hasattr(self, "kept"):
            assert {k for k in self.kept if self.do(self.store.get(k)) is None} == set()


class Claiming(RuleBasedStateMachine):
    """Three replicas that claim one key: a holder that has lost its claim changes nothing."""

    server = None

    @initialize()
    def begin(self):
        self.server.client.flushdb()
        self.loop = asyncio.new_event_loop()
        self.redis = connect(self.server.url)
        self.store = RedisStore(self.redis, 60.0)
        self.newest, self.claims, self.text = None, [], None

    def teardown(self):
        if hasattr(self, "loop"):
            self.do(self.store.close())
            self.loop.close()

    def do(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    @rule()
    def claim(self):
        found = self.do(self.store.claim(key()))
        if self.text is not None:
            assert found.body == self.text.encode()
        elif self.newest:
            assert found is HELD
        else:
            assert all(found.token > claim.token for claim in self.claims)
            self.claims.append(found)
            self.newest = found

    @rule(which=st.integers(0, 9), text=st.text(max_size=3))
    def put(self, which, text):
        if self.claims:
            claim = self.claims[which % len(self.claims)]
            stored = self.do(self.store.put(key(), entry(text), claim))
            assert stored == (claim == self.newest)
            if stored:
                self.text, self.newest = text, None

    @rule(which=st.integers(0, 9))
    def release(self, which):
        if self.claims:
            claim = self.claims[which % len(self.claims)]
            self.do(self.store.release(claim))
            self.newest = None if claim == self.newest else self.newest

    @rule()
    def lease_ends(self):
        self.server.client.delete(f"polyvox:pvx1:claim:{key().hex()}")
        self.newest = None

    @rule()
    def entry_ends(self):
        self.server.client.delete(f"polyvox:pvx1:entry:{key().hex()}")
        self.text = None

    @rule()
    def purge(self):
        assert self.do(self.store.purge()) == (self.text is not None)
        self.text = self.newest = None


FEW = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_a_store_in_memory_is_a_dict_in_which_things_grow_old():
    class InMemory(Storing):
        @staticmethod
        def open_store():
            wall = Wall()
            return MemoryStore(ROOM, wall), wall

    run_state_machine_as_test(InMemory, settings=FEW)


def test_a_store_in_redis_is_a_dict(server):
    class InRedis(Storing):
        @staticmethod
        def open_store():
            return Shield(RedisStore(connect(server.url), 5.0), patience=10.0), None

    run_state_machine_as_test(InRedis, settings=FEW)


def test_only_the_newest_claim_counts_whatever_happens(server):
    class OnServer(Claiming):
        pass

    OnServer.server = server
    run_state_machine_as_test(OnServer, settings=FEW)
