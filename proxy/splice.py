"""A second stream, made to look like the rest of the first. Pure."""

from collections.abc import Mapping

import msgspec

from proxy import sse

Object = dict[str, msgspec.Raw]

_decode_object = msgspec.json.Decoder(Object).decode
_decode_objects = msgspec.json.Decoder(list[Object]).decode
_decode_text = msgspec.json.Decoder(str | None).decode
_decode_count = msgspec.json.Decoder(int).decode
_encode = msgspec.json.encode
_NULL = msgspec.Raw(b"null")
_SAYS_NOTHING = (b"null", b'""', b"[]")
_THOUGHTS = ("reasoning", "reasoning_content")


class Splice:
    """Rewrites the events of a stream that goes on where another one broke.

    identity: values of fields that each event has as the first stream had them.
    begun: whether the client has the role already.
    answering: whether it has text of the answer already; what an engine calls reasoning after that is answer: of the
    partial message it may not have seen that the reasoning is over.
    owed: white space that the client has and this engine was not told of, so that it will say it again.
    spent: tokens of the answer that this engine was told of; it counts them among the prompt's.
    prompt_tokens: those of the first request, None if not known: then they are what this engine counts less `spent`.
    """

    def __init__(
        self,
        identity: Mapping[str, str | int | float],
        *,
        begun: bool = False,
        answering: bool = False,
        owed: str = "",
        spent: int = 0,
        prompt_tokens: int | None = None,
    ) -> None:
        self._identity = {name: msgspec.Raw(_encode(value)) for name, value in identity.items()}
        self._begun = begun
        self._answering = answering
        self._spent = spent
        self._prompt_tokens = prompt_tokens
        # All mutable state: the event that is not complete yet, and the white space still to be left out.
        self._events = sse.Events()
        self._owed = owed

    def __repr__(self) -> str:
        return f"<Splice after {self._spent} tokens {self._events!r}>"

    def feed(self, data: bytes) -> bytes:
        """Take bytes, cut anywhere; return the events that they complete as the client is to see them."""
        return b"".join([self._rewrite(event) for event in self._events.feed(data)])

    def end(self) -> bytes:
        """The stream is complete: return what is still to pass on."""
        rest, self._events.rest = self._events.rest, b""
        return self._rewrite(rest) if rest else b""

    def broken(self) -> bytes:
        """The stream will never be complete: nothing of half an event passes on."""
        self._events.rest = b""
        return b""

    def _rewrite(self, event: bytes) -> bytes:
        """Rewrite a chunk; an error, `[DONE]` and what else is no chunk are left as they are."""
        data = sse.data_of(event)
        if not data.startswith(b"{"):
            return event
        try:
            chunk = _decode_object(data)
            says = "choices" not in chunk or self._change(chunk)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return event
        return b"data: %b\n\n" % _encode(chunk) if says else b""

    def _change(self, chunk: Object) -> bool:
        """Make a chunk one of the first stream; say whether it still tells anything."""
        chunk.update((name, value) for name, value in self._identity.items() if name in chunk)
        choices = _decode_objects(chunk["choices"])
        says = [self._change_choice(choice) for choice in choices]
        chunk["choices"] = msgspec.Raw(_encode(choices))
        if has_usage := bytes(chunk.get("usage", _NULL)) != b"null":
            chunk["usage"] = msgspec.Raw(_encode(self._summed(_decode_object(chunk["usage"]))))
        return has_usage or not choices or any(says)

    def _change_choice(self, choice: Object) -> bool:
        if bytes(choice.get("delta", _NULL)) == b"null":
            return True  # of /v1/completions, whose text passes as it is
        before = _decode_object(choice["delta"])
        delta = self._changed_delta(before)
        if delta == before:
            return True
        choice["delta"] = msgspec.Raw(_encode(delta))
        ends = bytes(choice.get("finish_reason", _NULL)) != b"null"
        return ends or any(bytes(value) not in _SAYS_NOTHING for value in delta.values())

    def _changed_delta(self, delta: Object) -> Object:
        delta = {name: value for name, value in delta.items() if name != "role" or not self._begun}
        if self._answering:
            delta = _as_answer(delta)
        if self._owed and (text := _decode_text(delta.get("content", _NULL))):
            delta["content"] = msgspec.Raw(_encode(self._without_owed(text)))
        return delta

    def _without_owed(self, text: str) -> str:
        """Leave out what is owed as far as the text begins with it; from where they differ on, all passes."""
        same = _common_length(self._owed, text)
        self._owed = self._owed[same:] if same == len(text) else ""
        return text[same:]

    def _summed(self, usage: Object) -> Object:
        """Return the usage of all the streams together."""
        prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        first = max(prompt - self._spent, 0) if self._prompt_tokens is None else self._prompt_tokens
        sums = {
            "prompt_tokens": first,
            "completion_tokens": completion + self._spent,
            "total_tokens": first + completion + self._spent,
        }
        usage |= {name: msgspec.Raw(_encode(value)) for name, value in sums.items()}
        if bytes(usage.get("prompt_tokens_details", _NULL)) != b"null":
            usage["prompt_tokens_details"] = _at_most(usage["prompt_tokens_details"], first)
        return usage


def _common_length(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _as_answer(delta: Object) -> Object:
    """Return a delta with its reasoning made content."""
    thoughts = "".join([_decode_text(delta.get(name, _NULL)) or "" for name in _THOUGHTS])
    if not thoughts:
        return delta
    text = thoughts + (_decode_text(delta.get("content", _NULL)) or "")
    return {name: value for name, value in delta.items() if name not in _THOUGHTS} | {
        "content": msgspec.Raw(_encode(text))
    }


def _count(usage: Object, name: str) -> int:
    raw = usage.get(name, _NULL)
    return 0 if bytes(raw) == b"null" else _decode_count(raw)


def _at_most(details: msgspec.Raw, prompt_tokens: int) -> msgspec.Raw:
    """Tokens of the answer may have been cached too; no more than the prompt has are the prompt's."""
    fields = _decode_object(details)
    if "cached_tokens" not in fields or _count(fields, "cached_tokens") <= prompt_tokens:
        return details
    return msgspec.Raw(_encode({**fields, "cached_tokens": prompt_tokens}))
