"""A store elsewhere, as a store that never fails and never keeps anybody waiting.

A request waits for one call, look-up and claim together, for 50 ms at most, and then goes on without. What takes
longer is left to itself rather than cut off: a connection that is being made may still be of use, and one whose reply
comes late is whole. Nobody waits for an answer to be put. After some failures in a row the store is left alone, and
tried again after a second, then after longer and longer.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from enum import Enum
from time import monotonic
from typing import Any, Final, Protocol, TypeVar

from proxy.breaker import Breaker, Change, Outcome, State
from proxy.cache import Claim, Entry, Stats
from proxy.config import BreakerSettings
from proxy.errors import StoreUnavailable

T = TypeVar("T")

PATIENCE: Final = 0.05  # seconds that a request waits for a call
LEASE: Final = 5.0  # seconds that a claim lasts when its holder has died
_LONGEST = 2.0  # seconds that a call goes on after nobody waits for it
_LONGEST_FOR_ADMIN = 30.0
_LONGEST_CLAIM = 900.0  # seconds for which a claim is renewed
_MOST = 1024  # calls that go on at once
_MOST_BYTES = 64 * 1024 * 1024  # of answers that are being put
_TURNS = 8  # of the event loop, for a reply that is here to be read
_FIRST_PAUSE, _GROWTH, _LAST_PAUSE = 0.005, 1.5, 0.25  # seconds between two looks for what another replica generates
_BREAKER = BreakerSettings(failures=3, error_rate=0.5, minimum=20, window=10.0, recovery=1.0, max_recovery=15.0)

_log = logging.getLogger("polyvox.cache")


class Held(Enum):
    """Another replica has the claim."""

    HELD = "held"


HELD: Final = Held.HELD


class Refused(Exception):
    """The store answers, but does not take an entry: it is full, or read-only. str() says which."""


class Remote(Protocol):
    """A store elsewhere. It raises whatever its driver does."""

    async def get(self, key: bytes) -> Entry | None: ...

    async def claim(self, key: bytes) -> Claim | Entry | Held: ...

    async def put(self, key: bytes, entry: Entry, claim: Claim | None = None) -> bool:
        """Say whether it is stored; under a claim that is no longer the newest it is not. Raises Refused."""
        ...

    async def renew(self, claims: Iterable[Claim]) -> None: ...

    async def release(self, claim: Claim) -> None: ...

    async def purge(self, model: str | None = None, prefix: bytes = b"") -> int: ...

    async def stats(self) -> Stats: ...

    async def ping(self) -> None:
        """Return if it answers at all."""
        ...

    async def close(self) -> None: ...


class Shield:
    """A Store around a store elsewhere. Times are by the monotonic clock."""

    is_shared = True

    def __init__(
        self, store: Remote, *, patience: float = PATIENCE, lease: float = LEASE,
        clock: Callable[[], float] = monotonic, chance: Callable[[], float] = random.random,
    ) -> None:  # fmt: skip
        self._store = store
        self._patience = patience
        self._lease = lease
        self._clock = clock
        self._chance = chance
        # All mutable state: whether the store is asked at all, and why it was not well last; whether it takes entries,
        # and how many it took; the calls that go on, what is done behind, and the bytes that this puts; the claims we
        # hold, with when we got them, and who renews them.
        self._breaker = Breaker(_BREAKER, chance, self._changed)
        self._trouble = ""
        self._takes_entries = True
        self._stored = 0
        self._calls: set[asyncio.Task[Any]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._putting = 0
        self._claims: dict[Claim, float] = {}
        self._renewing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Shield {self._breaker!r}, {len(self._calls)} calls, {len(self._claims)} claims, {self._store!r}>"

    async def get(self, key: bytes) -> Entry | None:
        """See Store.get."""
        return await self._ask(self._store.get, key)

    async def claim(self, key: bytes, seconds: float) -> Claim | Entry | None:
        """See Store.claim."""
        end, pause = self._clock() + seconds, _FIRST_PAUSE
        while (found := await self._claim(key)) is HELD:
            if (left := end - self._clock()) <= 0:
                return None
            await asyncio.sleep(min(left, pause * (0.75 + 0.5 * self._chance())))
            pause = min(pause * _GROWTH, _LAST_PAUSE)
        if isinstance(found, Claim):
            self._hold(found)
        return found

    def put(self, key: bytes, entry: Entry, claim: Claim | None = None) -> None:
        """See Store.put. It is done behind."""
        if claim:
            self._claims.pop(claim, None)
        if self._putting + entry.size() <= _MOST_BYTES:
            self._behind(self._put(key, entry, claim))
        elif claim:
            self.release(claim)

    def release(self, claim: Claim) -> None:
        """See Store.release. It is done behind."""
        self._claims.pop(claim, None)
        self._behind(self._ask(self._store.release, claim))

    async def settle(self) -> None:
        """Wait until what is done behind is done, for as long as a call may take."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LONGEST)

    async def purge(self, model: str | None = None, prefix: bytes = b"") -> int:
        """See Store.purge. Raises StoreUnavailable."""
        return await self._for_admin(self._store.purge, model, prefix)

    async def stats(self) -> Stats:
        """See Store.stats. Raises StoreUnavailable."""
        return await self._for_admin(self._store.stats)

    def told(self) -> Stats:
        """See Store.told."""
        return Stats(None, None, self._stored, 0)

    async def close(self) -> None:
        """End the calls that go on, and give the connections back."""
        tasks = [*self._tasks, *self._calls, *([self._renewing] if self._renewing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._store.close()

    async def _ask(self, call: Callable[..., Awaitable[T]], *args: Any, late: Outcome = Outcome.FAILURE) -> T | None:
        """Return what a call returns, None if it fails or takes too long. late: what taking too long says of the store.

        How a call ends after that counts no more.
        """
        now = self._clock()
        if not self._breaker.allow(now) or len(self._calls) >= _MOST:
            return None
        ticket = self._breaker.begin(now)
        task = asyncio.create_task(_outcome(call, args))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        await asyncio.wait((task,), timeout=self._patience)
        if not task.done() and self._clock() - now > 1.5 * self._patience:
            late = await _caught_up()
        is_over = task.done() and not task.cancelled()  # by `close`
        result, error = task.result() if is_over else (None, None)
        outcome = self._judge(error) if is_over else late
        self._trouble = type(error).__name__ if error else f"no answer in {self._patience * 1000:.0f} ms"
        self._breaker.record(outcome, self._clock(), ticket)
        return result

    def _behind(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _put(self, key: bytes, entry: Entry, claim: Claim | None) -> None:
        """Put an entry. That a large one takes its time says nothing of the store."""
        self._putting += entry.size()
        try:
            if await self._ask(self._store.put, key, entry, claim, late=Outcome.NEUTRAL):
                self._stored += 1
                self._note_room("")
        finally:
            self._putting -= entry.size()

    def _judge(self, error: Exception | None) -> Outcome:
        if isinstance(error, Refused):
            self._note_room(str(error))
            return Outcome.SUCCESS
        return Outcome.SUCCESS if error is None else Outcome.FAILURE

    async def _for_admin(self, call: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Return what a call returns that may take long, but not to begin."""
        try:
            async with asyncio.timeout(_LONGEST):
                await self._store.ping()
            async with asyncio.timeout(_LONGEST_FOR_ADMIN):
                return await call(*args)
        except Exception as e:  # whatever a driver raises; its words may have addresses
            raise StoreUnavailable from e

    # Claims

    async def _claim(self, key: bytes) -> Claim | Entry | Held | None:
        """Ask for a claim once. One that comes when nobody waits for it any more is given back."""
        waiting = {key}
        try:
            return await self._ask(self._claim_for, key, waiting)
        finally:
            waiting.clear()

    async def _claim_for(self, key: bytes, waiting: set[bytes]) -> Claim | Entry | Held:
        found = await self._store.claim(key)
        if isinstance(found, Claim) and not waiting:
            self.release(found)
        return found

    def _hold(self, claim: Claim) -> None:
        self._claims[claim] = self._clock()
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        """Renew what we hold, until we hold nothing."""
        while self._claims:
            await asyncio.sleep(self._lease / 3)
            oldest = self._clock() - _LONGEST_CLAIM
            self._claims = {claim: since for claim, since in self._claims.items() if since > oldest}
            if self._claims:
                await self._ask(self._store.renew, tuple(self._claims))

    # What is told

    def _changed(self, change: Change) -> None:
        if change.before is State.CLOSED:
            _log.warning("the cache's store fails (%s); requests go on without it", self._trouble)
        elif change.after is State.CLOSED:
            _log.warning("the cache's store answers again")

    def _note_room(self, refused: str) -> None:
        """Tell that the store takes no entries, or takes them again, each once. refused: why it does not."""
        if refused and self._takes_entries:
            _log.warning("the cache's store takes no entries (%s); those that it has are used", refused)
        elif not refused and not self._takes_entries:
            _log.warning("the cache's store takes entries again")
        self._takes_entries = not refused


async def _caught_up() -> Outcome:
    """It was this process that was late: let it read what has come meanwhile, and say nothing of the store."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)
    return Outcome.NEUTRAL


async def _outcome(call: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> tuple[T | None, Exception | None]:
    """Return what a call returns or raises; perhaps nobody is there any more to look at it."""
    try:
        async with asyncio.timeout(_LONGEST):
            return await call(*args), None
    except Exception as e:  # whatever a driver raises
        return None, e
