"""Answers that were given before, or that are about to be: the story of a request where there is a cache."""

import asyncio
import contextlib
import time
from binascii import hexlify
from collections.abc import Awaitable, Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, TypeVar

import msgspec

from proxy.cache import Claim, Entry, Store, key, replay, replies
from proxy.cache.bulletin import ALL, Bulletin, Purge, Report
from proxy.cache.flight import Flight
from proxy.cache.replies import Client, FlightKey, Walks, Wanted
from proxy.cache.settings import CacheSettings, size
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
        self._seeks = store.is_shared or questions is not None  # before it has an answer made
        self._rule = cache(settings.rule)  # of names that there are
        self._clock = clock
        # All mutable state: the generations under way that several wait for, and those that one waits for as yet; only
        # what is in these fills the store. How often each of CACHE_RESULTS was.
        self._flights: dict[FlightKey, Flight] = {}
        self._alone: dict[FlightKey, Wanted] = {}
        self._results = dict.fromkeys(CACHE_RESULTS, 0)

    def __repr__(self) -> str:
        return f"<Cached {self._store!r} {len(self._flights)} flights, {len(self._alone)} alone>"

    @property
    def is_idle(self) -> bool:
        """Say whether nothing is being made."""
        return not self._flights and not self._alone

    async def answer(
        self,
        asked: Asked,
        model: Model,
        chain: Sequence[str],
        exchange: Exchange,
        walk: Walks,
        wish: Wish,
        deadline: Deadline | None = None,
        client: Client | None = None,
    ) -> Reply:
        """Answer a request for a model. Raises what Walk.answer does. walk: makes the walk of this request.

        1. What is not to be kept goes its way as without a cache.
        2. Somebody waits for the same: wait with them.
        3. It is kept: give it.
        4. Have it made; the others may wait with us.
        """
        rule = self._rule(asked.envelope.model, model.name)
        when = rule.when if wish.when is None or rule.when == "never" else wish.when
        found = None
        if when != "never" and not wish.no_store:
            scope = exchange.key_id if rule.scope == "key" else ""
            found = key.key(asked, model.name, model.revision, scope, fixed=when == "deterministic")
        if found is None:  # 1
            exchange.cache = "bypass"
            return self._labelled(await walk(deadline).answer(), exchange)
        shows_cost, exchange.shows_cost = exchange.shows_cost, False  # what all share has no one's cost in it
        flight = (found, *chain) if chain else found
        wanted = Wanted(asked, model, walk, exchange, deadline, client, wish, rule, found, flight, shows_cost)
        if self._bulletin.is_behind() and not self._store.is_shared:
            await self._catch_up()
        if wish.no_cache:
            exchange.cache = "bypass"
            self._flights.pop(flight, None)  # what it makes is newer than theirs
            self._alone.pop(flight, None)
            return await self._lead(wanted)
        exchange.cache = "miss"
        if flight in self._flights or flight in self._alone:  # 2
            if (reply := await self._join(wanted)) is not None:
                return reply
        elif not self._store.is_shared:  # else it is asked with a claim
            entry = self._store.get(found)
            if isinstance(entry, Entry) and self._will_do(entry, wish):  # 3
                return self._replay(entry, wanted, "hit")
        return await self._lead(wanted)  # 4

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
        """Return what the caches of all workers have told, of the others as of a moment ago.

        How much a shared store holds, others decide as well, and only it can tell: that is None.
        """
        self._tell()
        found = self._bulletin.all()
        return msgspec.structs.replace(found, entries=None, bytes=None) if self._store.is_shared else found

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
            self._alone.clear()
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
        if wanted.similarity is not None:  # to an answer to another question
            reply.headers.append((b"x-polyvox-cache-similarity", b"%.4f" % wanted.similarity))
        return self._labelled(reply, exchange, wanted.key, entry)

    def _labelled(
        self, reply: Reply, exchange: Exchange, name: bytes | None = None, entry: Entry | None = None
    ) -> Reply:
        """Say what the cache did; of a kept answer, who gave it, and how old it is."""
        self._results[exchange.cache] += 1
        reply.headers.append(_SAYS[exchange.cache])
        if name is not None:
            reply.headers.append((b"x-polyvox-cache-key", hexlify(name)))
        if entry is not None:
            reply.headers += (
                (b"x-polyvox-model", entry.model.encode()),
                (b"x-polyvox-endpoint", entry.endpoint.encode()),
                (b"age", b"%d" % entry.age(self._clock())),
            )
        return reply

    # What is being made

    async def _join(self, wanted: Wanted) -> Reply | None:
        """Wait for a generation with others. None if it failed: then each goes its own way."""
        flight = self._flights.get(wanted.flight) or self._opened(self._alone.pop(wanted.flight))
        if not flight.is_open:
            return None
        exchange = wanted.exchange
        flight.join(exchange, reads=wanted.asked.envelope.stream)
        exchange.shares(flight, leads=False)
        await flight.begun()
        if not (wanted.asked.envelope.stream and flight.streams):
            await flight.ended()
        exchange.waited()
        if flight.entry is not None:
            wanted.similarity = flight.similarity
            return self._replay(flight.entry, wanted, "joined" if flight.reply else "hit")
        if flight.over:
            exchange.parts()
            return None
        exchange.cache, exchange.source = "joined", flight.source
        exchange.answers(200)
        return self._labelled(replies.live(flight, wanted, leads=False), exchange, wanted.key)

    def _opened(self, wanted: Wanted) -> Flight:
        """Somebody comes who wants what a request makes for itself alone: from now on both wait for it."""
        assert wanted.client
        flight = self._flight(wanted)
        flight.task = wanted.client.task
        wanted.client.when_gone(partial(flight.leave, wanted.exchange))
        return flight

    def _flight(self, wanted: Wanted) -> Flight:
        flight = wanted.shared = self._flights[wanted.flight] = Flight(wanted.asked.envelope.model, self._limit)
        flight.join(wanted.exchange, reads=wanted.asked.envelope.stream)
        return flight

    async def _lead(self, wanted: Wanted) -> Reply:
        """Have an answer made: by the task of the request, where that will do, since another one costs 10 us."""
        if wanted.asked.envelope.stream or wanted.deadline is not None or wanted.client is None:
            made = await self._begin(wanted)
        else:
            self._alone[wanted.flight] = wanted
            try:
                if self._seeks:
                    made = await self._find(wanted)
                else:  # as _generate, whose way through a coroutine more would cost 2 us
                    made = await wanted.walk(whole=True).answer()
                    if (entry := self._made(wanted, made, made.document if made.body is None else None)) is not None:
                        self._store.put(wanted.key, entry)
            except BaseException as error:
                self._fail(wanted, error)
                raise
        if isinstance(made, Entry):
            return self._replay(made, wanted, "hit")
        return self._labelled(made, wanted.exchange, wanted.key)

    async def _begin(self, wanted: Wanted) -> Reply | Entry:
        """Have an answer made by a task of its own."""
        flight = self._flight(wanted)
        wanted.exchange.shares(flight, leads=True)
        flight.task = asyncio.create_task(self._fly(flight, wanted))
        await flight.begun()
        if flight.error is not None:
            raise flight.error
        made = flight.reply or flight.entry
        assert made
        return replies.live(flight, wanted, leads=True) if flight.streams else made

    async def _fly(self, flight: Flight, wanted: Wanted) -> None:
        try:
            await (self._find(wanted) if self._seeks else self._generate(wanted))
        except BaseException as error:
            self._fail(wanted, error)
            if not isinstance(error, Exception):
                raise
        finally:
            if not flight.has(wanted.exchange):
                await wanted.exchange.close()

    async def _find(self, wanted: Wanted) -> Reply | Entry:
        """Look where other replicas and other questions have their answers, before one is made."""
        claim = await self._claim(wanted) if self._store.is_shared else None
        if isinstance(claim, Entry):
            self._end(wanted, claim)
            return claim
        search = None
        try:
            search = await self._search(wanted) if self.questions else None
            if search and search.near and search.entry and self._will_do(search.entry, wanted.wish):
                wanted.similarity = search.near.similarity
                self._end(wanted, search.entry)
                return search.entry
            reply = await self._generate(wanted, claim)
        finally:
            if claim is not None and wanted.kept is None:
                await _now(self._store.release(claim))
        if search and wanted.kept and self.questions:
            await self.questions.keep(search, wanted.asked, wanted.model, wanted.key, wanted.kept)
        return reply

    async def _generate(self, wanted: Wanted, claim: Claim | None = None) -> Reply:
        """Have an endpoint answer, for all who wait, and keep what it says."""
        reply = await wanted.walk(whole=True).answer()
        body = reply.document if reply.body is None else None
        if reply.is_event_stream and reply.status == 200 and wanted.asked.envelope.stream:
            assert wanted.shared
            wanted.shared.begin(reply, wanted.exchange.endpoint, streams=True)
            body = await _passed(reply, wanted.shared)
        if (entry := self._made(wanted, reply, body)) is not None:
            wanted.kept = entry
            if (storing := self._store.put(wanted.key, entry, claim)) is not None:
                await storing
        return reply

    def _made(self, wanted: Wanted, reply: Reply, body: bytes | None) -> Entry | None:
        """An answer is there: tell those who wait; return what is to be kept of it."""
        exchange, tally, ttl, own = wanted.exchange, reply.tally, wanted.rule.ttl or 0.0, wanted.wish.ttl
        if wanted.shared is not None and wanted.shared.reply is None:
            wanted.shared.begin(reply, exchange.endpoint, streams=False)
        if body is None or reply.status != 200:
            self._end(wanted, None)
            return None
        entry = Entry(  # by position: that takes a sixth of the time that names do
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
        if not self._end(wanted, entry) or exchange.level or exchange.resumed or tally.failed:
            return None  # it was purged meanwhile, or is not whole and the model's own
        if len(body) > self._limit or (tally.finish_reason not in _WHOLE and exchange.operation in FIRST_TOKEN):
            return None
        return entry if entry.stream or entry.content_type.lower().startswith(replay.JSON) else None

    def _end(self, wanted: Wanted, entry: Entry | None) -> bool:
        """There is an answer, or none that others can have. Say whether nothing was purged since it was asked for."""
        if (flight := wanted.shared) is not None:
            return self._land(flight, wanted, entry, None)
        if self._alone.get(wanted.flight) is not wanted:
            return False
        del self._alone[wanted.flight]
        return True

    def _fail(self, wanted: Wanted, error: BaseException) -> None:
        """There will be no answer, or all that was to be done with it did not work; the first is told who waits."""
        if (flight := wanted.shared) is not None:
            told = error if isinstance(error, Exception) else TruncatedAnswer("it was given up")
            self._land(flight, wanted, None, told)
        elif self._alone.get(wanted.flight) is wanted:
            del self._alone[wanted.flight]

    def _land(self, flight: Flight, wanted: Wanted, entry: Entry | None, error: Exception | None) -> bool:
        flight.similarity = wanted.similarity
        flight.end(entry, error)
        if wanted.client is not None:
            wanted.client.when_gone(None)
        if self._flights.get(wanted.flight) is not flight:
            return False
        del self._flights[wanted.flight]
        return True

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


async def _now(found: Awaitable[T] | T) -> T:
    """Return what a store gave, at once or in a moment."""
    return await found if isinstance(found, Awaitable) else found


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
