"""Answers to questions that mean the same: the semantic cache of one alias.

A question is found by the vector that an embedding model makes of it. Only what an exact look-up would have to agree
about but the turns themselves makes two questions comparable: the caller's scope, model, path, instructions and every
parameter (its partition). Whatever goes wrong, or takes too long, is a miss.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Final, NamedTuple

import msgspec

from proxy.breaker import Breaker, Change, Outcome, State
from proxy.cache import Entry, Store, replay
from proxy.cache.likeness import LOWEST, Likeness, Tally, alike
from proxy.cache.settings import Semantic as Settings
from proxy.cache.vectors import Near, Vector, Vectors
from proxy.config import BreakerSettings

Embed = Callable[[str, str], Awaitable[Vector | None]]  # a text, and the key that asks; raises whatever it does

_BREAKER: Final = BreakerSettings(failures=3, minimum=20, window=10.0, recovery=2.0, max_recovery=30.0)

_log = logging.getLogger("polyvox.cache")


class Search(NamedTuple):
    """How one question was looked for. entry: the answer to give, None to have one generated.

    earlier: the answer to the nearest question, to be compared with.
    """

    partition: bytes
    vector: Vector | None = None
    near: Near | None = None
    entry: Entry | None = None
    earlier: Entry | None = None


class Semantic:
    """The semantic cache of an alias."""

    def __init__(
        self, name: str, settings: Settings, vectors: Vectors, embed: Embed, store: Store, tally: Tally,
        clock: Callable[[], float] = monotonic, chance: Callable[[], float] = random.random,
    ) -> None:  # fmt: skip
        """name: of the alias."""
        self.max_turns = settings.max_turns
        self._name = name
        self._settings = settings
        self._vectors = vectors
        self._embed = embed
        self._store = store
        self._tally = tally
        self._clock = clock
        # All mutable state: whether embeddings and vectors are asked for, and why they were not to be had last.
        self._breaker = Breaker(_BREAKER, chance, self._changed)
        self._trouble = ""

    def __repr__(self) -> str:
        return f"<Semantic {self._tally!r} {self._vectors!r} {self._breaker!r}>"

    async def find(self, text: str, partition: bytes, key_id: str) -> Search:
        """Look for an answer to a question that means the same, for `timeout` seconds at most. key_id: of who asks."""
        self._tally.asked()
        now = self._clock()
        if not self._breaker.allow(now):
            self._tally.unanswered()
            return Search(partition)
        ticket = self._breaker.begin(now)
        try:
            async with asyncio.timeout(self._settings.timeout):
                search = await self._search(text, partition, key_id)
            self._trouble = "no vector in the answer"
        except Exception as e:  # whatever an upstream or a store does is a miss; its words may have addresses
            search = Search(partition)
            self._trouble = type(e).__name__
        well = search.vector is not None
        if not well:
            self._tally.unanswered()
        self._breaker.record(Outcome.SUCCESS if well else Outcome.FAILURE, self._clock(), ticket)
        return self._judged(search)

    async def keep(self, search: Search, key: bytes, entry: Entry) -> None:
        """An answer was generated, and is in the store now: let it be found by its question."""
        if search.vector is None:
            return
        if search.near and search.earlier:
            self._tally.compared(search.near.similarity, alike(_text(entry), _text(search.earlier)))
        try:
            async with asyncio.timeout(self._settings.timeout):
                await self._vectors.add(search.partition, search.vector, key)
        except Exception:  # the next one who asks will have it generated again
            return

    def report(self) -> Likeness:
        """Return what would be hit at which threshold."""
        return self._tally.report(shadow=self._settings.shadow, threshold=self._settings.threshold)

    async def _search(self, text: str, partition: bytes, key_id: str) -> Search:
        vector = await self._embed(text, key_id)
        near = None if vector is None else await self._vectors.nearest(partition, vector)
        if near is None:
            return Search(partition, vector)
        if near.similarity < (LOWEST if self._settings.shadow else self._settings.threshold):
            return Search(partition, vector, near)
        found = self._store.get(near.key)
        earlier = found if found is None or isinstance(found, Entry) else await found
        if earlier is None:  # it is too old, or had to go
            await self._vectors.forget(partition, near.key)
            return Search(partition, vector)
        return Search(partition, vector, near, None, earlier)

    def _changed(self, change: Change) -> None:
        if change.before is State.CLOSED:
            _log.warning("the semantic cache of %s fails (%s); questions are not compared", self._name, self._trouble)
        elif change.after is State.CLOSED:
            _log.warning("the semantic cache of %s works again", self._name)

    def _judged(self, search: Search) -> Search:
        """Count a search; let its answer be given if it is near enough, and this is no shadow."""
        if search.near is None:
            return search
        self._tally.near(search.near.similarity)
        if search.earlier is None or search.near.similarity < self._settings.threshold:
            return search
        self._tally.hit()
        return search if self._settings.shadow else search._replace(entry=search.earlier)


class _Message(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    message: _Message


class _Chat(msgspec.Struct, frozen=True):
    choices: list[_Choice]


_decode = msgspec.json.Decoder(_Chat).decode


def _text(entry: Entry) -> str:
    """Return what an answer says."""
    try:
        choices = _decode(replay.document(entry, entry.name)).choices
    except msgspec.DecodeError:
        return ""
    return "\n".join(choice.message.content or "" for choice in choices)
