"""Walks from endpoint to endpoint until one answers; goes on with a stream elsewhere when its endpoint breaks.

One walk is for one request. An attempt is made at

1. the endpoints of the model that was asked for, each once;
2. those of the models of its chain, in their order;
3. all of them once more, after a moment, where what was wrong may pass by itself;
4. an engine that is starting, once it has started.

What has been sent to an endpoint in vain is paid from the retry budget. Nothing is sent to the client before the first
token, or the whole of a document, is here. After it, a stream that breaks goes on at an endpoint that can continue it.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from proxy import failures, forbidden, providers, sse
from proxy import reply as replies
from proxy.admission import Admission
from proxy.balancer import Lease, Prompt
from proxy.continuation import COMPLETIONS, Continuation
from proxy.deadline import Deadline
from proxy.endpoints import Endpoints, Standing
from proxy.errors import (
    BadGateway,
    EngineStopped,
    ErrorEvent,
    NotReady,
    RequestError,
    Unavailable,
    UpstreamError,
    UpstreamFailed,
    upstream_failure,
)
from proxy.failures import Verdict
from proxy.length import Length
from proxy.limits import Limits
from proxy.probe import LiveRegistry
from proxy.providers import Asked
from proxy.registry import Endpoint, Model
from proxy.relay import Exchange
from proxy.reply import Cut, Reply
from proxy.retries import backoff
from proxy.transport import Answer, Timeouts, Transport

Key = tuple[str, float]  # of a process at an endpoint: its name, and since when it is there

_NONE: frozenset[Key] = frozenset()
_TOO_LONG = frozenset((400, 413))  # what engines answer to a prompt that is longer than their context, among others
_MOST_BREAKS = 8  # of one stream; whatever it is that ends its engines, it is not to end more of them
_AT_FIRST = ((b"x-polyvox-fallback-level", b"0"), (b"x-polyvox-attempts", b"1"))


class Ways(NamedTuple):
    """What all walks share. start_wait: seconds for an engine to start."""

    live: LiveRegistry
    endpoints: Endpoints
    transport_to: Callable[[Endpoint], Transport]
    start_wait: float
    limits: Limits
    admission: Admission


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where an attempt may be made: one of some endpoints. level: how many models of the chain were passed over."""

    level: int
    model: Model
    candidates: list[Standing]


