"""Tokens and the reason of the end, read from an answer while its bytes pass. Pure.

Only what can carry them is decoded: of a stream the few events with `usage`, a finish reason or an error, of a large
document its end. Where a client did not ask for usage in a stream, we ask for it (`ask_usage`) and take it out again.
"""

import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Protocol

import msgspec

from proxy import sse
from proxy.errors import BadRequest, ErrorEvent

FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter", "error", "abort", "other", "none")

# The words of /v1/messages and /v1/responses for what OpenAI's chat calls finish_reason.
_SAME = {
    "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls",
    "refusal": "content_filter", "function_call": "tool_calls",
    "completed": "stop", "incomplete": "length", "failed": "error", "max_output_tokens": "length", "cancelled": "abort",
}  # fmt: skip


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one request. cached: those of the prompt that needed no work."""

    tokens_in: int = 0
    tokens_out: int = 0
    cached: int = 0


# What is read of an event or a document. Whatever has not these types is not accounted.

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**50)]


_NOTHING = msgspec.Raw()


class _Details(msgspec.Struct, frozen=True, gc=False):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct, frozen=True, gc=False):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: _Count | None = None  # /v1/messages: tokens that are not among input_tokens
    cache_creation_input_tokens: _Count | None = None


class _Choice(msgspec.Struct, frozen=True, gc=False):
    finish_reason: str | None = None


class _Stop(msgspec.Struct, frozen=True, gc=False):
    stop_reason: str | None = None


class _Incomplete(msgspec.Struct, frozen=True, gc=False):
    reason: str | None = None


class _Part(msgspec.Struct, frozen=True, gc=False):
    """An event, a document, or the `response` or `message` in one."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    system_fingerprint: str | None = None
    status: str | None = None
    incomplete_details: _Incomplete | None = None
    stop_reason: str | None = None
    delta: _Stop | str | None = None
    response: "_Part | None" = None
    message: "_Part | None" = None
    error: msgspec.Raw = _NOTHING

    def inner(self) -> "_Part":
        return self.response or self.message or self

    def tells_of_error(self) -> bool:
        return bytes(self.error) not in (b"", b"null")

    def is_usage_alone(self) -> bool:
        """Say whether this is the chunk that is sent only to those who ask for usage."""
        return self.usage is not None and self.choices == []

    def finish(self) -> str | None:
        """Return why the generation ended, in OpenAI's words; None if this does not say."""
        if self.choices:
            return self.choices[-1].finish_reason or self._of_any_choice()
        part = self.inner()
        incomplete = part.incomplete_details and part.incomplete_details.reason
        stopped = self.delta.stop_reason if isinstance(self.delta, _Stop) else None
        return incomplete or stopped or part.stop_reason or (part.status if part.status in _SAME else None)

    def _of_any_choice(self) -> str | None:
        return next((c.finish_reason for c in self.choices or () if c.finish_reason), None)


