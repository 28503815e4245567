"""What a server of text answers, as a chat. Pure."""

from typing import Any

import msgspec

from proxy import sse, wire
from proxy.errors import MalformedAnswer, TruncatedAnswer


class _Logprobs(msgspec.Struct, frozen=True):
    """As OpenAI's /v1/completions has them: a list for each kind of figure."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct, frozen=True):
    index: int = 0
    text: str | None = ""
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Text(msgspec.Struct, frozen=True):
    """A document, or an event of a stream. error: in place of all else."""

    id: str = ""
    created: int = 0
    model: str = ""
    choices: list[_Choice] = []
    usage: msgspec.Raw = msgspec.Raw(b"null")
    system_fingerprint: str | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


_text = msgspec.json.Decoder(_Text).decode
_DONE = b"[DONE]"


def _read(data: bytes) -> _Text:
    try:
        return _text(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise MalformedAnswer("it is no answer of /v1/completions") from None


def chat_completion(body: bytes) -> bytes:
    """Translate a document. Raises MalformedAnswer."""
    text = _read(body)
    if bytes(text.error) != b"null":
        return body
    choices = [
        {"index": c.index, "message": {"role": "assistant", "content": c.text or ""}, **_end(c)} for c in text.choices
    ]
    return wire.encode(_head(text, "chat.completion") | {"choices": choices, "usage": text.usage})


class Chunks:
    """The events of a stream of text as the chunks of a chat: a proxy.providers.translated.Translation."""

    def __init__(self) -> None:
        # All mutable state: the incomplete event, whether the stream is whole, and the choices that have begun.
        self._events = sse.Events()
        self.complete = False
        self._begun: set[int] = set()

    def __repr__(self) -> str:
        return f"<Chunks of {len(self._begun)} choices, {self._events!r}>"

    def feed(self, data: bytes) -> bytes:
        return b"".join([self._translate(event) for event in self._events.feed(data)])

    def end(self) -> bytes:
        if not self.complete:
            raise TruncatedAnswer("the stream ended without [DONE]")
        return b""

    def _translate(self, event: bytes) -> bytes:
        data = sse.data_of(event)
        if self.complete:
            return b""
        if not data:
            return sse.PING
        if data == _DONE:
            self.complete = True
            return event
        text = _read(data)
        if bytes(text.error) != b"null":
            self.complete = True
            return event
        opening = [self._begin(text, c.index) for c in text.choices if c.index not in self._begun]
        return b"".join([*opening, self._chunk(text)])

    def _begin(self, text: _Text, index: int) -> bytes:
        self._begun.add(index)
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return _event(_head(text, "chat.completion.chunk") | {"choices": [choice]})

    def _chunk(self, text: _Text) -> bytes:
        choices = [{"index": c.index, "delta": {"content": c.text} if c.text else {}, **_end(c)} for c in text.choices]
        chunk = _head(text, "chat.completion.chunk") | {"choices": choices}
        return _event(chunk if bytes(text.usage) == b"null" else chunk | {"usage": text.usage})


def _head(text: _Text, kind: str) -> dict[str, Any]:
    head = {
        "id": text.id.replace("cmpl-", "chatcmpl-", 1),
        "object": kind,
        "created": text.created,
        "model": text.model,
    }
    return head | {"system_fingerprint": text.system_fingerprint} if text.system_fingerprint else head


def _end(choice: _Choice) -> dict[str, Any]:
    return {"logprobs": _logprobs(choice.logprobs), "finish_reason": choice.finish_reason}


def _logprobs(given: _Logprobs | None) -> dict[str, Any] | None:
    if given is None:
        return None
    tops = given.top_logprobs or [None] * len(given.tokens)
    figures = zip(given.tokens, given.token_logprobs, tops, strict=False)
    return {"content": [_token(token, value, {"top_logprobs": _top(top)}) for token, value, top in figures]}


def _top(top: dict[str, float] | None) -> list[dict[str, Any]]:
    return [_token(token, value, {}) for token, value in (top or {}).items()]


def _token(token: str, logprob: float | None, more: dict[str, Any]) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()), **more}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + wire.encode(chunk) + b"\n\n"
