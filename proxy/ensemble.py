"""Several models answer one request at the same time, and their answers become one.

1. Each member is asked as if it were alone, but for a chain: what stands in for one may be a member too.
2. Those that fail, are late or say nothing are left out. Fewer than the quorum are an error that tells why.
3. A strategy makes one answer of theirs (proxy/ensembles). Where a judge or writer fails, agreement decides.
4. The client gets an ordinary chat completion: usage and cost are sums, the details are under `ensemble`.
"""

import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec

from proxy import accounting, wire
from proxy import reply as replies
from proxy.accounting import Account, NoAccount
from proxy.asking import Asking, Place, Question, ask
from proxy.deadline import Deadline
from proxy.ensembles import choice, completion, confidence, consensus, first, framing, vote
from proxy.ensembles.answers import Answer, Verdict
from proxy.ensembles.completion import Ending, Written
from proxy.ensembles.settings import EnsembleSettings
from proxy.errors import BadRequest, PathNotServed, QuorumNotMet, UpstreamError
from proxy.providers import Asked
from proxy.relay import Exchange
from proxy.reply import Reply
from proxy.route import Ways

Fields = Mapping[str, msgspec.Raw]
Shuffled = Callable[[int], Sequence[int]]

CHAT = "/v1/chat/completions"
_ONE = frozenset((b"1", b"null"))
_NONE = frozenset((b"null", b"[]", b'"none"'))
_OFF = frozenset((b"null", b"false"))
_TRUE = msgspec.Raw(b"true")
# Of how the client gets its answer, which members are not told.
_CLIENTS = frozenset(("stream", "stream_options", "n"))


def shuffled(count: int) -> Sequence[int]:
    """Return 0 to `count` in any order."""
    return random.sample(range(count), count)


