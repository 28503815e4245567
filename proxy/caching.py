"""The composition of a worker's cache, as app.py is that of the rest: what is not configured is not imported."""

import contextlib
import importlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from proxy.cache import Store
from proxy.cache.bulletin import Bulletin
from proxy.cache.memory import MemoryStore
from proxy.cache.settings import CacheSettings, size
from proxy.cache.settings import Semantic as SemanticSettings
from proxy.cached import Cached
from proxy.config import Config
from proxy.metrics import Metrics
from proxy.telemetry import Sink

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from proxy.cache.questions import Questions
    from proxy.cache.semantic import Embed
    from proxy.cache.shield import Shield
    from proxy.cache.vectors import Vectors
    from proxy.embedding import Means


def make_cached(
    config: Config, means: "Callable[[], Means]", bulletin: Bulletin, metrics: Metrics, sink: Sink
) -> Cached | None:
    """Return a worker's cache of answers, None for a server that keeps none. means, sink: of requests for vectors."""
    settings = config.cache_settings()
    if settings is None:
        return None
    redis = _connect(settings)
    store = _make_store(settings, config.server.workers, redis)
    if not settings.semantics():
        return Cached(store, settings, bulletin)
    embedders = _make_embedders(settings, means, sink)
    questions = _make_questions(settings, embedders, store, redis, metrics)
    return Cached(store, settings, bulletin, questions)


def prepare(config: Config) -> None:
    """Import what `make_cached` will need, so that no request has to wait for it."""
    settings = config.cache_settings()
    if settings and settings.url:
        importlib.import_module("proxy.cache.redis")
    if settings and settings.semantics():
        importlib.import_module("proxy.cache.semantic")


@contextlib.asynccontextmanager
async def store_elsewhere(settings: CacheSettings) -> "AsyncIterator[Shield | None]":
    """Open the store that all workers share, for one that is none; None where each has its own."""
    redis = _connect(settings)
    store = None if redis is None else _shielded(redis)
    try:
        yield store
    finally:
        if store is not None:
            await store.close()


def _connect(settings: CacheSettings) -> "Redis | None":
    if settings.url is None:
        return None
    from proxy.cache.redis import connect

    return connect(settings.url.reveal())


def _make_store(settings: CacheSettings, workers: int, redis: "Redis | None") -> Store:
    if redis is None:
        return MemoryStore(size(settings.max_bytes) // workers)
    return _shielded(redis)


def _shielded(redis: "Redis") -> "Shield":
    from proxy.cache.redis import RedisStore
    from proxy.cache.shield import LEASE, Shield

    return Shield(RedisStore(redis, LEASE))


def _make_embedders(settings: CacheSettings, means: "Callable[[], Means]", sink: Sink) -> "dict[str, Embed]":
    from proxy.embedding import Elsewhere, OfModel

    makers = {name: wanted.embeddings for name, wanted in settings.semantics().items()}
    return {
        name: OfModel(maker, means, sink)
        if isinstance(maker, str)
        else Elsewhere(name, maker, means().ways.transport_to)
        for name, maker in makers.items()
    }


def _make_questions(
    settings: CacheSettings, embedders: "dict[str, Embed]", store: Store, redis: "Redis | None", metrics: Metrics
) -> "Questions":
    from proxy.cache.questions import Questions
    from proxy.cache.semantic import Semantic

    def one(name: str, wanted: SemanticSettings) -> Semantic:
        vectors = _make_vectors(settings, name, wanted, redis)
        return Semantic(name, wanted, vectors, embedders[name], store, metrics.tallies[name])

    return Questions({name: one(name, wanted) for name, wanted in settings.semantics().items()})


def _make_vectors(settings: CacheSettings, name: str, wanted: SemanticSettings, redis: "Redis | None") -> "Vectors":
    if wanted.vectors == "memory" or redis is None:
        from proxy.cache.vectors import MemoryVectors

        return MemoryVectors(wanted.max_entries)
    from proxy.cache.vector_sets import VectorSets

    return VectorSets(redis, name, wanted.max_entries, settings.models[name].ttl or settings.ttl)