_decode = msgspec.json.Decoder(_Part).decode
_encode = msgspec.json.encode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Tally:
    """What has been read of one answer."""

    __slots__ = ("_cached", "_in", "_out", "failed", "finish_reason", "usage")

    def __init__(self) -> None:
        # All mutable state: the tokens (None until told), one by one and together, why it ended, whether it told of an
        # error.
        self._in: int | None = None
        self._out: int | None = None
        self._cached: int | None = None
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.failed = False

    def __repr__(self) -> str:
        return f"<Tally {self.usage!r} {self.finish_reason}>"

    @classmethod
    def of(cls, usage: Usage | None, finish_reason: str | None) -> "Tally":
        """Return that of an answer which was read before."""
        tally = cls()
        if usage is not None:
            tally._in, tally._out, tally._cached = usage.tokens_in, usage.tokens_out, usage.cached
            tally.usage = usage
        tally.finish_reason = finish_reason
        return tally

    def add(self, part: _Part) -> None:
        """Take in an event or a document; later figures stand for earlier ones."""
        if reason := part.finish():
            reason = _SAME.get(reason, reason)
            self.finish_reason = reason if reason in FINISH_REASONS else "other"
        self.failed = self.failed or part.tells_of_error()
        if usage := part.inner().usage:
            self._count(usage)

    def _count(self, usage: _Usage) -> None:
        """Add the figures of a usage object, whose names are OpenAI's first, OpenAI's later, or Anthropic's."""
        details = usage.prompt_tokens_details or usage.input_tokens_details
        found = details.cached_tokens if details else None
        apart = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
        given = usage.input_tokens if usage.prompt_tokens is None else usage.prompt_tokens
        made = usage.output_tokens if usage.completion_tokens is None else usage.completion_tokens
        found = usage.cache_read_input_tokens if found is None else found
        self._in = self._in if given is None else given + apart
        self._out = self._out if made is None else made
        self._cached = self._cached if found is None else found
        if self._in is not None or self._out is not None:
            self.usage = Usage(self._in or 0, self._out or 0, self._cached or 0)


class Account(Protocol):
    """Reads an answer of one kind as it passes. `begun`: its first token has been seen."""

    tally: Tally
    begun: bool

    def feed(self, data: bytes) -> bytes:
        """Read bytes, and return those that may pass on now, perhaps none."""
        ...

    def end(self) -> bytes:
        """The answer is complete: return what is still to pass on."""
        ...

    def broken(self) -> bytes:
        """The answer will never be complete: return what of it may still pass on."""
        ...


class StreamAccount:
    """An event stream. Whole events pass on; with hide_usage, without the usage that only we asked for.

    first_token: bytes that the event of the first token has, and none before it. errors_end: an event that tells of an
    error does not pass, but raises ErrorEvent. cost: what usage costs, to be added to it as `cost`, in USD.

    vLLM says `system_fingerprint` in the last event of a client that does not ask for usage, and in the usage event of
    one that does. So events that end a choice are kept until another comes, which after the last follows at once, and
    get the fingerprint if that one is the event taken out. (Of several choices, one that ends well before the others
    passes without.) Other servers say `"usage":null` in each event of those who ask.
    """

    def __init__(
        self,
        *,
        hide_usage: bool = False,
        first_token: bytes = b"",
        errors_end: bool = False,
        cost: Callable[[Usage], float | None] | None = None,
    ) -> None:
        self._first_token = first_token
        self._errors_end = errors_end
        self._cost = cost
        # All mutable state: whether usage is hidden, which another endpoint may change; the incomplete event, those
        # that are kept, and what was read.
        self.hide_usage = hide_usage
        self._events = sse.Events()
        self._kept: list[bytes] = []
        self.tally = Tally()
        self.begun = False

    def __repr__(self) -> str:
        return f"<StreamAccount {self.tally!r} {self._events!r}>"

    def feed(self, data: bytes) -> bytes:
        if not self.begun:
            return self._begin(data)
        passing = b""
        if self._events.rest or self._kept:
            end = data.find(b"\n\n") + 2
            passing, data = (self._each(data[:end]), data[end:]) if end > 1 else (b"", data)
            if self._events.rest or self._kept:
                return self._each(data, passing)
        if data.endswith(b"\n\n") and not _tells(data):
            return passing + data if passing else data
        end = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
        return self._each(data[end:], self._from_first_that_tells(data[:end], passing))

    def _begin(self, data: bytes) -> bytes:
        """Read as ever, and look for the first token in what passes; later bytes are spared the look."""
        self.begun = True
        passing = self.feed(data)
        self.begun = bool(passing) and self._first_token in passing
        return passing

    def _from_first_that_tells(self, data: bytes, passing: bytes) -> bytes:
        """Pass whole events, and look into them from the first that may tell something."""
        found = [at for mark in _MARKS if (at := data.find(mark)) >= 0]
        start = data.rfind(b"\n\n", 0, min(found)) + 2 if found else len(data)
        return self._each(data[start:], passing + data[:start]) if start > 1 else self._each(data, passing)

    def _each(self, data: bytes, before: bytes = b"") -> bytes:
        """Read each event, and return what passes on behind what came before."""
        passing = [before]
        for event in self._events.feed(data):
            try:
                passing.append(self._pass(event))
            except ErrorEvent as error:
                error.before = b"".join(passing)
                raise
        return b"".join(passing)

    def end(self) -> bytes:
        rest, self._events.rest = self._events.rest, b""
        return (self._pass(rest) if rest else b"") + self._release()

    def broken(self) -> bytes:
        self._events.rest = b""
        return self._release()

    def _pass(self, event: bytes) -> bytes:
        """Read an event, and return what passes on of all that came."""
        part = _read_event(event) if _tells(event) else None
        if part is None:
            return self._release() + event
        if self._errors_end and part.tells_of_error():
            raise ErrorEvent(sse.data_of(event))
        self.tally.add(part)
        if self._cost is not None and part.usage is not None and (usage := self.tally.usage):
            event = _with_cost(event, self._cost(usage))
        if not self.hide_usage:
            return event
        if part.is_usage_alone():
            return self._release(part.system_fingerprint)
        event = _without_null_usage(event)
        if part.finish() is None:
            return self._release() + event
        self._kept.append(event)
        return b""

    def _release(self, fingerprint: str | None = None) -> bytes:
        kept, self._kept = self._kept, []
        return b"".join([_with_fingerprint(event, fingerprint) for event in kept] if fingerprint else kept)