class FanOut:
    """One request for an ensemble."""

    def __init__(
        self, ways: Ways, settings: EnsembleSettings, asked: Asked, exchange: Exchange, place: Place,
        deadline: Deadline | None = None, order: Shuffled = shuffled,
    ) -> None:  # fmt: skip
        """place: finds the models behind a name. order: in which a judge sees the answers."""
        self._ways = ways
        self._settings = settings
        self._asked = asked
        self._exchange = exchange
        self._place = place
        self._deadline = deadline
        self._order = order
        self._name = asked.envelope.model
        # All mutable state: who was asked, who was asked last (a judge or writer), and why that was in vain.
        self._members: list[Asking] = []
        self._last: Asking | None = None
        self._fell_back: str | None = None

    def __repr__(self) -> str:
        return f"<FanOut {self._name} {self._members!r} {self._last!r}>"

    async def answer(self) -> Reply:
        """Return the reply to the client. Raises QuorumNotMet, and BadRequest for what one answer of several is not."""
        self._check()
        self._members = [self._ask(question) for question in self._questions()]
        await ask(self._members, self._settings.timeout, self._has_enough)
        answers = self._answers()
        if len(answers) < self._settings.quorum:
            failures = [asking.failure for asking in self._members if asking.failure]
            raise QuorumNotMet(self._name, self._settings.quorum, len(answers), failures)
        if self._settings.strategy == "fuse" and self._asked.envelope.stream:
            return await self._stream_written(answers)
        return self._chosen(answers, await self._verdict(answers))

    # Asking

    def _check(self) -> None:
        fields, strategy = self._asked.envelope.fields, self._settings.strategy
        if self._asked.path != CHAT:
            raise PathNotServed(self._asked.path, f"the ensemble {self._name!r}", [CHAT])
        if bytes(fields.get("n", b"1")) not in _ONE:
            raise BadRequest(f"n: the ensemble {self._name!r} gives one answer; send 1, or leave it out.", param="n")
        for name in ("tools", "functions"):
            if strategy == "fuse" and bytes(fields.get(name, b"null")) not in _NONE:
                raise BadRequest(
                    f"{name}: the ensemble {self._name!r} writes one text of several (strategy fuse), which cannot be "
                    "done with calls of tools; leave them out, or ask an ensemble of another strategy.", param=name
                )  # fmt: skip

    def _questions(self) -> list[Question]:
        fields = self._fields()
        plain = self._with(fields)
        more = None
        if self._settings.strategy == "confidence" and not self._shows_logprobs():
            more = self._with({**fields, "logprobs": _TRUE})
        return [
            Question(member, more or plain, weight, plain if more else None)
            for member, weight in self._settings.members.items()
        ]

    def _fields(self) -> Fields:
        return {name: value for name, value in self._asked.envelope.fields.items() if name not in _CLIENTS}

    def _with(self, fields: Fields, *, stream: bool = False) -> Asked:
        """Return the request with another body. It has the ensemble's name, so that answers come under that."""
        fields = {"model": msgspec.Raw(wire.encode(self._name)), **fields}
        if stream:
            fields["stream"] = _TRUE
        envelope = wire.Envelope(self._name, stream, fields)
        return msgspec.structs.replace(self._asked, body=wire.encode(fields), envelope=envelope)

    def _ask(self, question: Question) -> Asking:
        return Asking(self._ways, question, self._exchange.subrequest(), self._place, self._deadline)

    def _shows_logprobs(self) -> bool:
        return bytes(self._asked.envelope.fields.get("logprobs", b"null")) not in _OFF

    def _has_enough(self) -> bool:
        """Say whether waiting for more would change nothing: the first good answer is here, or no quorum can be."""
        failed = sum(asking.failure is not None for asking in self._members)
        if len(self._members) - failed < self._settings.quorum:
            return True
        return self._settings.strategy == "first" and any(answer.is_good for answer in self._answers())

    def _answers(self) -> list[Answer]:
        return [asking.answer for asking in self._members if asking.answer]

    # One answer of many

    async def _verdict(self, answers: Sequence[Answer]) -> Verdict:
        match self._settings.strategy:
            case "vote":
                return (vote.combine_objects(answers) if self._wants_json() else None) or vote.combine(answers)
            case "confidence":
                return confidence.combine(answers) or self._agreed(
                    answers, "No member tells how sure it is (logprobs)."
                )
            case "judge":
                return await self._judged(answers)
            case "fuse":
                return await self._written(answers)
            case "first":
                return first.combine(answers, [asking.seconds for asking in self._members if asking.answer])
        return consensus.combine(answers)

    def _wants_json(self) -> bool:
        return b'"json_' in bytes(self._asked.envelope.fields.get("response_format", b""))

    def _agreed(self, answers: Sequence[Answer], why: str) -> Verdict:
        """Return what agreement chooses, where something else should have."""
        self._fell_back = why
        return consensus.combine(answers)

    async def _judged(self, answers: Sequence[Answer]) -> Verdict:
        if len(answers) == 1:
            return Verdict(0)
        order = self._order(len(answers))
        shown = [answers[i] for i in order]
        judge = self._ask_last(self._settings.judge, framing.for_judge(self._fields(), shown))
        await ask([judge], self._settings.timeout, _never)
        picked = choice.read(judge.answer.text, len(answers)) if judge.answer else None
        if picked is None:
            return self._agreed(answers, _in_vain(judge, "It named no answer."))
        return Verdict(order[picked - 1])

    async def _written(self, answers: Sequence[Answer]) -> Verdict:
        writer = self._ask_last(self._settings.writer, framing.for_writer(self._fields(), answers))
        await ask([writer], self._settings.timeout, _never)
        return Verdict(None) if writer.answer else self._agreed(answers, _in_vain(writer))

    def _ask_last(self, name: str | None, fields: Fields, *, stream: bool = False) -> Asking:
        """Return the question to a judge or writer."""
        assert name, "the configuration has one for this strategy"
        self._last = self._ask(Question(name, self._with(fields, stream=stream), is_alone=True))
        return self._last

    # The reply

    def _chosen(self, answers: Sequence[Answer], verdict: Verdict) -> Reply:
        """Return the reply with the answer that was chosen, whole: as a document or as a stream."""
        stream = self._asked.envelope.stream
        found = answers[verdict.chosen] if verdict.chosen is not None else self._last and self._last.answer
        assert found
        answer = completion.with_content(found, verdict.content, keep_logprobs=self._shows_logprobs())
        ending = self._ending(answers, verdict)
        whole = completion.events(answer, ending) if stream else completion.document(answer, ending)
        self._exchange.waited()
        return self._labelled(replies.of_ours(self._exchange, whole, answer.finish_reason, streamed=stream))

    async def _stream_written(self, answers: Sequence[Answer]) -> Reply:
        writer = self._ask_last(self._settings.writer, framing.for_writer(self._fields(), answers), stream=True)
        reply = await writer.open(self._settings.timeout)
        if reply is None:
            return self._chosen(answers, self._agreed(answers, _in_vain(writer)))
        self._exchange.waited()
        account = NoAccount()
        body = self._passing(answers, writer, reply, account)
        return self._labelled(replies.stream_of_ours(self._exchange, body, account))

    async def _passing(
        self, answers: Sequence[Answer], writer: Asking, reply: Reply, account: Account
    ) -> AsyncIterator[bytes]:
        """Pass what is written on, and what there is to tell of it before its end."""
        written = Written()
        async for data in reply.mended():
            if passing := written.feed(data):
                yield passing
        account.tally.finish_reason = written.finish_reason
        if written.is_whole and not writer.exchange.failed:
            await writer.close()
            yield written.end(self._ending(answers, Verdict(None)))
        else:
            self._exchange.fail(UpstreamError())

    def _labelled(self, reply: Reply) -> Reply:
        attempts = sum(asking.exchange.attempts for asking in self._everybody())
        reply.headers += [
            (b"x-polyvox-model", self._name.encode()),
            (b"x-polyvox-fallback-level", b"0"),
            (b"x-polyvox-attempts", b"%d" % attempts),
        ]
        return reply

    def _everybody(self) -> list[Asking]:
        return [*self._members, self._last] if self._last else self._members

    def _ending(self, answers: Sequence[Answer], verdict: Verdict) -> Ending:
        exchange, envelope = self._exchange, self._asked.envelope
        shown = not envelope.stream or accounting.asks_usage(bytes(envelope.fields.get("stream_options", b"")))
        usage = completion.total([asking.exchange.usage for asking in self._everybody()]) if shown else None
        scores = dict(zip([answer.member for answer in answers], verdict.scores, strict=False))
        details = {
            "strategy": self._settings.strategy,
            "chosen": None if verdict.chosen is None else answers[verdict.chosen].member,
            **({"fell_back": self._fell_back} if self._fell_back else {}),
            **verdict.details,
            "answers": [_of_member(asking, scores.get(asking.question.name)) for asking in self._members],
        }
        if self._last:
            details["judge" if self._settings.judge else "writer"] = _told(self._last)
        return Ending(self._name, details, usage, exchange.usd() if exchange.shows_cost else None)


def _never() -> bool:
    return False


def _in_vain(last: Asking, otherwise: str = "") -> str:
    """Say why what a judge or writer was asked for did not come."""
    why = last.failure.message if last.failure else otherwise
    return f"{last.question.name!r} was of no help: {why} So agreement decided."


def _told(asking: Asking) -> dict[str, object]:
    """Return what the details say of anybody who was asked."""
    exchange = asking.exchange
    told: dict[str, object] = {
        "model": exchange.model,
        "status": asking.condition,
        "seconds": round(asking.seconds, 3),
    }
    if asking.failure:
        return {**told, "error": asking.failure.message}
    if asking.condition != "answered":
        return told
    return {**told, "usage": completion.tokens(exchange.usage), "cost": exchange.usd()}


def _of_member(asking: Asking, score: float | None) -> dict[str, object]:
    """Return what the details say of a member."""
    question, answer = asking.question, asking.answer
    told: dict[str, object] = {"member": question.name, "weight": question.weight, **_told(asking)}
    if answer is None:
        return told
    told |= {"answer": answer.text, "finish_reason": answer.finish_reason, "score": score}
    return {**told, "calls": answer.calls} if answer.calls else told
