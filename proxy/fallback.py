"""Walks from endpoint to endpoint until one answers; goes on with a stream elsewhere when its endpoint breaks.

One walk is for one request. An attempt is made at

1. the endpoints of the model that was asked for, each once;
2. those of the models of its chain, in their order;
3. all of them again, after a moment, where what was wrong may pass by itself: three times, once for a broken stream;
4. an engine that is starting, once it has started.

What has been sent to an endpoint in vain is paid from the retry budget. Nothing is sent to the client before the first
token, or the whole of a document, is here. After it, a stream that breaks goes on at an endpoint that can continue it.
"""

from collections.abc import Sequence

import msgspec

from proxy import failures, prompts, providers
from proxy import reply as replies
from proxy.balancer import Lease, Prompt
from proxy.breaker import Outcome
from proxy.continuation import COMPLETIONS, Continuation
from proxy.deadline import Deadline
from proxy.endpoints import Standing
from proxy.errors import (
    BadGateway,
    ErrorEvent,
    RequestError,
    UpstreamError,
    UpstreamFailed,
    upstream_failure,
)
from proxy.failures import Verdict
from proxy.prompts.adapters import Adapter
from proxy.providers import Asked
from proxy.registry import Endpoint, Model
from proxy.relay import Exchange
from proxy.reply import Cut, Patience, Reply
from proxy.route import Place, Route, Ways
from proxy.transport import Answer, Timeouts

_TOO_LONG = frozenset((400, 413))  # what engines answer to a prompt that is longer than their context, among others
_MOST_BREAKS = 8  # of one stream; whatever it is that ends its engines, it is not to end more of them
_AT_FIRST = ((b"x-polyvox-fallback-level", b"0"), (b"x-polyvox-attempts", b"1"))


