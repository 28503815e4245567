"""One chat completion of the answer that was chosen: as a document, or as the events of a stream. Pure."""

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from proxy import sse
from proxy.accounting import Usage
from proxy.ensembles.answers import Answer, Object

DONE = b"data: [DONE]\n\n"
_NULL = msgspec.Raw(b"null")
_NOTHING = frozenset((b"null", b'""', b"[]"))
_IDENTITY = ("id", "created", "system_fingerprint")

_encode = msgspec.json.encode
_decode_object = msgspec.json.Decoder(Object).decode
_decode_reason = msgspec.json.Decoder(str | None).decode
_decode_objects = msgspec.json.Decoder(list[Object]).decode


class Ending(msgspec.Struct, frozen=True):
    """What comes with an answer.

    name: the ensemble's. details: what stands under `ensemble`. usage: the sum, None to leave it out. usd: what it
    cost, to be told in the usage; None to leave it out.
    """

    name: str
    details: Mapping[str, object]
    usage: Usage | None = None
    usd: float | None = None

    def told_usage(self) -> dict[str, object] | None:
        """Return the `usage` of a completion."""
        told = tokens(self.usage)
        return {**told, "cost": self.usd} if told and self.usd is not None else told


def tokens(usage: Usage | None) -> dict[str, object] | None:
    """Return tokens as OpenAI tells them."""
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.tokens_in,
        "completion_tokens": usage.tokens_out,
        "total_tokens": usage.tokens_in + usage.tokens_out,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def total(usages: Sequence[Usage | None]) -> Usage | None:
    """Return the sum of what is known, None if nothing is."""
    known = [usage for usage in usages if usage is not None]
    if not known:
        return None
    return Usage(sum(u.tokens_in for u in known), sum(u.tokens_out for u in known), sum(u.cached for u in known))


def with_content(answer: Answer, content: str | None, *, keep_logprobs: bool) -> Answer:
    """Return an answer with another text, if there is one, and without probabilities that only we asked for."""
    choice = {**answer.choice, "index": _raw(0)}
    if content is not None:
        message = {**_decode_object(choice["message"]), "content": _raw(content)}
        choice["message"] = _raw(message)
    if not keep_logprobs or content is not None:
        choice["logprobs"] = _NULL
    return msgspec.structs.replace(answer, choice=choice, text=answer.text if content is None else content)


def document(answer: Answer, ending: Ending) -> bytes:
    """Return an answer as one document. What its model said beside it stays: reasoning, tool calls, fingerprint."""
    fields: dict[str, object] = {"object": "chat.completion", **answer.document}
    fields |= {"model": ending.name, "choices": [answer.choice], "usage": ending.told_usage()}
    return _encode({**fields, "ensemble": ending.details})


def events(answer: Answer, ending: Ending) -> bytes:
    """Return an answer as a stream that is whole: the role, the message, its end, usage if there is some, `[DONE]`."""
    identity = {name: answer.document[name] for name in _IDENTITY if answer.document.get(name, _NULL) != _NULL}
    return b"".join(_events(answer, identity, ending))


def _events(answer: Answer, identity: Mapping[str, object], ending: Ending) -> Iterator[bytes]:
    yield _chunk(identity, ending.name, [_choice({"role": "assistant", "content": ""})])
    if delta := _delta(_decode_object(answer.choice["message"])):
        yield _chunk(identity, ending.name, [_choice(delta, answer.choice.get("logprobs", _NULL))])
    last = {**_choice({}), "finish_reason": answer.choice.get("finish_reason", _NULL)}
    yield _chunk(identity, ending.name, [last], ensemble=ending.details)
    yield usage_and_done(identity, ending)


def usage_and_done(identity: Mapping[str, object], ending: Ending) -> bytes:
    """Return what follows the last choice of a stream."""
    told = ending.told_usage()
    return (_chunk(identity, ending.name, [], usage=told) if told else b"") + DONE


def _choice(delta: Mapping[str, object], logprobs: msgspec.Raw = _NULL) -> dict[str, object]:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _delta(message: Object) -> dict[str, object]:
    """Return what a message says, as one delta."""
    delta: dict[str, object] = {n: v for n, v in message.items() if n != "role" and bytes(v) not in _NOTHING}
    if "tool_calls" in delta:
        calls = _decode_objects(message["tool_calls"])
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    return delta


def _chunk(identity: Mapping[str, object], name: str, choices: list[dict[str, object]], **more: object) -> bytes:
    chunk = {**identity, "object": "chat.completion.chunk", "model": name, "choices": choices, **more}
    return b"data: %b\n\n" % _encode(chunk)


class Written:
    """A stream of the writer's, on its way: its last choice waits for the details, which are known when all is over."""

    def __init__(self) -> None:
        # All mutable state: the event that is not complete yet; the last choice of the answer, and why it ended there,
        # "error" as long as it did not; what the stream is.
        self._events = sse.Events()
        self._last: Object | None = None
        self.finish_reason = "error"
        self.identity: dict[str, object] = {}

    def __repr__(self) -> str:
        return f"<Written {'whole' if self._last else 'open'} {self._events!r}>"

    @property
    def is_whole(self) -> bool:
        """Whether the end of the answer has come."""
        return self._last is not None

    def feed(self, data: bytes) -> bytes:
        """Take bytes, cut anywhere; return the events that pass now."""
        return b"".join([event for event in self._events.feed(data) if self._passes(event)])

    def end(self, ending: Ending) -> bytes:
        """Return the last choice, with the details, and what follows it."""
        last = {name: value for name, value in (self._last or {}).items() if name != "usage"}
        last["ensemble"] = _raw(ending.details)
        return b"data: %b\n\n" % _encode(last) + usage_and_done(self.identity, ending)

    def _passes(self, event: bytes) -> bool:
        """Say whether an event passes as it came: not an end, nor a usage, which is not the sum."""
        data = sse.data_of(event)
        if not data.startswith(b"{"):
            return data != b"[DONE]"
        try:
            return self._passes_chunk(_decode_object(data))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return True  # it is no chunk that we know

    def _passes_chunk(self, chunk: Object) -> bool:
        self.identity = self.identity or {name: chunk[name] for name in _IDENTITY if name in chunk}
        choices = _decode_objects(chunk.get("choices", b"[]"))
        reasons = [_decode_reason(choice.get("finish_reason", b"null")) for choice in choices]
        if not any(reasons):
            return bool(choices) or "error" in chunk
        self._last, self.finish_reason = chunk, reasons[0] or self.finish_reason
        return False


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(_encode(value))