_NULL_USAGE = re.compile(rb',\s*"usage"\s*:\s*null').search


_MARKS = _USAGE, _FINISH, _FINISH_SPACED, _ERROR = b'"usage"', b'finish_reason":"', b'finish_reason": "', b'"error"'


def _tells(data: bytes) -> bool:
    """Say whether bytes can tell of usage, an end or an error.

    A quote inside of a JSON string is escaped, so these are keys. Searching from the end takes CPython a fifth of the
    time, for want of a start that is rare.
    """
    rfind = data.rfind
    return rfind(_USAGE) >= 0 or rfind(_FINISH) >= 0 or rfind(_FINISH_SPACED) >= 0 or rfind(_ERROR) >= 0


def _read_event(event: bytes) -> _Part | None:
    try:
        return _decode(sse.data_of(event))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _without_null_usage(event: bytes) -> bytes:
    found = _NULL_USAGE(event, max(event.rfind(b'"usage"') - 16, 0))
    return event[: found.start()] + event[found.end() :] if found else event


def _with_fingerprint(event: bytes, fingerprint: str) -> bytes:
    at = event.rfind(b"}")
    if at < 0 or b'"system_fingerprint"' in event:
        return event
    return event[:at] + b',"system_fingerprint":' + _encode(fingerprint) + event[at:]


def _with_cost(event: bytes, usd: float | None) -> bytes:
    def add(document: bytes) -> bytes:
        try:
            fields = _decode_object(document)
        except msgspec.DecodeError:  # it goes on in the next line
            return document
        fields["usage"] = msgspec.Raw(_encode({**_decode_object(fields["usage"]), "cost": usd}))
        return _encode(fields)

    return sse.map_data(event, add)


_WHOLE = 64 * 1024  # bytes; larger documents are mostly vectors, and have their usage at the end
_TAIL = 4096


