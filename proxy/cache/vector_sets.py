"""Vectors in vector sets of Redis 8, which replicas share: one set for each partition, gone a ttl after it was used.

polyvox:pvx1:vectors:ALIAS:PARTITION    elements are the keys of answers
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from proxy.cache.redis import PREFIX
from proxy.cache.vectors import Near, Vector

_SPARE: Final = 32  # questions that may go at once to make room


class VectorSets:
    """Vectors of one alias. It raises whatever redis-py does: see Semantic."""

    def __init__(self, redis: Redis, alias: str, capacity: int, ttl: float) -> None:
        """capacity: questions of one partition. ttl: seconds."""
        self._redis = redis  # all mutable state is its own
        self._ask: Callable[..., Awaitable[Any]] = redis.execute_command
        self._prefix = f"{PREFIX}vectors:{alias}:"
        self._capacity = capacity
        self._ttl = round(ttl * 1000)

    def __repr__(self) -> str:
        return f"<VectorSets {self._prefix}>"

    async def nearest(self, partition: bytes, vector: Vector) -> Near | None:
        """Return the nearest of a partition; None where there is none, or vectors are of another size."""
        name, data = self._name(partition), vector.tobytes()
        try:
            found = await self._ask("VSIM", name, "FP32", data, "WITHSCORES", "COUNT", 1)
        except ResponseError as e:
            if "dimension" not in str(e).lower():
                raise
            await self._redis.unlink(name)  # the embedding model is another one now
            return None
        return _near(found)

    async def add(self, partition: bytes, vector: Vector, key: bytes) -> None:
        """Keep a vector. Where there are too many, some that chance picks go."""
        name = self._name(partition)
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.execute_command("VADD", name, "FP32", vector.tobytes(), key, "NOQUANT")
        pipeline.pexpire(name, self._ttl)
        pipeline.execute_command("VCARD", name)
        _, _, count = await pipeline.execute()
        if count > self._capacity:
            await self._make_room(name, min(_SPARE, count - self._capacity))

    async def forget(self, partition: bytes, key: bytes) -> None:
        """The answer is no longer there."""
        await self._ask("VREM", self._name(partition), key)

    async def _make_room(self, name: str, some: int) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for element in await self._ask("VRANDMEMBER", name, some):
            pipeline.execute_command("VREM", name, element)
        await pipeline.execute()

    def _name(self, partition: bytes) -> str:
        return self._prefix + partition.hex()


def _near(found: Any) -> Near | None:
    """Read the answer of VSIM: elements and scores, which are 1 for the same direction and 0 for the opposite one."""
    pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
    return next((Near(key, 2 * float(score) - 1) for key, score in pairs), None)
