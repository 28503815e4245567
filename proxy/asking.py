"""One model that is asked for another request's sake, and what came of it."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import msgspec

from proxy.breaker import Outcome
from proxy.deadline import Deadline
from proxy.ensembles import answers
from proxy.ensembles.answers import Answer
from proxy.errors import (
    GatewayTimeout,
    MalformedAnswer,
    MemberFailure,
    RequestError,
    UpstreamError,
    upstream_failure,
)
from proxy.fallback import Walk
from proxy.providers import Asked
from proxy.relay import Exchange
from proxy.reply import Reply
from proxy.route import Ways
from proxy.routing.placing import Placed

Condition = Literal["asked", "answered", "failed", "late", "not needed"]

_WRONG = frozenset((400, 422))  # what servers say of a field that they do not take
_LONGEST = 300  # characters of an upstream's words


class Question(msgspec.Struct, frozen=True):
    """Who is asked, and what. weight: of the answer. plain: the same without what not every server takes, if it has it.

    is_alone: nobody else is asked this, so that whoever stands in for the model may be.
    """

    name: str
    asked: Asked
    weight: float = 1.0
    plain: Asked | None = None
    is_alone: bool = False


Place = Callable[[str, Asked], Placed]


class Asking:
    """A question on its way. Whatever is taken for it is given back when it is over, also by cancellation."""

    def __init__(
        self, ways: Ways, question: Question, exchange: Exchange, place: Place, deadline: Deadline | None
    ) -> None:
        """exchange: of this question alone."""
        self.question = question
        self.exchange = exchange
        self._ways = ways
        self._place = place
        self._deadline = deadline
        self._begun = ways.endpoints.clock()
        # All mutable state: how it goes, what there is of an answer, why there is none, how long it took.
        self.condition: Condition = "asked"
        self.answer: Answer | None = None
        self.failure: MemberFailure | None = None
        self.seconds = 0.0

    def __repr__(self) -> str:
        return f"<Asking {self.question.name} {self.condition} {self.exchange!r}>"

    async def run(self) -> None:
        """Have an answer, whole. That there is none is noted, and not raised."""
        try:
            self.answer = await self._answer()
            self._succeed()
        except (RequestError, UpstreamError) as error:
            self._fail(error)
        finally:
            await self._end()

    async def open(self, seconds: float) -> Reply | None:
        """Have a stream begin; return it once its first token is here, None where there is none, which is noted.

        It is settled by `close` when it has been passed on.
        """
        reply = None
        bounds = asyncio.timeout(seconds)
        try:
            async with bounds:
                reply = await self._opened()
        except TimeoutError:
            if not bounds.expired():
                raise
            self.leave(seconds)
        except (RequestError, UpstreamError) as error:
            self._fail(error)
        finally:
            if reply is None:
                await self._end()
        return reply

    async def close(self) -> None:
        """The stream has been passed on."""
        if not self.exchange.failed:
            self._succeed()
        await self._end()

    def leave(self, late: float | None) -> None:
        """No more is waited for: it is late by so many seconds, or (None) there is an answer already."""
        if late is None:
            self.condition = "not needed"
        else:
            self._fail(GatewayTimeout(f"It took longer than {late:g} s."))
            self.condition = "late"

    async def _answer(self) -> Answer | None:
        """Return the answer, None if the server refuses to give one. Raises RequestError, UpstreamError."""
        question = self.question
        try:
            reply = await self._walk(question.asked)
        except RequestError as error:
            if question.plain is None or error.status not in _WRONG:
                raise
            reply = await self._walk(question.plain)
        if question.plain is not None and reply.status in _WRONG:
            await self.exchange.retreat(None, Outcome.NEUTRAL)
            reply = await self._walk(question.plain)
        if self._is_refused(reply):
            return None
        if reply.body is not None:
            raise MalformedAnswer("it is no document")
        return answers.read(reply.document, question.name, question.weight)

    async def _opened(self) -> Reply | None:
        reply = await self._walk(self.question.asked)
        if self._is_refused(reply):
            return None
        if not reply.is_event_stream:
            raise MalformedAnswer("it is no stream")
        return reply

    async def _walk(self, asked: Asked) -> Reply:
        placed = self._place(self.question.name, asked)
        if self.question.plain and placed.model.capabilities.logprobs is False:
            placed = self._place(self.question.name, self.question.plain)
        chain = placed.chain if self.question.is_alone else placed.alternatives
        self.exchange.model, self.exchange.on_prompt = placed.model.name, placed.learn
        walk = Walk(self._ways, placed.asked, placed.model, chain, self.exchange, self._deadline, chosen=placed.chosen)
        return await walk.answer()

    def _is_refused(self, reply: Reply) -> bool:
        """Say whether a reply is an error, and note it. It is the client's, whose words may be shown."""
        if reply.status < 400:
            return False
        self._note(reply.status, _words(reply.document) or f"The upstream refused with status {reply.status}.")
        return True

    def _succeed(self) -> None:
        if self.failure is None and self.answer is not None and self.answer.is_empty:
            self._note(502, "The answer is empty.")
            self.answer = None
        elif self.failure is None:
            self.condition = "answered"
        self.exchange.complete()

    def _fail(self, error: RequestError | UpstreamError) -> None:
        shown = error if isinstance(error, RequestError) else upstream_failure(error)
        self.exchange.fail(error, shown.status)
        self._note(shown.status, str(shown))

    def _note(self, status: int, message: str) -> None:
        self.condition = "failed"
        self.failure = MemberFailure(self.question.name, status, message)

    async def _end(self) -> None:
        self.seconds = self._ways.endpoints.clock() - self._begun
        await self.exchange.close()


async def ask(askings: Sequence[Asking], seconds: float, enough: Callable[[], bool]) -> None:
    """Have all asked at the same time, until all are over, or enough is there, or the time is.

    Those that are not over then are cancelled, and so are all if this is.
    """
    tasks = {asyncio.create_task(asking.run()): asking for asking in askings}
    bounds = asyncio.timeout(seconds)
    try:
        async with bounds:
            await _wait(tasks, enough)
    except TimeoutError:
        if not bounds.expired():
            raise
    finally:
        await _cancel(tasks, seconds if bounds.expired() else None)


async def _wait(tasks: Collection[asyncio.Task[None]], enough: Callable[[], bool]) -> None:
    pending = set(tasks)
    while pending and not enough():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


async def _cancel(tasks: Mapping[asyncio.Task[None], Asking], late: float | None) -> None:
    """Cancel what is not over, and wait until all is given back. late: the seconds that were too long, if they were."""
    for task, asking in tasks.items():
        if not task.done():
            asking.leave(late)
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Error(msgspec.Struct, frozen=True):
    message: str = ""


class _Refusal(msgspec.Struct, frozen=True):
    error: _Error = _Error()
    message: str = ""


def _words(document: bytes) -> str:
    """Return what an error of OpenAI's or vLLM's form says, "" where it is none."""
    try:
        told = msgspec.json.decode(document, type=_Refusal)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return (told.error.message or told.message)[:_LONGEST]
