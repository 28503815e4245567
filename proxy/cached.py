"""Answers that were given before, or that are about to be: the story of a request where there is a cache."""

import asyncio
import contextlib
import time
from binascii import hexlify
from collections.abc import Awaitable, Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, TypeVar, cast

import msgspec

from proxy.cache import Claim, Entry, Store, key, replay, replies
from proxy.cache.bulletin import ALL, Bulletin, Purge, Report
from proxy.cache.flight import Flight
from proxy.cache.replies import FlightKey, Walks, Wanted, WhenGone
from proxy.cache.settings import CacheRule, CacheSettings, size
from proxy.cache.wish import Wish
from proxy.deadline import Deadline
from proxy.errors import StoreUnavailable, TruncatedAnswer, UpstreamError
from proxy.providers import Asked
from proxy.registry import Model
from proxy.relay import Exchange
from proxy.reply import Reply
from proxy.telemetry import CACHE_RESULTS, FIRST_TOKEN
from proxy.transport import content_type

if TYPE_CHECKING:
    from proxy.cache.questions import Questions  # which import numpy
    from proxy.cache.semantic import Search

T = TypeVar("T")

_PATIENCE = 60.0  # seconds to wait for another replica's answer, where the client does not say how long it waits
_SAYS = {result: (b"x-polyvox-cache", result.encode()) for result in CACHE_RESULTS}
_WHOLE = frozenset(("stop", "length", "tool_calls", "content_filter"))  # ends of answers that are all there is