class DocumentAccount:
    """A JSON document, whose bytes pass on as they come."""

    __slots__ = ("_parts", "_size", "begun", "tally")

    def __init__(self) -> None:
        # All mutable state: the document so far, or its last bytes where it is large, and what was read of it.
        self._parts: list[bytes] = []
        self._size = 0
        self.tally = Tally()
        self.begun = False

    def __repr__(self) -> str:
        return f"<DocumentAccount {self.tally!r} {self._size} bytes>"

    def feed(self, data: bytes) -> bytes:
        self.begun = True
        self._parts.append(data)
        self._size += len(data)
        if self._size > _WHOLE:
            self._parts = [b"".join(self._parts)[-_TAIL:]]
        return data

    def end(self) -> bytes:
        kept = b"".join(self._parts)
        part = _read_document(kept) if self._size <= _WHOLE else _read_tail(kept)
        if part is not None:
            self.tally.add(part)
        return b""

    def broken(self) -> bytes:
        return b""


def _read_document(document: bytes) -> _Part | None:
    try:
        return _decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _read_tail(tail: bytes) -> _Part | None:
    """Read the last `usage` and the last finish reason of a document of which only the end is there."""
    text = tail.decode("utf-8", "replace")
    found = {key: _last_value(text, key) for key in ("usage", "finish_reason")}
    try:
        return msgspec.convert({"usage": found["usage"], "choices": [found]}, _Part)
    except msgspec.ValidationError:
        return None


def _last_value(text: str, key: str) -> Any:
    at = text.rfind(f'"{key}"')
    match = re.compile(r"\s*:\s*").match(text, at + len(key) + 2)
    if at < 0 or match is None:
        return None
    try:
        return json.JSONDecoder().raw_decode(text, match.end())[0]
    except (ValueError, RecursionError):
        return None


class NoAccount:
    """An answer that tells nothing of tokens (text, audio), or that was read before (tally)."""

    def __init__(self, tally: Tally | None = None) -> None:
        # All mutable state: whether anything came.
        self.tally = tally or Tally()
        self.begun = False

    def __repr__(self) -> str:
        return "<NoAccount>"

    def feed(self, data: bytes) -> bytes:
        self.begun = True
        return data

    def end(self) -> bytes:
        return b""

    def broken(self) -> bytes:
        return b""


# Asking

_ASK = b'"stream_options":{"include_usage":true},'


def ask_usage(body: bytes, stream_options: bytes) -> bytes | None:
    """Return the body of a stream's request with a wish for usage, None where the client has it already.

    stream_options: the JSON that the body has for it, b"" for none. Where there is some it is replaced, duplicates go,
    and all other values keep their bytes. What is not valid is left for the engine to refuse.
    """
    if not stream_options:
        at = body.index(b"{") + 1
        return body[:at] + _ASK + body[at:]
    options = _silent_options(stream_options)
    if options is None:
        return None
    # Without usage an engine gives no continuous usage either; with it, it would.
    ask = {**options, "include_usage": True, "continuous_usage_stats": False}
    return _encode({**_decode_object(body), "stream_options": ask})


def take_cost(stream_options: bytes) -> tuple[bytes, bool] | None:
    """Return the options of a stream without the wish for its cost, which no engine knows, and whether it is one.

    None if they do not speak of it. Who wants the cost wants the usage, in which it stands. Raises BadRequest.
    """
    if b'"include_cost"' not in stream_options:
        return None
    try:
        options = _decode_object(stream_options)
        wish = msgspec.json.decode(options.pop("include_cost", b"null"), type=bool | None)
    except msgspec.DecodeError:
        param = "stream_options.include_cost"
        raise BadRequest(f"{param}: expected true or false", param=param) from None
    return _encode({**options, "include_usage": True} if wish else options), bool(wish)


def asks_usage(stream_options: bytes) -> bool:
    """Say whether a client asks for usage in a stream. stream_options: as for ask_usage."""
    return bool(stream_options) and _silent_options(stream_options) is None


def _silent_options(raw: bytes) -> dict[str, msgspec.Raw] | None:
    """Return the options of a client that does not ask for usage; None if it does, or they are not valid."""
    if raw == b"null":
        return {}
    try:
        options = _decode_object(raw)
        asked = msgspec.json.decode(options.get("include_usage", b"null"))
        return None if asked is not None and msgspec.convert(asked, bool, strict=False) else options
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None
