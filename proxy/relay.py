"""Bytes out: the answer of an endpoint on its way to the client, and one close() that settles everything."""

from collections.abc import AsyncIterator, Callable
from time import perf_counter

from proxy import wire
from proxy.accounting import Account, DocumentAccount, NoAccount, StreamAccount
from proxy.balancer import Lease
from proxy.renaming import EventRenamer
from proxy.telemetry import FIRST_TOKEN, UNKNOWN, RequestFinished, RequestStarted, Sink, error_type
from proxy.transport import Answer

_EVENT_STREAM = b"text/event-stream"
_JSON = b"application/json"
# Of an upstream's server: ours says its own, and its cookies, certificates and addresses are not for our clients.
_SERVERS_OWN = frozenset(
    (b"date", b"server", b"via", b"x-powered-by", b"set-cookie", b"location", b"alt-svc", b"x-request-id",
     b"strict-transport-security", b"www-authenticate", b"openai-organization", b"openai-project",
     b"anthropic-organization-id", b"x-polyvox-model", b"x-polyvox-endpoint")
)  # fmt: skip
# Errors that say nothing of the endpoint.
_CLIENTS_OWN = frozenset(("upstream_4xx", "deadline_passed"))
_DOCUMENT_LIMIT = 256 * 1024 * 1024


class Exchange:
    """One request, from its arrival to its end. `close()` settles all that it holds, once, however it ended.

    Whoever handles the request says what happens; times are those of the moment it is said. Our overhead is the time
    between the request being here and being sent, and between the head of the answer being here and being passed on,
    without waiting for an engine that starts.
    """

    __slots__ = (
        "_account", "_answer", "_begun", "_clock", "_closed", "_error", "_first", "_lease", "_mark", "_overhead",
        "_sink", "_status", "_streamed", "_whole", "endpoint", "model", "operation",
    )  # fmt: skip

    def __init__(self, sink: Sink, operation: str, clock: Callable[[], float] = perf_counter) -> None:
        self._sink = sink
        self.operation = operation
        self._clock = clock
        # All mutable state. Who answers:
        self.model = UNKNOWN
        self.endpoint = ""
        # When it came, when its first token did, the seconds that we took, and the start of the next of them:
        self._begun = self._mark = clock()
        self._first: float | None = None
        self._overhead = 0.0
        # How it goes:
        self._status = 0
        self._error: str | None = None
        self._streamed = False
        self._whole = False
        self._closed = False
        # What is to be settled:
        self._lease: Lease | None = None
        self._answer: Answer | None = None
        self._account: Account | None = None

    def __repr__(self) -> str:
        return f"<Exchange {self.operation} {self.model} {self.endpoint or 'nowhere'} {self._account!r}>"

    def received(self) -> None:
        """The whole request is here."""
        self._begun = self._mark = self._clock()

    def waited(self) -> None:
        """What passed until now was waiting for others."""
        self._mark = self._clock()

    def hold(self, lease: Lease) -> None:
        """Whatever becomes of the request, it now has a lease to give back."""
        self._lease = lease

    def begin(self, endpoint: str, lease: Lease) -> None:
        """The request goes to an endpoint, now."""
        self.endpoint = endpoint
        self._lease = lease
        self._sink.started(RequestStarted(self.model, endpoint))
        self._overhead += self._clock() - self._mark

    def answered(self, answer: Answer) -> None:
        """The head of the answer is here."""
        self._answer = answer
        self._status = answer.status
        self._mark = self._clock()

    def passes(self, account: Account, *, streamed: bool) -> None:
        """The answer is about to pass, and will be read by an account."""
        self._account = account
        self._streamed = streamed
        self._overhead += self._clock() - self._mark

    def token(self) -> None:
        """The first token is here."""
        self._first = self._clock()
        if self._lease:
            self._lease.token(self._first)

    def fail(self, error: BaseException, status: int = 0) -> None:
        """Something went wrong, on our side or an endpoint's; the client going away is none of it."""
        self._error = error_type(error)
        self._status = status or self._status

    def complete(self) -> None:
        """The client has been given all of its answer."""
        self._whole = True

    async def close(self) -> None:
        """End the exchange, also in the middle, give back what it holds, tell of it. Only the first call counts."""
        if self._closed:
            return
        self._closed = True
        finished = self._finished()
        if self._lease:
            failed = finished.error is not None and finished.error not in _CLIENTS_OWN
            self._lease.release(self._clock(), failed=failed, tokens_in=finished.tokens_in)
        try:
            self._sink.finished(finished)
        finally:
            if self._answer:
                await self._answer.close()

    def _finished(self) -> RequestFinished:
        now, tally = self._clock(), self._account.tally if self._account else None
        usage = tally.usage if tally else None
        tokens_out = usage.tokens_out if usage else 0
        first = self._first if self._streamed else None
        return RequestFinished(
            model=self.model,
            endpoint=self.endpoint,
            operation=self.operation,
            status=self._status,
            error=self._failure(),
            finish_reason=((tally and tally.finish_reason) or "none") if self._whole else "abort",
            seconds=now - self._begun,
            to_first_token=None if first is None else first - self._begun,
            per_token=None if first is None or tokens_out < 2 else (now - first) / (tokens_out - 1),
            overhead=self._overhead if self._account else None,
            tokens_in=usage.tokens_in if usage else 0,
            tokens_out=tokens_out,
            tokens_cached=usage.cached if usage else 0,
        )

    def _failure(self) -> str | None:
        if self._error is None and self._status >= 400:
            return "upstream_4xx"
        if self._error is None and self._account and self._account.tally.failed:
            return "upstream_error_event"
        return self._error