class Cached:
    """Answers requests from a store where it can, and fills it."""

    def __init__(
        self, store: Store, settings: CacheSettings, bulletin: Bulletin,
        questions: "Questions | None" = None, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """questions: of a server that compares some by their meaning. clock: seconds since 1970."""
        self.questions = questions
        self._store = store
        self._settings = settings
        self._bulletin = bulletin
        self._limit = size(settings.max_entry_bytes)
        self._rule = cache(settings.rule)  # of names that there are
        self._clock = clock
        # All mutable state: the generations under way that others may join, of which only those fill the store; how
        # often each of CACHE_RESULTS was.
        self._flights: dict[FlightKey, Flight] = {}
        self._results = dict.fromkeys(CACHE_RESULTS, 0)

    def __repr__(self) -> str:
        return f"<Cached {self._store!r} {len(self._flights)} flights>"

    @property
    def is_idle(self) -> bool:
        """Say whether nothing is being made."""
        return not self._flights

    async def answer(
        self,
        asked: Asked,
        model: Model,
        chain: Sequence[str],
        exchange: Exchange,
        walk: Walks,
        wish: Wish,
        deadline: Deadline | None = None,
        when_gone: WhenGone | None = None,
    ) -> Reply:
        """Answer a request for a model. Raises what Walk.answer does. walk: makes the walk of this request.

        1. What is not to be kept goes its way as without a cache.
        2. Somebody waits for the same: wait with them.
        3. It is kept: give it.
        4. Have it made; the others may wait with us.
        """
        rule = self._rule(asked.envelope.model, model.name)
        found = None if wish.no_store else _key(asked, model, rule, wish, exchange.key_id)
        if found is None:  # 1
            exchange.cache = "bypass"
            return self._labelled(await walk(deadline, False).answer(), exchange)
        shows_cost, exchange.shows_cost = exchange.shows_cost, False  # what all share has no one's cost in it
        flight = (found, *chain) if chain else found
        wanted = Wanted(asked, model, walk, exchange, deadline, when_gone, wish, rule, found, flight, shows_cost)
        if wish.no_cache:
            exchange.cache = "bypass"
            return await self._lead(wanted)
        exchange.cache = "miss"
        if self._bulletin.is_behind() and not self._store.is_shared:
            await self._catch_up()
        if (open_flight := self._flights.get(flight)) is not None:
            reply = await self._join(open_flight, wanted) if open_flight.is_open else None  # 2
        else:
            reply = self._kept(wanted)  # 3
        return await self._lead(wanted) if reply is None else reply  # 4

    async def purge(self, purge: Purge = ALL) -> int:
        """Have all workers forget answers, those that are being made included; return how many were kept.

        Raises StoreUnavailable where they are kept elsewhere, and that does not answer.
        """
        shared = await _now(self._store.purge(purge.model, purge.prefix)) if self._store.is_shared else 0
        return shared + await self._bulletin.purge(purge)

    async def report(self) -> Report:
        """Return what the caches of all workers hold and have done. Raises as `purge` does."""
        found = self.sums()
        if not self._store.is_shared:
            return found
        stats = await _now(self._store.stats())
        return msgspec.structs.replace(found, entries=stats.entries, bytes=stats.bytes)

    def sums(self) -> Report:
        """Return what the caches of all workers have told, of the others as of a moment ago."""
        self._tell()
        return self._bulletin.all()

    async def run(self) -> None:
        """Drop for ever what this worker is told to, also while nobody asks it for anything; tell what it keeps."""
        while True:
            await self._bulletin.pause()
            if self._bulletin.is_behind():
                await self._catch_up()
            self._tell()

    async def _catch_up(self) -> None:
        """Drop what this worker is told to."""
        dropped = 0
        for purge in self._bulletin.missed():
            self._flights.clear()
            with contextlib.suppress(StoreUnavailable):  # it tells of that itself
                dropped += await _now(self._store.purge(purge.model, purge.prefix))
        self._bulletin.apply(dropped)

    def _tell(self) -> None:
        self._bulletin.kept(self._store.told(), self._results)

    async def close(self) -> None:
        """End what is under way, and close the store."""
        tasks = [flight.task for flight in self._flights.values() if flight.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._store.close()

    # What is there

    def _kept(self, wanted: Wanted) -> Reply | None:
        """Return the answer that is kept here. A store that is shared is asked in one call, also for a claim."""
        entry = None if self._store.is_shared else self._store.get(wanted.key)
        if isinstance(entry, Entry) and self._will_do(entry, wanted.wish):
            return self._replay(entry, wanted, "hit")
        return None

    def _will_do(self, entry: Entry, wish: Wish) -> bool:
        return wish.max_age is None or entry.age(self._clock()) <= wish.max_age

    def _replay(self, entry: Entry, wanted: Wanted, result: str) -> Reply:
        """Make the reply of a kept answer, in the form that is asked for."""
        exchange = wanted.exchange
        exchange.cache, exchange.source = result, entry.endpoint
        exchange.answers(200)
        if wanted.asked.envelope.stream:
            reply = replies.stream(entry, wanted, self._settings.pace if wanted.wish.pace is None else wanted.wish.pace)
        else:
            reply = replies.document(entry, wanted)
        return self._labelled(reply, exchange, wanted.key, entry)

    def _labelled(
        self, reply: Reply, exchange: Exchange, name: bytes | None = None, entry: Entry | None = None
    ) -> Reply:
        """Say what the cache did; of a kept answer, who gave it, and how old it is."""
        self._results[exchange.cache] += 1
        said = _SAYS[exchange.cache]
        if name is None:
            reply.headers.append(said)
        elif entry is None:
            reply.headers += (said, (b"x-polyvox-cache-key", hexlify(name)))
        else:
            reply.headers += (
                said,
                (b"x-polyvox-cache-key", hexlify(name)),
                (b"x-polyvox-model", entry.model.encode()),
                (b"x-polyvox-endpoint", entry.endpoint.encode()),
                (b"age", b"%d" % entry.age(self._clock())),
            )
        return reply

    # What is being made

    async def _join(self, flight: Flight, wanted: Wanted) -> Reply | None:
        """Wait for a generation with others. None if it failed: then each goes its own way."""
        exchange = wanted.exchange
        flight.join(exchange, reads=wanted.asked.envelope.stream)
        exchange.shares(flight, leads=False)
        await flight.begun()
        if not (wanted.asked.envelope.stream and flight.streams):
            await flight.ended()
        exchange.waited()
        if flight.entry is not None:
            result = "joined" if flight.reply else "hit"
            return _near(self._replay(flight.entry, wanted, result), flight)
        if flight.over:
            exchange.parts()
            return None
        exchange.cache, exchange.source = "joined", flight.source
        exchange.answers(200)
        return self._labelled(replies.live(flight, wanted, leads=False), exchange, wanted.key)

    async def _lead(self, wanted: Wanted) -> Reply:
        """Have an answer made."""
        exchange, streams = wanted.exchange, wanted.asked.envelope.stream
        flight = self._flights[wanted.flight] = Flight(wanted.asked.envelope.model, self._limit)
        flight.join(exchange, reads=streams)
        when_gone = None if wanted.deadline else wanted.when_gone  # a deadline ends the task as well
        if streams or when_gone is None:
            exchange.shares(flight, leads=True)
            flight.task = asyncio.create_task(self._fly(flight, wanted))
            await flight.begun()
        else:  # another task would cost a third of all that the cache does here
            flight.task = asyncio.current_task()
            when_gone(partial(flight.leave, exchange))
            await self._fly(flight, wanted)
            when_gone(None)
        if flight.error is not None:
            raise flight.error
        if flight.reply is None:
            assert flight.entry  # it was in the shared store, or answers a question that means the same
            return _near(self._replay(flight.entry, wanted, "hit"), flight)
        reply = replies.live(flight, wanted, leads=True) if flight.streams else flight.reply
        return self._labelled(reply, exchange, wanted.key)

    async def _fly(self, flight: Flight, wanted: Wanted) -> None:
        """Make an answer, for all who wait, and keep it."""
        try:
            if self._store.is_shared or self.questions:
                await self._find(flight, wanted)
            elif (entry := await self._generate(flight, wanted)) is not None:
                self._store.put(wanted.key, entry)
        except Exception as error:  # whatever it is, it is raised where somebody waits
            flight.end(error=error)
        finally:
            if not flight.over:
                flight.end(error=TruncatedAnswer("it was given up"))
            if self._flights.get(wanted.flight) is flight:
                del self._flights[wanted.flight]
            if not flight.has(wanted.exchange):
                await wanted.exchange.close()

    async def _find(self, flight: Flight, wanted: Wanted) -> None:
        """Look where other replicas and other questions have their answers, before one is made."""
        claim = await self._claim(wanted) if self._store.is_shared else None
        if isinstance(claim, Entry):
            flight.end(claim)
            return
        entry = None
        try:
            search = await self._search(wanted) if self.questions else None
            if search and search.near and search.entry and self._will_do(search.entry, wanted.wish):
                flight.similarity = search.near.similarity
                flight.end(search.entry)
                return
            entry = await self._generate(flight, wanted)
        finally:
            await self._keep(wanted.key, entry, claim)
        if search and entry and self.questions:
            await self.questions.keep(search, wanted.asked, wanted.model, wanted.key, entry)

    async def _generate(self, flight: Flight, wanted: Wanted) -> Entry | None:
        """Have an endpoint answer, for all who wait; return what is to be kept."""
        exchange = wanted.exchange
        reply = await wanted.walk(None, True).answer()
        streams = reply.is_event_stream and reply.status == 200 and wanted.asked.envelope.stream
        flight.begin(reply, exchange.endpoint, streams=streams)
        body = await _passed(reply, flight) if streams else reply.document if reply.body is None else None
        entry = None if body is None or reply.status != 200 else self._entry(wanted, reply, body)
        flight.end(entry)
        if entry is None or not _is_whole(entry, reply, exchange) or len(entry.body) > self._limit:
            return None
        is_current = self._flights.get(wanted.flight) is flight  # there was no purge meanwhile
        return entry if is_current else None

    async def _claim(self, wanted: Wanted) -> Claim | Entry | None:
        """Ask to generate alone among replicas, or for what another one has generated."""
        if wanted.wish.no_cache:
            return None
        patience = wanted.deadline.remaining() if wanted.deadline else _PATIENCE
        found = await _now(self._store.claim(wanted.key, patience))
        wanted.exchange.waited()
        return None if isinstance(found, Entry) and not self._will_do(found, wanted.wish) else found

    async def _search(self, wanted: Wanted) -> "Search | None":
        """Look for a question that means the same."""
        assert self.questions
        if wanted.wish.no_cache:
            return None
        key_id = wanted.exchange.key_id
        scope = key_id if wanted.rule.scope == "key" else ""
        found = await self.questions.find(wanted.asked, wanted.model, scope, key_id)
        wanted.exchange.waited()
        return found

    def _entry(self, wanted: Wanted, reply: Reply, body: bytes) -> Entry:
        exchange, tally = wanted.exchange, reply.tally
        ttl, own = cast(float, wanted.rule.ttl), wanted.wish.ttl
        # By position: that takes a sixth of the time that names do.
        return Entry(
            exchange.model,
            exchange.endpoint,
            wanted.asked.envelope.model,
            exchange.operation,
            reply.is_event_stream,
            content_type(reply.headers),
            body,
            self._clock(),
            ttl if own is None else min(own, ttl),
            tally.usage,
            tally.finish_reason,
        )

    async def _keep(self, name: bytes, entry: Entry | None, claim: Claim | None) -> None:
        if entry is not None:
            if (storing := self._store.put(name, entry, claim)) is not None:
                await storing
        elif claim is not None:
            await _now(self._store.release(claim))


def _key(asked: Asked, model: Model, rule: CacheRule, wish: Wish, key_id: str) -> bytes | None:
    """Return what an answer is kept under, None where it is not to be kept."""
    when = rule.when if wish.when is None or rule.when == "never" else wish.when
    if when == "never":
        return None
    scope = key_id if rule.scope == "key" else ""
    return key.key(asked, model.name, model.revision, scope, fixed=when == "deterministic")


def _near(reply: Reply, flight: Flight) -> Reply:
    """Say of an answer to another question how near that is."""
    if flight.similarity is not None:
        reply.headers.append((b"x-polyvox-cache-similarity", b"%.4f" % flight.similarity))
    return reply


async def _now(found: Awaitable[T] | T) -> T:
    """Return what a store gave, at once or in a moment."""
    return await found if isinstance(found, Awaitable) else found


def _is_whole(entry: Entry, reply: Reply, exchange: Exchange) -> bool:
    """Say whether an answer is whole, and is the model's own."""
    if exchange.level or exchange.resumed or reply.tally.failed:
        return False
    if entry.operation in FIRST_TOKEN and entry.finish_reason not in _WHOLE:
        return False
    return entry.stream or entry.content_type.lower().startswith(replay.JSON)


async def _passed(reply: Reply, flight: Flight) -> bytes | None:
    """Pass a stream to all who wait for it; return all of it, None if that is more than is kept."""
    assert reply.body is not None
    flight.put(reply.opening)
    passing, more = b"", True
    while more:
        try:
            async for data in reply.body:
                flight.put(reply.read(data))
                if flight.is_full:
                    await flight.room()
            passing, more = reply.end(), False
        except UpstreamError as error:
            passing, more = await reply.mend(error)
        flight.put(passing)
    return flight.whole()
