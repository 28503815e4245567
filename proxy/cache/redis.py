"""Entries in Redis, which replicas share. Imported only where the configuration asks for it.

All keys begin with `polyvox:VERSION:`; another version of what is stored neither reads nor purges them.

    polyvox:1:entry:KEY    an entry, as the envelope has it
    polyvox:1:turn:KEY     the token of whoever makes that entry now, until its lease ends
    polyvox:1:tokens       the last token given: each is larger than all before
"""

from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError
from redis.maint_notifications import MaintNotificationsConfig

from proxy.cache import HELD, Entry, Held, StoreRefuses, StoreStats, envelope

PREFIX = b"polyvox:1:"
_ENTRY, _TURN, _TOKENS = PREFIX + b"entry:", PREFIX + b"turn:", PREFIX + b"tokens"
_CONNECTIONS = 256  # of one worker, at most
_BATCH = 500  # keys that are looked at, and removed, in one step of a purge
_GLOB = bytes.maketrans(b"", b"")

# One round trip: the entry; or that somebody makes it; or else the turn is ours, with a new token.
_ENTER = """
local entry = redis.call('GET', KEYS[1])
if entry then return entry end
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local token = redis.call('INCR', KEYS[3])
redis.call('SET', KEYS[2], token, 'PX', ARGV[1])
return token
"""
# Whoever has lost the turn meanwhile, stores nothing: its token is not the one that is there (fencing, as Kleppmann has
# it in "How to do distributed locking").
_FILL = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2])
redis.call('DEL', KEYS[2])
return 1
"""
_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
_LEAVE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""


class RedisStore:
    """A store in one Redis server, by a pool of connections. It raises what redis-py does: see Shield."""

    def __init__(self, url: str, lease: float = 5.0) -> None:
        """lease: seconds that a turn lasts without being renewed."""
        self.lease = lease
        self._lease_ms = b"%d" % round(lease * 1000)
        # All mutable state is the pool's. A connection is neither told who we are nor of a server's maintenance: both
        # would be round trips more, and the second is asked for of Redis Enterprise only.
        pool: ConnectionPool[Any] = ConnectionPool.from_url(
            url, protocol=3, max_connections=_CONNECTIONS, driver_info=None, socket_timeout=None,
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )  # fmt: skip
        self._redis: Redis[bytes] = Redis.from_pool(pool)
        script = self._redis.register_script
        self._enter, self._fill, self._renew, self._leave = map(script, (_ENTER, _FILL, _RENEW, _LEAVE))

    def __repr__(self) -> str:
        return "<RedisStore>"  # the address may have a password

    async def get(self, key: bytes) -> Entry | None:
        """Return what is stored, None where there is nothing or what is not ours."""
        data = await self._redis.get(_ENTRY + key)
        return None if data is None else envelope.decode(data)

    async def put(self, key: bytes, entry: Entry, ttl: float) -> None:
        """Store an entry for some seconds. Raises StoreRefuses where there is no room, or we may not."""
        try:
            await self._redis.set(_ENTRY + key, envelope.encode(entry), px=_ms(ttl))
        except (OutOfMemoryError, ReadOnlyError) as e:
            raise StoreRefuses(type(e).__name__) from None

    async def close(self) -> None:
        """Give the connections back."""
        await self._redis.aclose(close_connection_pool=True)
