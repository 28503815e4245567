"""What a configuration needs of the cache's Redis, asked before the server starts."""

import asyncio
import logging

from proxy.config import Loaded

_PATIENCE = 5.0  # seconds

_log = logging.getLogger("polyvox.cache")


def check(loaded: Loaded) -> None:
    """Raise ConfigError where vectors are to be in a Redis that has no vector sets. One that is away is believed."""
    cache = loaded.config.cache_settings()
    wanting = [name for name, semantic in cache.semantics().items() if semantic.vectors == "redis"] if cache else []
    if wanting and cache and cache.url and not asyncio.run(_has_vector_sets(cache.url.reveal())):
        path = ("cache", "models", wanting[0], "semantic", "vectors")
        raise loaded.error(path, "the Redis of the cache has no vector sets; it must be 8.0 or newer, or use memory")


async def _has_vector_sets(url: str) -> bool:
    # Imported here because most servers need no Redis.
    from proxy.cache.redis import connect, has_command

    redis = connect(url)
    try:
        async with asyncio.timeout(_PATIENCE):
            return await has_command(redis, "VADD")
    except Exception as e:  # whatever the driver raises; its words may have addresses
        _log.warning("the cache's Redis does not say whether it has vector sets (%s)", type(e).__name__)
        return True
    finally:
        await redis.aclose()