class Walk:
    """The attempts of one request. What an attempt takes is the exchange's to give back."""

    __slots__ = (
        "_again", "_asked", "_at", "_breaks", "_chain", "_context", "_deadline", "_exchange", "_first", "_key",
        "_length", "_model", "_must_continue", "_of", "_tried", "_waited", "_ways",
    )  # fmt: skip

    def __init__(
        self, ways: Ways, asked: Asked, model: Model, chain: Sequence[str], exchange: Exchange,
        deadline: Deadline | None = None,
    ) -> None:  # fmt: skip
        self._ways = ways
        self._deadline = deadline
        self._asked = asked
        self._chain = chain
        self._exchange = exchange
        # All mutable state: the model as the newest registry has it; of the attempt that is under way, the model that
        # it is made for, how its endpoint stands, and which process is there.
        self._model = model
        self._of = model
        self._at: Standing | None = None
        self._key: Key = ("", 0.0)
        # What was tried; of that, what may be asked again in a moment (None: it was); whether an engine was waited for.
        self._tried: frozenset[Key] = _NONE
        self._again: frozenset[Key] | None = _NONE
        self._waited = False
        # What the client is told, or given, if nothing helps; how often the stream broke.
        self._first: Exception | Reply | None = None
        self._breaks = 0
        # What an endpoint must have: a longer context than this, the ability to continue. How long the prompt is.
        self._context = 0
        self._must_continue = False
        self._length: Length | None = None

    def __repr__(self) -> str:
        return f"<Walk {self._model.name}, {self._exchange.attempts} attempts, tried {sorted(self._tried)}>"

    async def answer(self) -> Reply:
        """Return the first answer that is one, or the error that no other endpoint can better. Raises the same."""
        self._ways.endpoints.budget(self._model).earn()
        while place := self._find() or await self._later():
            try:
                reply = await self._attempt(place)
            except (UpstreamError, RequestError) as error:
                await self._leave(error, said := failures.verdict(error, of_chain=place.level > 0))
                if not self._may_go_on(said):
                    break
            else:
                if reply.status < 400 or not await self._passes_over(reply):
                    return self._labelled(reply)
        return self._last_word()

    # Where to go

    def _find(self) -> Place | None:
        """Return the first model with endpoints that may be asked now; one where all have too much to do comes last."""
        endpoints = self._ways.endpoints
        now = endpoints.clock()
        busy = None
        for level, model in self._models():
            allowed = endpoints.allowed(model, now)
            if self._tried:
                allowed = self._untried(allowed)
            if not allowed:
                continue
            preferred = endpoints.preferred(allowed, now)
            if preferred and (not self._chain or self._ways.admission.has_room(model.name, preferred)):
                return Place(level, model, preferred)
            busy = busy or Place(level, model, allowed)
        return busy

    def _untried(self, standings: list[Standing]) -> list[Standing]:
        fresh = [s for s in standings if _key(s.endpoint) not in self._tried]
        return [s for s in fresh if s.endpoint.continues] if self._must_continue else fresh

    def _models(self) -> Iterator[tuple[int, Model]]:
        if not self._context:
            yield 0, self._model
        models = self._ways.live.current.models
        for level, name in enumerate(self._chain, 1):
            if self._suits(models[name]):
                yield level, models[name]

    def _suits(self, model: Model) -> bool:
        """Say whether a model of the chain may be asked this at all."""
        context = model.context_length
        if context is not None and (context <= self._context or self._measured().least > context):
            return False
        try:
            forbidden.check(self._asked.envelope.fields, model.policy, self._ways.limits)
        except RequestError:
            return False
        return True

    def _measured(self) -> Length:
        if self._length is None:
            self._length = Length.of(self._asked.envelope.fields)
        return self._length

    async def _later(self) -> Place | None:
        """Nothing may be asked now. Wait where that can help, and look again."""
        place = None
        if self._again:
            await asyncio.sleep(backoff(self._ways.endpoints.chance()))
            self._tried -= self._again
            self._again = None
            place = self._look_again()
        if place is None and not self._waited and self._is_starting():
            self._waited = True
            await self._ways.live.until(
                lambda _: bool(self._look_again()) or not self._is_starting(), self._ways.start_wait
            )
            place = self._look_again()
        return place

    def _look_again(self) -> Place | None:
        self._exchange.waited()
        self._model = self._ways.live.current.models.get(self._model.name, self._model)
        return self._find()

    def _is_starting(self) -> bool:
        """Say whether an engine that could answer is about to."""
        return any(
            model.state in ("starting", "draining") or any(e.state == "starting" for e in model.endpoints)
            for _, model in self._models()
        )

    # One attempt

    async def _attempt(self, place: Place) -> Reply:
        """Return an answer that may be sent. Raises UpstreamError or RequestError where there is none."""
        started = self._ways.endpoints.clock()
        answer, endpoint, hide_usage = await self._send(place, self._asked)
        renamed = endpoint.base_path is not None or self._asked.envelope.model != endpoint.serves
        name = self._asked.envelope.model if renamed else None
        reply = await replies.reply(answer, self._exchange, name, hide_usage=hide_usage)
        if reply.status >= 400:
            reply.document = failures.masked(reply.document, endpoint)
        elif reply.body is not None:
            reply.mending = self.mend
        if not reply.is_event_stream:
            return reply
        if self._chain or len(place.model.endpoints) > 1:
            reply.continuation = Continuation.of(self._asked.path, self._asked.envelope.fields)
        try:
            await reply.open(started + _patience(place.model), self._ways.endpoints.clock)
        except ErrorEvent as error:
            if (status := failures.status_of(error)) is None:
                raise
            return replies.refusal(status, failures.masked(error.document, endpoint), self._exchange)
        return reply

    async def _send(self, place: Place, asked: Asked) -> tuple[Answer, Endpoint, bool]:
        """Send one of the endpoints the request; return its answer, and whether usage is to be taken out of that."""
        ways, exchange = self._ways, self._exchange
        self._of = place.model
        exchange.model, exchange.level = place.model.name, place.level
        name, prompt, streamed = place.model.name, self._prompt(place.model), asked.envelope.stream
        picked = ways.admission.pick(name, place.candidates, prompt, streamed)
        standing, lease = picked or await self._queue(place, prompt)
        exchange.hold(lease)
        self._at = standing
        endpoint, breaker = standing.endpoint, standing.breaker
        self._key = _key(endpoint)
        provider = providers.named(endpoint.provider)
        sent = provider.request(asked, endpoint)
        headers = sent.headers
        if self._deadline is not None and endpoint.pass_timeout:
            headers = [*headers, self._deadline.header()]
        exchange.begin(endpoint.name, breaker, breaker.begin(ways.endpoints.clock()))
        timeouts = _timeouts(place.model, stream=streamed)
        answer = await ways.transport_to(endpoint).send(b"POST", sent.path, headers, sent.body, timeouts)
        exchange.answered(answer)
        if answer.status >= 300:
            failures.check(answer, endpoint)
        return provider.answer(answer, asked, endpoint), endpoint, sent.hide_usage

    def _prompt(self, model: Model) -> Prompt | None:
        """Return the prompt as the balancer wants it, where there is a choice of endpoints."""
        if len(model.endpoints) < 2:
            return None
        asked = self._asked
        return self._ways.admission.prompt(model.name, asked.envelope.fields, asked.salt, len(asked.body))

    async def _queue(self, place: Place, prompt: Prompt | None) -> tuple[Standing, Lease]:
        """All that may be asked have as many requests as they may have: wait for one. Raises TooBusy."""
        name = place.model.name
        try:
            return await self._ways.admission.wait(
                name, lambda: self._still_there(name), prompt, self._asked.envelope.stream
            )
        except RequestError:
            self._tried |= {_key(s.endpoint) for s in place.candidates}
            raise
        finally:
            self._exchange.waited()

    def _still_there(self, name: str) -> list[Standing]:
        """Return the endpoints that a request in the queue may go to now."""
        endpoints = self._ways.endpoints
        model = self._ways.live.current.models.get(name)
        allowed = self._untried(endpoints.allowed(model, endpoints.clock())) if model else []
        if not allowed:
            raise self._unavailable()
        return allowed

    async def _leave(self, error: Exception | None, said: Verdict) -> None:
        """The attempt has failed, with an error or (None) an answer that says so: settle it, and remember it."""
        self._tried |= {self._key}
        if said.again and self._again is not None:
            self._again |= {self._key}
        if isinstance(error, UpstreamFailed) and error.retry_after:
            self._rest(error.retry_after)
        await self._exchange.retreat(error, said.outcome)
        if self._first is None:
            self._first = error

    def _rest(self, seconds: float | None) -> None:
        assert self._at
        self._ways.endpoints.rest(self._at, seconds)

    def _may_go_on(self, said: Verdict) -> bool:
        """Say whether another attempt makes sense, and is within the budget."""
        if not said.elsewhere:
            return False
        endpoints = self._ways.endpoints
        return not said.sent or endpoints.budget(self._model).spend(endpoints.clock())

    async def _passes_over(self, reply: Reply) -> bool:
        """Say whether an answer that is an error is left aside, since another endpoint may give a better one."""
        context = self._of.context_length
        if failures.is_busy(reply.status):
            self._rest(failures.retry_after(reply.headers))
        elif reply.status in _TOO_LONG and context is not None and self._measured().most > context:
            self._context = max(self._context, context)
        else:
            return False
        self._tried |= {self._key}
        if self._find() is None or not self._may_go_on(failures.BUSY):
            return False
        self._first = self._first or reply
        await self._leave(None, failures.BUSY)
        return True

    def _labelled(self, reply: Reply) -> Reply:
        exchange = self._exchange
        names = ((b"x-polyvox-model", exchange.model.encode()), (b"x-polyvox-endpoint", exchange.endpoint.encode()))
        if exchange.attempts > 1 or exchange.level:
            level, attempts = b"%d" % exchange.level, b"%d" % exchange.attempts
            reply.headers += (*names, (b"x-polyvox-fallback-level", level), (b"x-polyvox-attempts", attempts))
        else:
            reply.headers += (*names, *_AT_FIRST)
        return reply

    def _last_word(self) -> Reply:
        """Return the answer that was left aside, or raise what went wrong first."""
        first = self._first
        if isinstance(first, Reply):
            self._exchange.answers(first.status)
            return self._labelled(first)
        raise first or self._unavailable()

    def _unavailable(self) -> RequestError:
        model, endpoints = self._model, self._ways.endpoints
        if not model.ready() and model.state == "starting":
            return NotReady(model.name, model.state, model.detail)
        if not model.ready():
            # Why it failed is for whoever runs the server (`polyvox engines list`): a log's tail may hold paths.
            return EngineStopped(model.name, model.state)
        return Unavailable(model.name, endpoints.wait([m for _, m in self._models()], endpoints.clock()))

    # A stream that breaks

    async def mend(self, reply: Reply, error: UpstreamError) -> tuple[bytes, bool]:
        """See Reply.mend.

        1. A body that is no stream is cut, so that nobody takes it for whole.
        2. All of the answer has been sent: its end is ours to write.
        3. Another endpoint goes on with it.
        4. The stream ends in an error event, without `[DONE]`.
        """
        rest = reply.broken(error)
        said = failures.verdict(error)
        await self._leave(error, said)
        continuation = reply.continuation
        if not reply.is_event_stream:  # 1
            self._exchange.fail(error)
            raise Cut from error
        if continuation and (end := continuation.finish()) is not None:  # 2
            return rest + reply.finish(end), False
        if continuation and said.elsewhere and await self._resume(reply, continuation, said):  # 3
            return rest, True
        self._exchange.fail(error)  # 4
        return rest + sse.error_event(upstream_failure(error).envelope()), False

    async def _resume(self, reply: Reply, continuation: Continuation, broken: Verdict) -> bool:
        """Have another endpoint go on with a stream, or the same after a moment; say whether one does."""
        body = self._asked.body
        resumed = continuation.resume(body)
        self._breaks += 1
        if resumed is None or self._breaks > _MOST_BREAKS:
            return False
        self._must_continue = resumed is not body and self._asked.path != COMPLETIONS
        if reply.has_moved:  # those that failed before are as good as any
            self._tried, self._waited = frozenset((self._key,)), False
            self._again = self._tried if broken.again else _NONE
        elif not self._may_go_on(failures.BUSY):
            return False
        while place := self._find() or await self._later():
            try:
                await self._go_on(reply, continuation, place)
            except (UpstreamError, RequestError) as error:
                await self._leave(error, said := failures.verdict(error, of_chain=place.level > 0))
                if not self._may_go_on(said):
                    return False
            else:
                return True
        return False

    async def _go_on(self, reply: Reply, continuation: Continuation, place: Place) -> None:
        body = continuation.resume(self._asked.body) or self._asked.body
        answer, _, hide_usage = await self._send(place, msgspec.structs.replace(self._asked, body=body))
        if answer.status != 200 or not replies.is_stream(answer):
            raise BadGateway("The upstream does not continue what another one began.")
        reply.go_on(answer, continuation.splice(), hide_usage=hide_usage)
        self._exchange.resumed += 1


def _key(endpoint: Endpoint) -> Key:
    return endpoint.name, endpoint.since


def _patience(model: Model) -> float:
    """Return the seconds that the first token of a stream may take."""
    times = model.timeouts
    return times.first_byte if times.first_token is None else times.first_token


def _timeouts(model: Model, *, stream: bool) -> Timeouts:
    times = model.timeouts
    if not stream:
        return Timeouts(times.connect, times.first_byte, times.between_bytes)
    first = _patience(model)
    between = times.between_bytes if times.between_tokens is None else times.between_tokens
    return Timeouts(times.connect, first, between, first)
