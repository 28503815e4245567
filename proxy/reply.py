"""Bytes out: the answer of an endpoint on its way to the client."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from proxy import sse, wire
from proxy.accounting import Account, DocumentAccount, NoAccount, StreamAccount, Tally
from proxy.continuation import Continuation
from proxy.errors import (
    BetweenBytesTimeout,
    ErrorEvent,
    FirstTokenTimeout,
    MalformedAnswer,
    RequestError,
    TruncatedAnswer,
    UpstreamError,
)
from proxy.relay import Exchange
from proxy.renaming import EventRenamer
from proxy.splice import Splice
from proxy.telemetry import FIRST_TOKEN, TELLS
from proxy.transport import Answer, content_type

Headers = list[tuple[bytes, bytes]]

_EVENT_STREAM = b"text/event-stream"
_JSON = b"application/json"
# Of an upstream's server: ours says its own, and its cookies, certificates and addresses are not for our clients.
_SERVERS_OWN = frozenset(
    (b"date", b"server", b"via", b"x-powered-by", b"set-cookie", b"location", b"alt-svc", b"x-request-id",
     b"strict-transport-security", b"www-authenticate", b"openai-organization", b"openai-project",
     b"anthropic-organization-id", b"x-polyvox-model", b"x-polyvox-endpoint", b"x-polyvox-fallback-level",
     b"x-polyvox-attempts", b"x-polyvox-cost", b"x-polyvox-cache", b"x-polyvox-cache-key")
)  # fmt: skip
_RENAMED_LIMIT = 256 * 1024 * 1024  # bytes of a document that must be held whole to be changed
_HELD_LIMIT = 1024 * 1024  # bytes of one that is held whole so that another endpoint can still answer; of any error
_OPENING_LIMIT = 256 * 1024  # bytes of a stream that are held before its first token

Mend = Callable[["Reply", UpstreamError], Awaitable[tuple[bytes, bool]]]


class Patience(NamedTuple):
    """How long a stream may say nothing, whatever comes: seconds to its first token, and between two of them.

    clock: a monotonic one.
    """

    first_token: float
    between_tokens: float
    clock: Callable[[], float]


class Cut(Exception):
    """The rest of a body that was begun cannot come."""


class Reply:
    """An answer ready to be sent: status and headers; then either `document`, or `opening` and a body.

    The bytes of a body are sent as `read` gives them back: they are pulled by whoever sends them, since a layer between
    would cost as much as all the reading. When the body breaks, `mend` says how it goes on.
    """

    __slots__ = (
        "_account", "_accounts", "_awaits_token", "_exchange", "_latest", "_patience", "_splice", "_still_since",
        "_tells", "body", "change", "continuation", "document", "has_moved", "headers", "is_event_stream", "mending",
        "opening", "status",
    )  # fmt: skip

    def __init__(
        self,
        exchange: Exchange,
        status: int,
        headers: Headers,
        account: Account,
        body: AsyncIterator[bytes] | None,
        *,
        accounts: bool = True,
    ) -> None:
        """accounts: what the account reads is that of the exchange, which has no other."""
        self.status = status
        self.headers = headers
        self.is_event_stream = isinstance(account, StreamAccount)
        self._exchange = exchange
        self._account = account
        self._accounts = accounts
        # What it is made of, said once: how its bytes are changed, who knows how it goes on, and what that needs.
        self.change: Callable[[bytes], bytes] | None = None
        self.mending: Mend | None = None
        self.continuation: Continuation | None = None
        self._tells = b""
        # All mutable state: what there is of the answer, what another endpoint's bytes pass through, whether the first
        # token of the endpoint is still to come, and whether anything came since the answer went on there; how long its
        # tokens may take (None: as long as its bytes), and since when what came was none (0: it was one);
        # the last of it that was one.
        self.body = body
        self.document = b""
        self.opening = b""
        self._splice: Splice | None = None
        self._awaits_token = True
        self.has_moved = False
        self._patience: Patience | None = None
        self._still_since = 0.0
        self._latest = b""
        if accounts:
            exchange.passes(account, streamed=self.is_event_stream)

    def __repr__(self) -> str:
        return f"<Reply {self.status} {self._exchange!r}>"

    @property
    def tally(self) -> Tally:
        """What has been read of it."""
        return self._account.tally

    def read(self, data: bytes) -> bytes:
        """Take the next bytes of the body; return what is to be sent now, perhaps nothing."""
        if self._splice is not None:
            data = self._splice.feed(data)
        data = self._account.feed(data)
        if self._awaits_token and self._account.begun:
            self._awaits_token = False
            self.has_moved = True
            if self._accounts:
                self._exchange.token()
        if self._tells in data:
            self._latest = data
            self._still_since = 0.0
        else:
            self._stand_still()
        if data and (self.change is not None or self.continuation is not None):
            return self._passed(data)
        return data

    def _stand_still(self) -> None:
        """What came was no part of an answer. Raises UpstreamTimeout if nothing else came for too long."""
        if self._patience is None:
            return
        now = self._patience.clock()
        if not self._still_since:
            self._still_since = now
        elif self._awaits_token and now - self._still_since > self._patience.first_token:
            raise FirstTokenTimeout
        elif not self._awaits_token and now - self._still_since > self._patience.between_tokens:
            raise BetweenBytesTimeout

    def end(self) -> bytes:
        """The body is over: return what is still to be sent. Raises TruncatedAnswer if it cannot be all."""
        rest = self._account.feed(self._splice.end()) if self._splice else b""
        rest += self._account.end()
        if self.is_event_stream and self._exchange.operation in FIRST_TOKEN and not self._account.tally.finish_reason:
            raise TruncatedAnswer("without saying why")
        return self._passed(rest)

    def broken(self, error: UpstreamError) -> bytes:
        """The body will never be complete: return what may still be sent, which ends where an event does."""
        before = error.before if isinstance(error, ErrorEvent) else b""
        return self._passed(before + self._account.broken())

    async def mend(self, error: UpstreamError) -> tuple[bytes, bool]:
        """The body broke: return what is to be sent next, and whether more follows. Raises Cut if nothing helps."""
        if self.mending is None:
            raise Cut from error
        return await self.mending(self, error)

    def give_up(self, error: RequestError) -> bytes:
        """The client has no more time: return what is sent last. Raises Cut where that cannot be told."""
        self._exchange.fail(error)
        if not self.is_event_stream:
            raise Cut from error
        return self._passed(self._account.broken()) + self.error_event(error)

    def error_event(self, error: RequestError) -> bytes:
        """Return the event that ends a stream which cannot be finished."""
        return sse.error_event(error, self._exchange.operation, self._latest)

    async def mended(self) -> AsyncIterator[bytes]:
        """Pass all that is to be sent of a body, for one who does not send it as it is."""
        assert self.body is not None
        passing, more = self.opening, True
        while more:
            yield passing
            try:
                async for data in self.body:
                    yield self.read(data)
                passing, more = self.end(), False
            except UpstreamError as error:
                passing, more = await self.mend(error)
        yield passing

    async def open(self, deadline: float, patience: Patience) -> None:
        """Read up to the first token, so that nothing is sent before; or what may be held. Raises UpstreamError.

        deadline: of the first token. patience: with all that follow it.
        """
        assert self.body is not None
        self._patience = patience
        async for data in self.body:
            self.opening += self.read(data)
            if not self._awaits_token or len(self.opening) > _OPENING_LIMIT:
                return
            if patience.clock() > deadline:  # what comes is no token
                raise FirstTokenTimeout
            self._exchange.waited()
        self.opening += self.end()

    def go_on(self, answer: Answer, splice: Splice, patience: Patience, *, hide_usage: bool) -> None:
        """The rest of the stream comes from another endpoint."""
        self.body = answer
        self._patience = patience
        self._still_since = 0.0
        self._splice = splice
        self._awaits_token = True
        self.has_moved = False
        if isinstance(self._account, StreamAccount):
            self._account.hide_usage = hide_usage

    def finish(self, events: bytes) -> bytes:
        """Take the end of a stream whose answer is whole; return what is to be sent."""
        return self._passed(self._account.feed(events) + self._account.end())

    def _passed(self, data: bytes) -> bytes:
        if self.change is not None and data:
            data = self.change(data)
        if self.continuation is not None and data:
            self.continuation.note(data)
        return data


async def reply(answer: Answer, exchange: Exchange, rename: str | None, *, hide_usage: bool = False) -> Reply:
    """Make the reply to a client. Raises UpstreamError where that takes the whole document, and it does not come.

    A document with `error` instead of an answer is an error as well, whatever its status: some routers send such.

    rename: the `model` to write into the answer, None to leave it alone. hide_usage: a stream says what it used only
    because we asked. Without either every byte passes as it came: of an event stream event by event, and of a document
    when it is whole, or of a large one that needs no change as it comes.
    """
    headers = [(name, value) for name, value in answer.headers if name not in _SERVERS_OWN]
    kind = content_type(headers).lower()
    if answer.status >= 400:
        return await _error(answer, exchange, headers)
    if kind.startswith(_EVENT_STREAM):
        return _stream(answer, exchange, headers, rename, hide_usage=hide_usage)
    return await _document(answer, exchange, headers, rename, is_json=kind.startswith(_JSON))


def _stream(answer: Answer, exchange: Exchange, headers: Headers, rename: str | None, *, hide_usage: bool) -> Reply:
    operation = exchange.operation
    account = StreamAccount(
        hide_usage=hide_usage,
        first_token=FIRST_TOKEN.get(operation, b""),
        errors_end=operation in FIRST_TOKEN,
        cost=exchange.cost if exchange.shows_cost else None,
    )
    made = Reply(exchange, answer.status, headers, account, answer)
    made._tells = TELLS.get(operation, b"")
    if rename is not None:
        made.change = EventRenamer(rename)
    return made


async def _document(
    answer: Answer, exchange: Exchange, headers: Headers, rename: str | None, *, is_json: bool
) -> Reply:
    rename = rename if is_json else None
    document, whole = await _gather(answer, _HELD_LIMIT if rename is None else _RENAMED_LIMIT)
    exchange.waited()
    account = DocumentAccount() if is_json else NoAccount()
    if not whole and rename is None:
        return Reply(exchange, answer.status, headers, account, _after(document, answer))
    if not whole:
        raise MalformedAnswer("the body is larger than it may be")
    if is_json and not _can_be_json(document):
        raise MalformedAnswer("it says that it is JSON and is not")
    account.feed(document)
    account.end()
    if account.tally.failed and account.tally.finish_reason is None:
        raise ErrorEvent(document)
    if rename is not None:
        renamed = wire.set_model(document, rename)
        if renamed is not document:
            document, headers = renamed, with_length(headers, len(renamed))
    return _whole(answer.status, headers, document, exchange, account)


async def _error(answer: Answer, exchange: Exchange, headers: Headers) -> Reply:
    document, whole = await _gather(answer, _HELD_LIMIT)
    if not whole:
        raise MalformedAnswer("an error that is too long")
    exchange.waited()
    return _whole(answer.status, with_length(headers, len(document)), document, exchange, NoAccount())


def _whole(status: int, headers: Headers, document: bytes, exchange: Exchange, account: Account) -> Reply:
    made = Reply(exchange, status, headers, account, None)
    made.document = document
    return made


def refusal(status: int, document: bytes, exchange: Exchange) -> Reply:
    """Make the reply of a stream that was nothing but an error of the client's."""
    exchange.answers(status)
    return _whole(status, with_length([(b"content-type", _JSON)], len(document)), document, exchange, NoAccount())


