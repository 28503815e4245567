"""Vectors in vector sets of Redis 8: as in memory, but for what gives way."""

import asyncio

import numpy as np
import pytest

from proxy import config
from proxy.cache import needs
from proxy.cache.likeness import Tally
from proxy.cache.memory import MemoryStore
from proxy.cache.redis import PREFIX, connect
from proxy.cache.semantic import Semantic
from proxy.cache.settings import Semantic as Settings
from proxy.cache.vector_sets import VectorSets
from proxy.errors import ConfigError
from tests.cache.entries import entry, key
from tests.cache.test_vectors import ONE, OTHER, toward
from tests.fakes.vector_redis import vector_redis


def run(scenario, capacity=8):
    async def serve():
        async with vector_redis() as server:
            redis = connect(server.url)
            try:
                await scenario(VectorSets(redis, "gpt", capacity, ttl=60.0), server)
            finally:
                await redis.aclose()

    asyncio.run(serve())


def test_the_nearest_is_found_with_its_cosine():
    async def scenario(vectors, _):
        for degrees, name in ((0, b"east"), (90, b"\x00north\xff"), (45, b"between")):
            await vectors.add(ONE, toward(degrees), name)
        assert await vectors.nearest(ONE, toward(80)) == (
            b"\x00north\xff",
            pytest.approx(np.cos(np.radians(10)), abs=1e-6),
        )
        assert await vectors.nearest(ONE, toward(200)) == (
            b"\x00north\xff",
            pytest.approx(np.cos(np.radians(110)), abs=1e-6),
        )

    run(scenario)


def test_another_partition_is_never_looked_at():
    async def scenario(vectors, _):
        await vectors.add(ONE, toward(0), b"theirs")
        assert await vectors.nearest(OTHER, toward(0)) is None

    run(scenario)


def test_what_is_forgotten_is_not_found():
    async def scenario(vectors, _):
        await vectors.add(ONE, toward(0), b"a")
        await vectors.forget(ONE, b"a")
        assert await vectors.nearest(ONE, toward(0)) is None

    run(scenario)


def test_a_set_has_no_more_than_it_may_and_ends_with_its_answers():
    async def scenario(vectors, server):
        for number in range(20):
            await vectors.add(ONE, toward(number), b"%d" % number)
        (name,) = server.sets
        assert name == f"{PREFIX}vectors:gpt:{ONE.hex()}".encode()
        assert len(server.sets[name]) == 8
        assert server.expiries == {name: 60_000}

    run(scenario)


def test_vectors_of_another_size_begin_anew():
    async def scenario(vectors, _):
        await vectors.add(ONE, toward(0), b"a")
        longer = np.array([1, 0, 0], np.float32)
        assert await vectors.nearest(ONE, longer) is None
        await vectors.add(ONE, longer, b"b")
        assert (await vectors.nearest(ONE, longer)).key == b"b"

    run(scenario)


def test_questions_that_mean_the_same_are_found():
    async def scenario(vectors, _):
        async def embed(text, key_id):
            return toward({"capital of France?": 0, "France's capital?": 5, "weather?": 90}[text])

        store = MemoryStore(1024 * 1024)
        semantic = Semantic("gpt", Settings("e", timeout=10), vectors, embed, store, Tally())
        search = await semantic.find("capital of France?", ONE, "")
        await semantic.keep(search, key(), entry("Paris"))
        store.put(key(), entry("Paris"))
        assert (await semantic.find("France's capital?", ONE, "")).entry.body == b"Paris"
        assert (await semantic.find("weather?", ONE, "")).entry is None

    run(scenario)


def loaded(folder, url):
    """A configuration whose alias `bot` keeps vectors in a Redis."""
    file = folder / "polyvox.yaml"
    file.write_text(
        f"""
models: {{m: {{endpoints: [{{base_url: "http://127.0.0.1:1/v1"}}]}}}}
aliases: {{bot: m}}
cache:
  store: redis
  url: {url}
  models:
    bot:
      semantic: {{embeddings: m, vectors: redis}}
"""
    )
    return config.load(file, {})


def test_a_redis_without_vector_sets_is_refused_before_the_start(server, tmp_path):
    with pytest.raises(ConfigError, match=r"yaml:9: cache.models.bot.semantic.vectors: .*must be 8.0 or newer") as e:
        needs.check(loaded(tmp_path, server.url))
    assert "sentinel" not in str(e.value)


def test_a_redis_with_vector_sets_or_none_that_answers_is_taken(tmp_path, caplog):
    async def scenario(_, fake):
        await asyncio.to_thread(needs.check, loaded(tmp_path, fake.url))

    run(scenario)
    assert caplog.text == ""
    needs.check(loaded(tmp_path, "redis://:sentinel@127.0.0.1:1/0"))
    assert "does not say" in caplog.text
    assert "sentinel" not in caplog.text
