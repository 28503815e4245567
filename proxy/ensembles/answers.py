"""What a model has said: its completion, read as far as strategies compare it."""

import re
from collections.abc import Sequence

import msgspec

from proxy.errors import MalformedAnswer

Object = dict[str, msgspec.Raw]

_decode_object = msgspec.json.Decoder(Object).decode
_encode = msgspec.json.encode
# Why an answer ended that is all that its model had to say.
_COMPLETE = frozenset(("stop", "tool_calls", "function_call"))


# What models think aloud where no parser of their server takes it out; without an end it is all there is.
_THOUGHTS = re.compile(r"\A\s*<think(?:ing)?>.*?(?:</think(?:ing)?>\s*|\Z)", re.DOTALL)


class _Function(msgspec.Struct, frozen=True):
    name: str = ""
    arguments: str = ""


class _Call(msgspec.Struct, frozen=True):
    function: _Function = _Function()


class _Part(msgspec.Struct, frozen=True):
    text: str = ""


class _Message(msgspec.Struct, frozen=True):
    content: str | list[_Part] | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None
    function_call: _Function | None = None


class _Token(msgspec.Struct, frozen=True):
    logprob: float


class _Logprobs(msgspec.Struct, frozen=True):
    content: list[_Token] | None = None


class _Choice(msgspec.Struct, frozen=True):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


_decode = msgspec.json.Decoder(_Completion).decode


class Answer(msgspec.Struct, frozen=True):
    """One member's answer.

    text: its content, without what it thought aloud before. calls: the tools that it calls, spelled so that equal calls
    are equal. logprob: the mean of its tokens, None where it did not tell. refused: the model, or a filter, would not
    answer. document, choice: as they came.
    """

    member: str
    weight: float
    text: str
    calls: str = ""
    finish_reason: str = "stop"
    logprob: float | None = None
    refused: bool = False
    document: Object = {}
    choice: Object = {}

    @property
    def said(self) -> str:
        """All that is compared."""
        return f"{self.text}\n{self.calls}" if self.calls else self.text

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing at all."""
        return not (self.text.strip() or self.calls or self.refused)

    @property
    def is_good(self) -> bool:
        """Whether it is a whole answer, and not a refusal."""
        return self.finish_reason in _COMPLETE and not self.refused and not self.is_empty


class Verdict(msgspec.Struct, frozen=True):
    """What a strategy makes of the answers.

    chosen: the index of the answer it is, None where one was written anew. scores: of each answer, by which it was
    chosen; None where it has none. details: what else there is to tell. content: another text in the place of the
    answer's, None for its own.
    """

    chosen: int | None
    scores: tuple[float | None, ...] = ()
    details: dict[str, object] = {}
    content: str | None = None


def read(document: bytes, member: str, weight: float) -> Answer:
    """Read a chat completion. Raises MalformedAnswer if it is none."""
    try:
        fields = _decode_object(document)
        choice = msgspec.json.decode(fields["choices"], type=list[Object])[0]
        told = _decode(document).choices[0]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, IndexError):
        raise MalformedAnswer("it is no chat completion") from None
    message = told.message
    return Answer(
        member=member,
        weight=weight,
        text=_text(message.content),
        calls=_calls(message),
        finish_reason=told.finish_reason or "",
        logprob=_mean(told.logprobs),
        refused=bool(message.refusal) or told.finish_reason == "content_filter",
        document=fields,
        choice=choice,
    )


def best(answers: Sequence[Answer], scores: Sequence[float | None]) -> int:
    """Return the index of the best score. Of equals, the weightier; then by name, so that no order matters."""
    known = [float("-inf") if score is None else score for score in scores]
    order = sorted(range(len(answers)), key=lambda i: (-known[i], -answers[i].weight, answers[i].member))
    return order[0]


def _text(content: str | list[_Part] | None) -> str:
    text = "".join([part.text for part in content]) if isinstance(content, list) else content or ""
    return _THOUGHTS.sub("", text, count=1) if "<think" in text else text


def _calls(message: _Message) -> str:
    functions = [call.function for call in message.tool_calls or ()]
    functions += [message.function_call] if message.function_call else []
    return "\n".join(f"{f.name}({_canonical(f.arguments)})" for f in functions)


def _canonical(arguments: str) -> str:
    """Return the JSON of a call with its keys in order; what is not JSON stays."""
    try:
        return _encode_sorted(msgspec.json.decode(arguments)).decode()
    except (msgspec.DecodeError, RecursionError):
        return arguments.strip()


_encode_sorted = msgspec.json.Encoder(order="deterministic").encode


def _mean(logprobs: _Logprobs | None) -> float | None:
    tokens = logprobs.content if logprobs else None
    return sum(token.logprob for token in tokens) / len(tokens) if tokens else None
