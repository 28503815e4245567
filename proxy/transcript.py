"""What a stream of /v1/chat/completions or /v1/completions has told its client. Pure."""

import re

import msgspec

from proxy import sse

# What is read of an event. An event that has other types is one that we do not understand, and cannot go on from.


class _Delta(msgspec.Struct, frozen=True, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    function_call: dict[str, msgspec.Raw] | None = None
    refusal: str | None = None
    audio: dict[str, msgspec.Raw] | None = None


class _Choice(msgspec.Struct, frozen=True, gc=False):
    index: int = 0
    delta: _Delta = _Delta()
    text: str | None = None
    finish_reason: str | None = None

    def answer(self) -> str | None:
        return self.text or self.delta.content

    def thoughts(self) -> str | None:
        return self.delta.reasoning or self.delta.reasoning_content

    def obstacle(self) -> str | None:
        """Name what no other engine can go on from."""
        delta = self.delta
        if self.index:
            return "several choices"
        if delta.tool_calls or delta.function_call:
            return "a tool call"
        if delta.refusal or delta.audio:
            return "a refusal" if delta.refusal else "sound"
        return None


class _Usage(msgspec.Struct, frozen=True, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct, frozen=True, gc=False):
    id: str | None = None
    created: int | float | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    choices: list[_Choice] = []
    usage: _Usage | None = None

    def text_alone(self) -> str | None:
        """Return the text if this tells nothing else."""
        if len(self.choices) != 1 or self.usage:
            return None
        (choice,) = self.choices
        alone = not (choice.thoughts() or choice.obstacle() or choice.finish_reason)
        return choice.answer() if alone else None


_decode = msgspec.json.Decoder(_Chunk).decode
_decode_texts = msgspec.json.Decoder(list[str]).decode
_TEXT_LIMIT = 256 * 1024  # characters


class Transcript:
    """Folds the events of a stream, in order, into what another engine must know to go on with it.

    obstacle: why none can, None while one could: what the answer holds beside text, or what of it was not understood.
    tokens: those that the answer has taken, as far as the stream tells: exactly, where its events have `usage` in them;
    otherwise one for each event with text. vLLM puts more than one token into an event when it sends slower than it
    generates, and none into the stream for what is not text, so this is a lower bound, mostly the number itself.
    blank_tokens: how many of the last of them are white space and nothing else.
    """

    __slots__ = (
        "_pieces", "_size", "_thoughts", "begun", "blank_tokens", "done", "finish_reason", "identity", "obstacle",
        "prompt_tokens", "thoughts_name", "tokens", "usage_told",
    )  # fmt: skip

    def __init__(self) -> None:
        # All mutable state. What the answer says, and how many characters that is:
        self._pieces: list[str] = []
        self._thoughts: list[str] = []
        self._size = 0
        # What it is: id, created, model and system_fingerprint; whether a choice was seen; the field of its reasoning:
        self.identity: dict[str, str | int | float] = {}
        self.begun = False
        self.thoughts_name = "reasoning"
        # How far it is:
        self.obstacle: str | None = None
        self.tokens = 0
        self.blank_tokens = 0
        self.prompt_tokens: int | None = None
        self.finish_reason: str | None = None
        self.usage_told = False
        self.done = False

    def __repr__(self) -> str:
        how = self.obstacle or self.finish_reason or "open"
        return f"<Transcript {self.tokens} tokens, {self._size} characters, {how}>"

    @property
    def text(self) -> str:
        """What was answered."""
        return "".join(self._pieces)

    @property
    def thoughts(self) -> str:
        """The reasoning before it."""
        return "".join(self._thoughts)

    def add(self, data: bytes) -> None:
        """Take in whole events."""
        first = 0 if self.begun else _end_of_first(data)  # it may have the role, and has the identity
        kept = len(self._pieces), len(self._thoughts)
        try:
            self._add_each(data[:first])
            self._add_alike(data[first:])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._stop("an event that is not understood")
        self._pieces[kept[0] :] = ["".join(self._pieces[kept[0] :])]
        self._thoughts[kept[1] :] = ["".join(self._thoughts[kept[1] :])]

    def _add_alike(self, data: bytes) -> None:
        if texts := _texts(data):
            self._answer(texts)
        else:
            self._add_each(data)

    def _add_each(self, data: bytes) -> None:
        events = sse.Events()
        for event in events.feed(data):
            self._add_event(sse.data_of(event))
        if events.rest:
            self._stop("half an event")

    def _add_event(self, data: bytes) -> None:
        if data.startswith(b"{"):
            self._add(_decode(data))
        elif data == b"[DONE]":
            self.done = True

    def _add(self, chunk: _Chunk) -> None:
        if chunk.id and not self.identity:
            told = {"id": chunk.id, "created": chunk.created, "model": chunk.model}
            self.identity = {name: value for name, value in told.items() if value}
        if chunk.system_fingerprint:
            self.identity.setdefault("system_fingerprint", chunk.system_fingerprint)
        for choice in chunk.choices:
            self._add_choice(choice)
        if chunk.usage:
            self._count(chunk.usage)
            self.usage_told = self.usage_told or not chunk.choices

    def _add_choice(self, choice: _Choice) -> None:
        self.begun = True
        self.finish_reason = choice.finish_reason or self.finish_reason
        if obstacle := choice.obstacle():
            self._stop(obstacle)
        text = choice.answer()
        if thoughts := choice.thoughts():
            self.thoughts_name = "reasoning" if choice.delta.reasoning else "reasoning_content"
            self._keep(self._thoughts, thoughts)
            self.tokens += not text
        if text:
            self._answer([text])

    def _answer(self, texts: list[str]) -> None:
        """Take in the texts of events."""
        self._keep(self._pieces, "".join(texts))
        self.tokens += len(texts)
        blank = next((count for count, text in enumerate(reversed(texts)) if not text.isspace()), None)
        self.blank_tokens = self.blank_tokens + len(texts) if blank is None else blank

    def _keep(self, where: list[str], text: str) -> None:
        self._size += len(text)
        if self._size > _TEXT_LIMIT:
            self._stop("more text than is kept")
        if self.obstacle is None:
            where.append(text)

    def _count(self, usage: _Usage) -> None:
        if usage.completion_tokens is not None:
            # It is never less than before. An engine that goes on was not told of white space at the end of the text,
            # so that what it counts at first leaves that out.
            self.tokens = max(self.tokens, usage.completion_tokens)
        if usage.prompt_tokens is not None:
            self.prompt_tokens = usage.prompt_tokens

    def _stop(self, obstacle: str) -> None:
        self.obstacle = self.obstacle or obstacle
        self._pieces, self._thoughts = [], []


def _end_of_first(events: bytes) -> int:
    at = events.find(b"\n\n")
    return at + 2 if at >= 0 else 0


_SHAPE = re.compile(rb'(data: \{[^\n]*?"(?:content|text)": ?")(?:[^"\\\n]|\\.)+("[^\n]*\})\n\n').match


def _texts(events: bytes) -> list[str] | None:
    """Return the texts of events that differ in nothing else, as those of engines do, None if these are not such.

    This takes an eighth of the time of decoding each. It is safe, since what is found between texts holds line feeds,
    which no string of JSON does, and what holds more than a text is no list of strings.
    """
    shape = _SHAPE(events)
    if shape is None:
        return None
    head, tail = shape.groups()
    end = -len(tail)
    texts = [line[len(head) : end] for line in events.split(b"\n")[:-2:2]]
    if head + (tail + b"\n\n" + head).join(texts) + tail + b"\n\n" != events:
        return None
    text = _decode(shape[0][6:]).text_alone()
    try:
        found = _decode_texts(b'["%b"]' % b'","'.join(texts))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found if text and found[0] == text and all(found) else None