class Reply:
    """An answer ready to be sent: status, headers, and a body whose bytes are sent as `read` gives them back.

    They are pulled by whoever sends them, since a layer between would cost as much as all the reading.
    """

    def __init__(
        self,
        exchange: Exchange,
        status: int,
        headers: list[tuple[bytes, bytes]],
        body: AsyncIterator[bytes],
        account: Account,
        change: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.is_event_stream = isinstance(account, StreamAccount)
        self._exchange = exchange
        self._account = account
        self._change = change
        # All mutable state: whether the first token is still to come.
        self._awaits_token = True
        exchange.passes(account, streamed=self.is_event_stream)

    def __repr__(self) -> str:
        return f"<Reply {self.status} {self._exchange!r}>"

    def read(self, data: bytes) -> bytes:
        """Take the next bytes of the body; return what is to be sent now, perhaps nothing."""
        data = self._account.feed(data)
        if self._awaits_token and self._account.begun:
            self._awaits_token = False
            self._exchange.token()
        return self._change(data) if self._change and data else data

    def end(self) -> bytes:
        """The body is complete: return what is still to be sent."""
        return self._changed(self._account.end())

    def broken(self) -> bytes:
        """The body will never be complete: return what may still be sent, which ends where an event does."""
        return self._changed(self._account.broken())

    def _changed(self, data: bytes) -> bytes:
        return self._change(data) if self._change else data


async def reply(answer: Answer, exchange: Exchange, rename: str | None, *, hide_usage: bool = False) -> Reply:
    """Make the reply to a client.

    rename: the `model` to write into the answer, None to leave it alone. hide_usage: a stream says what it used only
    because we asked. Without either every byte passes as it came; an event stream passes event by event, and a JSON
    document that needs a new name whole. Whatever is neither passes untouched.
    """
    headers = [(name, value) for name, value in answer.headers if name not in _SERVERS_OWN]
    kind = content_type(headers)
    if kind.startswith(_EVENT_STREAM):
        account = StreamAccount(hide_usage=hide_usage, first_token=FIRST_TOKEN.get(exchange.operation, b""))
        change = EventRenamer(rename) if rename is not None else None
        return Reply(exchange, answer.status, headers, answer, account, change)
    if not kind.startswith(_JSON):
        return Reply(exchange, answer.status, headers, answer, NoAccount())
    if rename is None:
        return Reply(exchange, answer.status, headers, answer, DocumentAccount())
    document = await answer.read(_DOCUMENT_LIMIT)
    exchange.waited()
    document = wire.set_model(document, rename)
    return Reply(exchange, answer.status, with_length(headers, len(document)), _once(document), DocumentAccount())


def content_type(headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return the value of Content-Type in lower case, or b""."""
    for name, value in headers:
        if name == b"content-type":
            return value.lower()
    return b""


def with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """Return headers with the Content-Length of another body."""
    others = [(name, value) for name, value in headers if name != b"content-length"]
    return [*others, (b"content-length", b"%d" % length)]


async def _once(document: bytes) -> AsyncIterator[bytes]:
    yield document
