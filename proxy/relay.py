"""The settlement of one request: who has it, when what happened, and one close() that gives everything back."""

from collections.abc import Callable
from time import monotonic
from typing import Protocol

from proxy.accounting import Account, Usage
from proxy.balancer import Lease
from proxy.breaker import Breaker, Outcome, State
from proxy.prices import Prices
from proxy.telemetry import UNKNOWN, AttemptFailed, RequestFinished, RequestStarted, Sink, error_type
from proxy.transport import Answer

_CLOSED = State.CLOSED
_SUCCESS, _NEUTRAL = Outcome.SUCCESS, Outcome.NEUTRAL


class Shared(Protocol):
    """A generation that several requests wait for."""

    def leave(self, member: object) -> bool:
        """One of them does not wait any more. Say whether it goes on, for others."""
        ...


class Exchange:
    """One request, from its arrival to its end. `close()` settles all that it holds, once, however it ended.

    Whoever handles the request says what happens; times are those of the moment it is said. Our overhead is the time
    between the request being here and being sent, and between the head of the answer being here and being passed on,
    without waiting for an engine that starts.

    A request may be sent several times. Each attempt, from `begin` on, has its lease, its breaker and its gauge settled
    once: by `retreat`, after which another may begin, or by `close`.
    """

    __slots__ = (
        "_account", "_answer", "_begun", "_breaker", "_broken", "_charged", "_clock", "_closed", "_error", "_first",
        "_lease", "_mark", "_overhead", "_prices", "_sent", "_shared", "_sink", "_status", "_streamed", "_subrequests",
        "_ticket", "_under_way", "_usd", "_whole", "alias", "attempts", "cache", "endpoint", "key_id", "level", "model",
        "on_prompt", "operation", "request_id", "resumed", "shows_cost", "source",
    )  # fmt: skip

    def __init__(
        self,
        sink: Sink,
        operation: str,
        clock: Callable[[], float] = monotonic,
        prices: Prices | None = None,
        request_id: bytes = b"",
    ) -> None:
        self._sink = sink
        self.operation = operation
        self._clock = clock
        self._prices = prices
        self.request_id = request_id
        # All mutable state. Who asks, and for which name:
        self.key_id = ""
        self.alias = ""
        self.shows_cost = False  # in the usage of its stream
        # Who is told the model that answered, and the tokens of its prompt:
        self.on_prompt: Callable[[str, int], None] | None = None
        # Who answers, after how many models of a chain were passed over, at the which attempt:
        self.model = UNKNOWN
        self.endpoint = ""
        self.level = 0
        self.attempts = 0
        self.resumed = 0  # times that the answer went on elsewhere
        # What the cache did for it, and which endpoint had given the answer that it got from there:
        self.cache = ""
        self.source = ""
        # When it came, was last sent to an endpoint, and had its first token; the seconds that we took, and the start
        # of the next of them:
        self._begun = self._sent = self._mark = clock()
        self._first: float | None = None
        self._overhead = 0.0
        # How it goes:
        self._status = 0
        self._charged = False  # from when on it is known what it costs, or that nobody knows
        self._usd: float | None = None
        self._broken: tuple[tuple[str, str], ...] = ()  # model and endpoint of streams that went on elsewhere
        self._error: str | None = None
        self._streamed = False
        self._whole = False
        self._closed = False
        # What is to be settled: of the attempt, which is under way once it is sent, and of all.
        self._lease: Lease | None = None
        self._under_way = False
        self._breaker: Breaker | None = None
        self._ticket = 0
        self._answer: Answer | None = None
        self._account: Account | None = None
        # What it waits for together with others, and whether that needs it until it ends.
        self._shared: tuple[Shared, bool] | None = None
        # Requests that are made for this one:
        self._subrequests: tuple[Exchange, ...] = ()

    def __repr__(self) -> str:
        return f"<Exchange {self.operation} {self.model} {self.endpoint or 'nowhere'} {self._account!r}>"

    def shares(self, shared: Shared, *, leads: bool) -> None:
        """It waits for a generation together with others. leads: by this exchange, which ends only with that."""
        self._shared = shared, leads

    def parts(self) -> None:
        """It waits together with others no longer."""
        if self._shared is not None:
            (shared, _), self._shared = self._shared, None
            shared.leave(self)

    def subrequest(self) -> "Exchange":
        """Return the exchange of a request that is made for this one, and ends with it at the latest.

        Tokens and cost are counted there, and here not again.
        """
        made = Exchange(self._sink, self.operation, self._clock, self._prices, self.request_id)
        made.key_id, made.alias = self.key_id, self.alias
        self._subrequests += (made,)
        return made

    @property
    def usage(self) -> Usage | None:
        """The tokens of the answer so far, None if it has not told them."""
        return self._account.tally.usage if self._account else None

    @property
    def failed(self) -> bool:
        """Whether something went wrong, that is not the client's going away."""
        return self._failure() is not None

    def received(self) -> None:
        """The whole request is here."""
        self._begun = self._mark = self._clock()

    def waited(self) -> None:
        """What passed until now was waiting for others."""
        self._mark = self._clock()

    def hold(self, lease: Lease) -> None:
        """Whatever becomes of the request, it now has a lease to give back."""
        self._lease = lease

    def begin(self, endpoint: str, breaker: Breaker | None = None, ticket: int = 0) -> None:
        """The request goes to an endpoint, now, by the lease that is held. ticket: of the breaker, for this attempt."""
        self.attempts += 1
        self.endpoint = endpoint
        self._breaker = breaker
        self._ticket = ticket
        self._under_way = True
        self._sink.started(RequestStarted(self.model, endpoint))
        self._sent = self._clock()
        self._overhead += self._sent - self._mark

    async def retreat(self, error: BaseException | None, outcome: Outcome) -> None:
        """The attempt has failed, with an error or (None) an answer that says so. Another may follow."""
        was_under_way = self._under_way
        self._settle(outcome)
        if was_under_way:
            kind = "upstream_4xx" if error is None else error_type(error) or "internal_error"
            self._sink.failed(AttemptFailed(self.model, self.endpoint, kind))
            if self._first is not None:
                self._broken += ((self.model, self.endpoint),)
        if self._answer:
            await self._answer.close()
            self._answer = None
        self._mark = self._clock()

    def answered(self, answer: Answer) -> None:
        """The head of the answer is here."""
        self._answer = answer
        self._status = answer.status
        self._mark = self._clock()

    def answers(self, status: int) -> None:
        """What the client gets is an answer that was put aside before."""
        self._status = status

    def passes(self, account: Account, *, streamed: bool) -> None:
        """The answer is about to pass, and will be read by an account."""
        self._account = account
        self._streamed = streamed
        self._overhead += self._clock() - self._mark

    def token(self) -> None:
        """The first token is here, or that of an endpoint with which the answer goes on."""
        now = self._clock()
        if self._first is None:
            self._first = now
        if self._lease:
            self._lease.token(now)
        if self._breaker and self._breaker.state is not _CLOSED:
            self._ticket = self._breaker.record(Outcome.SUCCESS, now, self._ticket)

    def usd(self) -> float | None:
        """Return what the request costs, by what is known now; None where price or tokens are not.

        Of requests that were made for this one, those count that were answered: what the others used nobody tells.
        Of a stream that went on elsewhere, the tokens of all its engines are in its usage, but that each engine has
        read the prompt is not.
        """
        if self._subrequests:
            return self._sum()
        if not self._charged:
            self._charged = True
            self._usd = self._charge(self._account.tally.usage if self._account else None)
        return self._usd

    def _sum(self) -> float | None:
        known = [made.usd() for made in self._subrequests if made._whole]
        return None if None in known else sum(usd or 0.0 for usd in known)

    def _charge(self, usage: Usage | None) -> float | None:
        if usage is not None and self.source:
            return 0.0
        if usage is not None:
            return self.cost(usage)
        # Nobody has done anything for it, or asks anything for it; or else nobody knows.
        return 0.0 if not self.attempts or self._status >= 400 else None

    def cost(self, usage: Usage) -> float | None:
        """Return what the request costs if this is what it used."""
        if self._prices is None:
            return None
        usd = self._prices.cost(self.model, self.endpoint, usage, self._clock() - self._sent)
        if self._broken:
            prompts = [self._prices.cost(model, endpoint, Usage(usage.tokens_in)) for model, endpoint in self._broken]
            known = [prompt for prompt in prompts if prompt is not None]
            return None if usd is None or len(known) < len(prompts) else usd + sum(known)
        return usd

    def fail(self, error: BaseException, status: int = 0) -> None:
        """Something went wrong, on our side or an endpoint's; the client going away is none of it."""
        self._error = error_type(error)
        self._status = status or self._status

    def complete(self) -> None:
        """The client has been given all of its answer."""
        self._whole = True

    async def close(self) -> None:
        """End the exchange, also in the middle, give back what it holds, tell of it. Only the first call counts.

        One that leads a generation which others wait for ends with that, which calls this once more.
        """
        if self._closed:
            return
        if self._shared is not None:
            (shared, leads), self._shared = self._shared, None
            if shared.leave(self) and leads:
                return
        self._closed = True
        finished = self._finished()
        well = self._whole and self._status < 400 and self._error is None
        self._settle(_SUCCESS if well else _NEUTRAL, finished.tokens_in)
        if self.on_prompt and finished.tokens_in and not self._broken:
            self.on_prompt(self.model, finished.tokens_in)
        try:
            self._sink.finished(finished)
        finally:
            if self._answer:
                await self._answer.close()
            for made in self._subrequests:
                await made.close()

    def _settle(self, outcome: Outcome, tokens_in: int = 0) -> None:
        lease, self._lease = self._lease, None
        now = self._clock()
        if lease:
            lease.release(now, failed=outcome is Outcome.FAILURE, tokens_in=tokens_in)
        if self._under_way and self._breaker:
            self._breaker.record(outcome, now, self._ticket)
        self._under_way = False

    def _finished(self) -> RequestFinished:
        now, tally = self._clock(), self._account.tally if self._account else None
        usage = tally.usage if tally else None
        tokens_out = usage.tokens_out if usage else 0
        first = self._first if self._streamed else None
        # By position: that takes a sixth of the time that names do.
        return RequestFinished(
            self.model,
            self.endpoint,
            self.operation,
            self._status,
            self._failure(),
            ((tally and tally.finish_reason) or "none") if self._whole else "abort",
            now - self._begun,
            None if first is None else first - self._begun,
            None if first is None or tokens_out < 2 else (now - first) / (tokens_out - 1),
            self._overhead if self._account else None,
            usage.tokens_in if usage else 0,
            tokens_out,
            usage.cached if usage else 0,
            self._under_way,
            self.level,
            self.resumed,
            self._usd if self._charged else self._charge(usage),
            self.attempts,
            self.alias,
            self.key_id,
            self.request_id,
            self.cache,
            self._saved(usage) if self.source else None,
        )

    def _saved(self, usage: Usage | None) -> float | None:
        """Return what the request would have cost where the answer came from that the cache gave."""
        if usage is None or self._prices is None:
            return None
        return self._prices.cost(self.model, self.source, usage)

    def _failure(self) -> str | None:
        if self._error is None and self._status >= 400:
            return "upstream_4xx"
        if self._error is None and self._account and self._account.tally.failed:
            return "upstream_error_event"
        return self._error