def of_ours(exchange: Exchange, document: bytes, finish_reason: str, *, streamed: bool) -> Reply:
    """Make the reply of a chat whose answer was put together here, and whose tokens were counted elsewhere.

    streamed: the document is all the events of a stream.
    """
    account = NoAccount()
    account.tally.finish_reason = finish_reason
    kind = _EVENT_STREAM if streamed else _JSON
    exchange.answers(200)
    return _whole(200, with_length([(b"content-type", kind)], len(document)), document, exchange, account)


def stream_of_ours(exchange: Exchange, body: AsyncIterator[bytes], account: Account) -> Reply:
    """Make the reply of a stream that is changed on its way by `body`, which says itself what went wrong.

    account: of it, in which `body` notes why it ended before it does.
    """
    exchange.answers(200)
    made = Reply(exchange, 200, [(b"content-type", _EVENT_STREAM)], account, body)
    made.is_event_stream = True
    return made


def is_stream(answer: Answer) -> bool:
    """Say whether an answer is an event stream."""
    return content_type(answer.headers).lower().startswith(_EVENT_STREAM)


async def _gather(answer: Answer, limit: int) -> tuple[bytes, bool]:
    """Return the body, or its beginning if it is longer than it may be, and whether it is all."""
    parts, size = [], 0
    async for data in answer:
        parts.append(data)
        size += len(data)
        if size > limit:
            return b"".join(parts), False
    return parts[0] if len(parts) == 1 else b"".join(parts), True


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for data in rest:
        yield data


def _can_be_json(document: bytes) -> bool:
    """Say whether bytes can be a JSON object or list; what is inside is read by those who need it."""
    if document.startswith(b"{") and document.endswith(b"}"):
        return True
    text = document.strip()
    return (text[:1], text[-1:]) in ((b"{", b"}"), (b"[", b"]"))


def with_length(headers: Headers, length: int) -> Headers:
    """Return headers with the Content-Length of another body."""
    others = [(name, value) for name, value in headers if name != b"content-length"]
    return [*others, (b"content-length", b"%d" % length)]
