"""Entries in Redis, which replicas share. Imported only where the configuration asks for it.

All keys begin with `polyvox:FORMAT:`; versions of us with another format neither read nor purge them.

    polyvox:pvx1:entry:KEY    an entry: the name of its model, then the envelope
    polyvox:pvx1:claim:KEY    the token of who generates that entry now, until its lease ends
    polyvox:pvx1:tokens       the last token given: each is larger than all before it

The lease, and what a late holder cannot do, follow M. Kleppmann, "How to do distributed locking" (2016).
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from proxy.cache import Claim, Entry, Stats, envelope
from proxy.cache.shield import HELD, Held, Refused

PREFIX: Final = f"polyvox:{envelope.MAGIC.decode()}:"
_CONNECTIONS = 256  # of one worker, at most
_BATCH = 500  # keys that one step of a purge looks at
_COUNTED = 100_000  # keys that are counted for statistics; more are too many to look at

# One round trip: the entry; or that it is being generated; or else a token for who asked. What has no end, or a later
# one than a lease, is no claim of ours, and would keep all others waiting.
_CLAIM = """
local entry = redis.call('GET', KEYS[1])
if entry then return entry end
local left = redis.call('PTTL', KEYS[2])
if left > 0 and left <= tonumber(ARGV[1]) then return 0 end
local token = redis.call('INCR', KEYS[3])
redis.call('SET', KEYS[2], token, 'PX', ARGV[1])
return token
"""
_FILL = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2])
return redis.call('DEL', KEYS[2])
"""
_RENEW = "return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('PEXPIRE', KEYS[1], ARGV[2]) or 0"
_RELEASE = "return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('DEL', KEYS[1]) or 0"


def connect(url: str) -> Redis:
    """Return a pool of connections to a server; none is made yet.

    They neither say who we are nor ask of the server's maintenance, which would be round trips of their own.
    """
    made: Redis = Redis.from_url(
        url, protocol=3, max_connections=_CONNECTIONS, driver_info=None, socket_timeout=None,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )  # fmt: skip
    return made


async def has_command(redis: Redis, name: str) -> bool:
    """Say whether a server has a command. Raises whatever redis-py does."""
    ask: Callable[..., Awaitable[Any]] = redis.execute_command
    return any(await ask("COMMAND INFO", name))