class Walk:
    """The attempts of one request. What an attempt takes is the exchange's to give back."""

    __slots__ = (
        "_asked", "_at", "_blamed", "_breaks", "_chosen", "_clamped", "_deadline", "_endpoint", "_exchange", "_first",
        "_of", "_route", "_ways", "_whole",
    )  # fmt: skip

    def __init__(
        self, ways: Ways, asked: Asked, model: Model, chain: Sequence[str], exchange: Exchange,
        deadline: Deadline | None = None, *, chosen: bool = False, whole: bool = False,
    ) -> None:  # fmt: skip
        """chain: names of models. deadline: of which an endpoint is told, if it wants to be.

        chosen: the model is none that the client asked for, so that what it cannot be asked another may. whole: streams
        keep their usage, whether the client asked for it or not.
        """
        self._ways = ways
        self._deadline = deadline
        self._chosen = chosen
        self._asked = asked
        self._exchange = exchange
        self._whole = whole
        # All mutable state: where it has been; of the last attempt, the model that it was for, the endpoint as it was
        # then (None: it got none), how that stands, and what was asked for that it cannot do.
        self._route = Route(ways, asked.envelope.fields, model, chain)
        self._of = model
        self._endpoint: Endpoint | None = None
        self._at: Standing | None = None
        self._clamped: tuple[str, ...] = ()
        # What the client is told, or given, if nothing helps; how often the stream broke; where the request has failed.
        self._first: Exception | Reply | None = None
        self._breaks = 0
        self._blamed: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"<Walk {self._exchange.attempts} attempts, {self._route!r}>"

    async def answer(self) -> Reply:
        """Return the first answer that is one, or the error that no other endpoint can better. Raises the same."""
        self._ways.endpoints.budget(self._route.model).earn()
        while place := self._route.find() or await self._later():
            try:
                reply = await self._attempt(place)
            except (UpstreamError, RequestError) as error:
                await self._leave(error, said := failures.verdict(error, of_chain=self._chosen or place.level > 0))
                if not self._may_go_on(said):
                    break
            else:
                if reply.status < 400 or not await self._passes_over(reply):
                    return self._labelled(reply)
        return self._last_word()

    async def _later(self) -> Place | None:
        place = await self._route.later()
        self._exchange.waited()
        return place

    # One attempt

    async def _attempt(self, place: Place) -> Reply:
        """Return an answer that may be sent. Raises UpstreamError or RequestError where there is none."""
        try:
            return await self._reply(place)
        except ErrorEvent as error:
            if (status := failures.status_of(error)) is None:
                raise
            assert self._endpoint
            return replies.refusal(status, failures.masked(error.document, self._endpoint), self._exchange)

    async def _reply(self, place: Place) -> Reply:
        """Raises ErrorEvent for an error inside of a 200."""
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
        if self._route.leads_elsewhere(place.model):
            reply.continuation = Continuation.of(self._asked.path, self._asked.envelope.fields)
        patience = self._patience(place.model)
        await reply.open(started + patience.first_token, patience)
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
        endpoint, breaker = standing.endpoint, standing.breaker
        self._at, self._endpoint = standing, endpoint
        self._clamped = ()
        if endpoint.adapter is not None:
            asked = self._adapted(asked, endpoint.adapter)
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
        return provider.answer(answer, asked, endpoint), endpoint, sent.hide_usage and not self._whole

    def _adapted(self, asked: Asked, adapter: Adapter) -> Asked:
        adapted = prompts.adapt(asked.path, asked.body, adapter)
        self._clamped = adapted.clamped
        return asked if adapted.body is asked.body else msgspec.structs.replace(asked, body=adapted.body)

    def _prompt(self, model: Model) -> Prompt | None:
        """Return the prompt as the balancer wants it, where there is a choice of endpoints."""
        if len(model.endpoints) < 2:
            return None
        asked = self._asked
        return self._ways.admission.prompt(model.name, asked.envelope.fields, asked.salt, len(asked.body))

    async def _queue(self, place: Place, prompt: Prompt | None) -> tuple[Standing, Lease]:
        """All that may be asked have as many requests as they may have: wait for one. Raises TooBusy."""
        name, streamed = place.model.name, self._asked.envelope.stream
        self._endpoint = None
        try:
            return await self._ways.admission.wait(name, lambda: self._route.still_there(name), prompt, streamed)
        except RequestError:
            self._route.pass_over([s.endpoint for s in place.candidates])
            raise
        finally:
            self._exchange.waited()

    async def _leave(self, error: Exception | None, said: Verdict) -> None:
        """The attempt has failed, with an error or (None) an answer that says so: settle it, and remember it."""
        if self._endpoint is not None:
            self._route.pass_over([self._endpoint], again=said.again)
        if isinstance(error, UpstreamFailed) and error.retry_after:
            self._rest(error.retry_after)
        await self._exchange.retreat(error, self._blame(said.outcome))
        if self._first is None:
            self._first = error

    def _blame(self, outcome: Outcome) -> Outcome:
        """Return what an outcome says of the endpoint: one request, however often it is tried, is one failure."""
        if outcome is not Outcome.FAILURE or self._endpoint is None:
            return outcome
        if self._endpoint.name in self._blamed:
            return Outcome.NEUTRAL
        self._blamed |= {self._endpoint.name}
        return outcome

    def _rest(self, seconds: float | None) -> None:
        assert self._at
        self._ways.endpoints.rest(self._at, seconds)

    def _may_go_on(self, said: Verdict) -> bool:
        """Say whether another attempt makes sense, and is within the budget."""
        if not said.elsewhere:
            return False
        endpoints = self._ways.endpoints
        return not said.sent or endpoints.budget(self._route.model).spend(endpoints.clock())

    async def _passes_over(self, reply: Reply) -> bool:
        """Say whether an answer that is an error is left aside, since another endpoint may give a better one."""
        assert self._endpoint
        if failures.is_busy(reply.status):
            self._rest(failures.retry_after(reply.headers))
        elif reply.status not in _TOO_LONG or not self._route.is_too_long_for(self._of):
            return False
        self._route.pass_over([self._endpoint])
        if self._route.find() is None or not self._may_go_on(failures.BUSY):
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
        if self._clamped:
            reply.headers += ((b"x-polyvox-adapted", ", ".join(self._clamped).encode()),)
        return reply

    def _last_word(self) -> Reply:
        """Return the answer that was left aside, or raise what went wrong first."""
        first = self._first
        if isinstance(first, Reply):
            self._exchange.answers(first.status)
            return self._labelled(first)
        raise first or self._route.unavailable()

    # A stream that breaks

    async def mend(self, reply: Reply, error: UpstreamError) -> tuple[bytes, bool]:
        """See Reply.mend. Raises UpstreamError where streams are kept whole, as their end is then not ours to write.

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
        if self._whole:
            raise error
        return rest + reply.error_event(upstream_failure(error)), False

    async def _resume(self, reply: Reply, continuation: Continuation, broken: Verdict) -> bool:
        """Have another endpoint go on with a stream, or the same after a moment; say whether one does."""
        body = self._asked.body
        resumed = continuation.resume(body)
        self._breaks += 1
        if resumed is None or self._breaks > _MOST_BREAKS:
            return False
        self._route.must_continue = resumed is not body and self._asked.path != COMPLETIONS
        if reply.has_moved:  # those that failed before are as good as any
            assert self._endpoint
            self._route.begin_anew(self._endpoint, again=broken.again)
        elif not self._may_go_on(failures.BUSY):
            return False
        while place := self._route.find() or await self._later():
            try:
                await self._go_on(reply, continuation, resumed, place)
            except (UpstreamError, RequestError) as error:
                await self._leave(error, said := failures.verdict(error, of_chain=self._chosen or place.level > 0))
                if not self._may_go_on(said):
                    return False
            else:
                return True
        return False

    async def _go_on(self, reply: Reply, continuation: Continuation, body: bytes, place: Place) -> None:
        answer, _, hide_usage = await self._send(place, msgspec.structs.replace(self._asked, body=body))
        if answer.status != 200 or not replies.is_stream(answer):
            raise BadGateway("The upstream does not continue what another one began.")
        reply.go_on(answer, continuation.splice(), self._patience(place.model), hide_usage=hide_usage)
        self._exchange.resumed += 1

    def _patience(self, model: Model) -> Patience:
        return Patience(*_for_tokens(model), self._ways.endpoints.clock)


def _for_tokens(model: Model) -> tuple[float, float]:
    """Return the seconds that the first token of a stream may take, and each that follows."""
    times = model.timeouts
    return (
        times.first_byte if times.first_token is None else times.first_token,
        times.between_bytes if times.between_tokens is None else times.between_tokens,
    )


def _timeouts(model: Model, *, stream: bool) -> Timeouts:
    times = model.timeouts
    if not stream:
        return Timeouts(times.connect, times.first_byte, times.between_bytes)
    first, between = _for_tokens(model)
    return Timeouts(times.connect, first, between, first)
