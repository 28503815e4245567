"""Replies made of what is kept, or of what is being made, in the form that each client asked for."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec

from proxy import accounting, sse
from proxy.accounting import NoAccount, StreamAccount, Tally, Usage
from proxy.cache import Entry, replay
from proxy.cache.flight import Flight
from proxy.cache.settings import CacheRule
from proxy.cache.wish import Wish
from proxy.deadline import Deadline
from proxy.errors import UpstreamError, upstream_failure
from proxy.fallback import Walk
from proxy.providers import Asked
from proxy.registry import Model
from proxy.relay import Exchange
from proxy.renaming import EventRenamer
from proxy.reply import Headers, Reply, with_length
from proxy.telemetry import FIRST_TOKEN

CLIENT = "polyvox.client"  # an extension of ASGI that our server has


class Client(Protocol):
    """Who waits for an answer. task: what makes it, and ends when the client goes."""

    task: "asyncio.Task[None] | None"

    def when_gone(self, call: Callable[[], object] | None) -> None:
        """Have this called when the client goes, instead of ending the task; None: end it, as usual."""
        ...


Walks = Callable[..., Walk]  # from the arguments of Walk that are left open: deadline, whole
FlightKey = bytes | tuple[object, ...]  # the key of the cache, with the chain if there is one


class Wanted(msgspec.Struct):
    """A request whose answer may be kept.

    walk: makes its walk. deadline: of its client. flight: what requests have in common that can share one generation:
    who lists other fallbacks wants no part of it. shows_cost: see Exchange. All else is mutable state: what others wait
    for with it, once they do; what is kept of its answer; how near the question is of whose answer it gets, where that
    is another.
    """

    asked: Asked
    model: Model
    walk: Walks
    exchange: Exchange
    deadline: Deadline | None
    client: Client | None
    wish: Wish
    rule: CacheRule
    key: bytes
    flight: FlightKey
    shows_cost: bool
    shared: Flight | None = None
    kept: Entry | None = None
    similarity: float | None = None

    def hides_usage(self) -> bool:
        """Say whether a stream is not to tell what it used."""
        return not accounting.asks_usage(bytes(self.asked.envelope.fields.get("stream_options", b"")))


def document(entry: Entry, wanted: Wanted) -> Reply:
    """Make the reply of a kept answer as one document."""
    body = replay.document(entry, wanted.asked.envelope.model)
    headers = with_length([(b"content-type", _type(entry, stream=False))], len(body))
    return _given(body, headers, entry, wanted.exchange)


def stream(entry: Entry, wanted: Wanted, pace: float) -> Reply:
    """Make the reply of a kept answer as a stream. pace: events a second, 0 for all at once."""
    cost = _free if wanted.shows_cost else None
    name, hide_usage = wanted.asked.envelope.model, wanted.hides_usage()
    events = replay.events(entry, name, hide_usage=hide_usage, cost=cost, pieces=pace > 0)
    headers = [(b"content-type", _type(entry, stream=True))]
    return _paced(events, pace, headers, wanted) if pace else _given(events, headers, entry, wanted.exchange)


def live(flight: Flight, wanted: Wanted, *, leads: bool) -> Reply:
    """Make the reply of one who reads a stream while it is made."""
    assert flight.reply
    exchange, name = wanted.exchange, wanted.asked.envelope.model
    cost = (exchange.cost if leads else _free) if wanted.shows_cost else None
    first = FIRST_TOKEN.get(exchange.operation, b"")
    account = StreamAccount(hide_usage=wanted.hides_usage(), first_token=first, cost=cost)
    headers = list(flight.reply.headers)
    reply = Reply(exchange, 200, headers, account, flight.reader(exchange), accounts=not leads)
    if flight.name != name:
        reply.change = EventRenamer(name)

    async def end(reply: Reply, error: UpstreamError) -> tuple[bytes, bool]:
        exchange.fail(error)
        return reply.broken(error) + reply.error_event(upstream_failure(error)), False

    reply.mending = end
    return reply


def _given(body: bytes, headers: Headers, entry: Entry, exchange: Exchange) -> Reply:
    reply = Reply(exchange, 200, headers, NoAccount(Tally.of(entry.usage, entry.finish_reason)), None)
    reply.document = body
    return reply


def _paced(events: bytes, pace: float, headers: Headers, wanted: Wanted) -> Reply:
    """Make the reply of a kept answer that is given event by event. pace: events a second."""

    async def body() -> AsyncIterator[bytes]:
        for event in sse.Events().feed(events):
            yield event
            await asyncio.sleep(1 / pace)

    exchange = wanted.exchange
    account = StreamAccount(first_token=FIRST_TOKEN.get(exchange.operation, b""))
    return Reply(exchange, 200, headers, account, body())


def _free(usage: Usage) -> float:
    return 0.0


def _type(entry: Entry, *, stream: bool) -> bytes:
    if entry.stream == stream:
        return entry.content_type
    return replay.EVENT_STREAM if stream else replay.JSON