class RedisStore:
    """A store in one Redis server. It raises whatever redis-py does: see Shield."""

    def __init__(self, redis: Redis, lease: float) -> None:
        """lease: seconds that a claim lasts without being renewed."""
        self._redis = redis
        self._lease = _milliseconds(lease)
        script = self._redis.register_script
        self._claim, self._fill, self._renew, self._release = map(script, (_CLAIM, _FILL, _RENEW, _RELEASE))
        # All mutable state: how many entries it was given, and what redis-py knows of its connections.
        self._stored = 0

    def __repr__(self) -> str:
        return f"<RedisStore {self._stored} stored>"  # its address may have a password

    async def get(self, key: bytes) -> Entry | None:
        """Return what is stored under a key, None where there is nothing or nothing of ours."""
        try:
            return _read(key, await self._redis.get(_entry(key)))
        except ResponseError as e:
            _check_foreign(e)
            return None

    async def claim(self, key: bytes) -> Claim | Entry | Held:
        """Ask for the right to generate an entry; return HELD while another has it."""
        keys = [_entry(key), _claimed(key), PREFIX + "tokens"]
        try:
            with _refusals():
                found = await self._claim(keys, [self._lease])
        except ResponseError as e:
            _check_foreign(e)
            found = None
        if isinstance(found, int):
            return Claim(key, found) if found else HELD
        if (entry := _read(key, found)) is None:  # what is there is not ours: it goes, and we ask again
            await self._redis.delete(_entry(key))
        return entry or HELD

    async def put(self, key: bytes, entry: Entry, claim: Claim | None = None) -> bool:
        """See Remote.put."""
        data, ttl = _bytes(key, entry), _milliseconds(entry.ttl)
        with _refusals():
            if claim is None:
                stored = await self._redis.set(_entry(key), data, px=ttl)
            else:
                stored = await self._fill([_entry(key), _claimed(key)], [claim.token, ttl, data])
        self._stored += bool(stored)
        return bool(stored)

    async def renew(self, claims: Iterable[Claim]) -> None:
        """Have claims last for another lease, those that are still the newest."""
        pipeline = self._redis.pipeline(transaction=False)
        for claim in claims:
            await self._renew([_claimed(claim.key)], [claim.token, self._lease], client=pipeline)
        await pipeline.execute()

    async def release(self, claim: Claim) -> None:
        """Give a claim back."""
        await self._release([_claimed(claim.key)], [claim.token])

    async def purge(self, model: str | None = None, prefix: bytes = b"") -> int:
        """Drop the entries of a model (None: of all) whose keys begin like this; return how many there were.

        The claims go first, of all models: what replicas generate now is not put afterwards.
        """
        async for keys in self._batches(_claimed(prefix)):
            await self._redis.unlink(*keys)
        dropped = 0
        async for keys in self._batches(_entry(prefix)):
            found = keys if model is None else await self._of_model(keys, model)
            dropped += await self._redis.unlink(*found) if found else 0
        return dropped

    async def ping(self) -> None:
        """See Remote.ping."""
        await self._redis.ping()

    async def stats(self) -> Stats:
        """Count the entries and their bytes, None where there are too many to look at."""
        entries = size = 0
        async for keys in self._batches(_entry(b"")):
            entries += len(keys)
            if entries > _COUNTED:
                return Stats(None, None, self._stored, 0)
            size += await self._sizes(keys)
        return Stats(entries, size, self._stored, 0)

    async def close(self) -> None:
        """Give the connections back."""
        await self._redis.aclose()

    async def _batches(self, prefix: str) -> AsyncIterator[list[Any]]:
        cursor = 0
        while True:
            cursor, keys = await self._redis.scan(cursor, match=f"{prefix}*", count=_BATCH)
            if keys:
                yield keys
            if not cursor:
                return

    async def _sizes(self, keys: list[Any]) -> int:
        pipeline = self._redis.pipeline(transaction=False)
        for key in keys:
            pipeline.strlen(key)
        return sum(size for size in await pipeline.execute(raise_on_error=False) if isinstance(size, int))

    async def _of_model(self, keys: list[Any], model: str) -> list[Any]:
        head = _head(model)
        pipeline = self._redis.pipeline(transaction=False)
        for key in keys:
            pipeline.getrange(key, 0, len(head) - 1)
        begins = await pipeline.execute()
        return [key for key, begin in zip(keys, begins, strict=True) if begin == head]


def _entry(key: bytes) -> str:
    return f"{PREFIX}entry:{key.hex()}"


def _claimed(key: bytes) -> str:
    return f"{PREFIX}claim:{key.hex()}"


def _head(model: str) -> bytes:
    """Return what an entry begins with, so that the entries of a model are found without reading them whole."""
    name = model.encode()
    return b"%d:%b" % (len(name), name)


def _bytes(key: bytes, entry: Entry) -> bytes:
    return _head(entry.model) + envelope.encode(key, entry)


def _read(key: bytes, data: Any) -> Entry | None:
    """Return the entry in what Redis has, None where it is not one that `_bytes` made for this key."""
    if not isinstance(data, bytes):
        return None
    colon = data.find(b":", 0, 6)
    length = data[: max(colon, 0)]
    return envelope.decode(key, data[colon + 1 + int(length) :]) if length.isdigit() else None


def _check_foreign(error: ResponseError) -> None:
    """Let pass that somebody else keeps a list or the like under our key. Raises any other error."""
    if "WRONGTYPE" not in str(error):
        raise error


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Tell that nothing can be written apart from other errors. Those of a script have the words inside of others."""
    try:
        yield
    except ResponseError as e:
        if isinstance(e, OutOfMemoryError) or "OOM " in str(e):
            raise Refused("it has no memory left") from None
        if isinstance(e, ReadOnlyError) or "READONLY " in str(e):
            raise Refused("it is read-only") from None
        raise


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
