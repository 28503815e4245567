"""What a request is like, as far as the choice of a model goes by it. Pure.

Read from the body as OpenAI's and Anthropic's APIs have it. What is not as it should be there is passed over: the
server that gets the request says what is wrong with it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import msgspec

from proxy.naming import Prefer
from proxy.routing import tasks
from proxy.routing.complexity import Model as ComplexityModel
from proxy.routing.wishes import Level, Wishes
from proxy.telemetry import OPERATIONS

Fields = Mapping[str, msgspec.Raw]
Need = Literal["tools", "json_mode", "json_schema", "logprobs"]

# Operations whose request is a text to be answered, of which task and complexity are read.
_TALKS = frozenset(("chat", "text_completion", "responses", "messages", "count_tokens"))
_HEARS = frozenset(("transcription", "translation"))
_ASKING = frozenset(("messages", "input", "prompt"))  # what holds the text that is to be answered, or more of it
_TEXTS = (*_ASKING, "system", "instructions", "query", "documents")
_EACH_MESSAGE = 4  # tokens that a template puts around one
_EACH_MEDIUM = 800  # tokens of a picture of middling size
_LATIN = 4.0  # letters of a token
_WIDE = 0.2  # of a token, for each byte that UTF-8 takes of a letter beyond the first


class Features(msgspec.Struct, frozen=True):
    """What a request is like.

    tokens: of its prompt, estimated. max_tokens: of its answer, None where it does not say. complexity: 0 to 1, None
    where nothing was read or said but its level. languages: that it is written in, or that it asks for, as far as that
    is known. prefer: of the request itself. context, speed, quality: see wishes.Requirements.
    """

    task: str = tasks.GENERAL
    level: Level = "medium"
    complexity: float | None = None
    tokens: float = 0.0
    max_tokens: int | None = None
    modalities: frozenset[str] = frozenset(("text",))
    languages: frozenset[str] = frozenset()
    needs: tuple[Need, ...] = ()
    region: str | None = None
    budget_limit: float | None = None
    prefer: Prefer | None = None
    context: int | None = None
    speed: float | None = None
    quality: float | None = None


class Judge(msgspec.Struct, frozen=True):
    """What tells task and complexity. simple, complex: below and from which complexity a prompt is so."""

    tasks: tuple[tasks.Task, ...]
    complexity: ComplexityModel
    simple: float
    complex: float

    def level(self, complexity: float) -> Level:
        """Return the word for a complexity."""
        if complexity >= self.complex:
            return "complex"
        return "simple" if complexity < self.simple else "medium"


def read(path: str, fields: Fields, wishes: Wishes, judge: Judge) -> Features:
    """Read the features of a request. What it says itself counts for more than what it looks like."""
    operation = OPERATIONS.get(path, "chat")
    talk = _Talk()
    for name in _TEXTS:
        if name in fields:
            talk.add(fields[name], asks=name in _ASKING)
    asked = wishes.requirements
    complexity, level = _complexity(wishes, operation, talk, judge)
    found = language(talk.last) if operation in _TALKS and not asked.languages else None
    heard = ("audio",) if operation in _HEARS else ()
    return Features(
        task=wishes.task_type or (tasks.classify(talk.last, judge.tasks) if operation in _TALKS else operation),
        level=level,
        complexity=complexity,
        tokens=talk.tokens + sum(len(fields[name]) / _LATIN for name in ("tools", "functions") if name in fields),
        max_tokens=asked.max_tokens or _max_tokens(fields),
        modalities=frozenset(("text", *talk.media, *asked.modalities, *heard)),
        languages=frozenset(asked.languages or ((found,) if found else ())),
        needs=tuple(need for need, reads in _NEEDS.items() if getattr(asked, need) or reads(fields)),
        region=asked.region,
        budget_limit=wishes.budget_limit,
        prefer=wishes.prefer,
        context=asked.context,
        speed=asked.speed,
        quality=asked.quality,
    )


def _complexity(wishes: Wishes, operation: str, talk: "_Talk", judge: Judge) -> tuple[float | None, Level]:
    said = wishes.complexity
    if isinstance(said, str):
        return None, said
    if said is None and operation not in _TALKS:
        return None, "medium"
    complexity = judge.complexity.score(talk.last) if said is None else said
    return complexity, judge.level(complexity)


# What a body says: texts, turns and media


class _Part(msgspec.Struct):
    """A turn, or a part of one."""

    role: str | None = None
    type: str | None = None
    text: str | None = None
    content: "str | list[str | _Part] | None" = None
    tool_calls: msgspec.Raw = msgspec.Raw()
    arguments: str | None = None
    output: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(str | list[str | int | _Part | list[int]] | None).decode
_MEDIA = {
    **dict.fromkeys(("image_url", "input_image", "image"), "image"),
    **dict.fromkeys(("audio_url", "input_audio", "audio"), "audio"),
    **dict.fromkeys(("video_url", "input_video", "video"), "video"),
}


class _Talk:
    """What was said so far, in whatever field."""

    __slots__ = ("last", "media", "tokens")

    def __init__(self) -> None:
        # All mutable state: the estimate, what there is beside text, and the text that is to be answered.
        self.tokens = 0.0
        self.media: set[str] = set()
        self.last = ""

    def __repr__(self) -> str:
        return f"<_Talk {self.tokens:.0f} tokens {sorted(self.media)}>"

    def add(self, raw: msgspec.Raw, *, asks: bool) -> None:
        """Read a field."""
        try:
            said = _decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        for item in [said] if isinstance(said, str) else said or ():
            if isinstance(item, _Part):
                self._turn(item)
            elif isinstance(item, str):
                self.tokens += tokens(item)
                self.last = item if asks else self.last
            else:
                self.tokens += len(item) if isinstance(item, list) else 1

    def _turn(self, turn: _Part) -> None:
        texts = list(self._texts(turn))
        self.tokens += _EACH_MESSAGE + sum(map(tokens, texts))
        self.tokens += (len(turn.tool_calls) + len(turn.output) + len(turn.arguments or "")) / _LATIN
        if turn.role == "user" and (text := "\n".join(texts)):
            self.last = text

    def _texts(self, part: _Part) -> Iterable[str]:
        if medium := _MEDIA.get(part.type or ""):
            self.media.add(medium)
            self.tokens += _EACH_MEDIUM
        if part.text:
            yield part.text
        for inner in [part.content] if isinstance(part.content, str) else part.content or ():
            if isinstance(inner, _Part):
                yield from self._texts(inner)
            else:
                yield inner


def tokens(text: str) -> float:
    """Estimate the tokens of a text, by its letters: most vocabularies have few words of other than Latin ones."""
    if text.isascii():
        return len(text) / _LATIN
    return len(text) / _LATIN + (len(text.encode("utf-8", "surrogatepass")) - len(text)) * _WIDE


# What a body asks for


def _value(fields: Fields, name: str) -> Any:
    if name not in fields:
        return None
    try:
        return msgspec.json.decode(fields[name])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _max_tokens(fields: Fields) -> int | None:
    given = [_value(fields, name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
    return max((n for n in given if isinstance(n, int) and n > 0), default=None)


def _uses_tools(fields: Fields) -> bool:
    there = any(
        len(fields[name]) > 2 and bytes(fields[name]) != b"null" for name in ("tools", "functions") if name in fields
    )
    return there and _value(fields, "tool_choice") != "none"


def _format(fields: Fields) -> str | None:
    """Return the type of the format that an answer is to have, of chats or of responses."""
    chosen = _value(fields, "response_format")
    if chosen is None and isinstance(text := _value(fields, "text"), dict):
        chosen = text.get("format")
    kind = chosen.get("type") if isinstance(chosen, dict) else None
    return kind if isinstance(kind, str) else None


def _wants_schema(fields: Fields) -> bool:
    return _format(fields) == "json_schema" or "guided_json" in fields or "structured_outputs" in fields


def _wants_logprobs(fields: Fields) -> bool:
    """Chats say true, completions a number, of which 0 is one as well."""
    said = _value(fields, "logprobs")
    return said is True or (isinstance(said, int) and said is not False)


_NEEDS: dict[Need, Callable[[Fields], bool]] = {
    "tools": _uses_tools,
    "json_mode": lambda fields: _format(fields) == "json_object",
    "json_schema": _wants_schema,
    "logprobs": _wants_logprobs,
}


# What it is written in

_SCRIPTS = (
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("ko", re.compile(r"[\uac00-\ud7af]")),
    ("zh", re.compile(r"[\u3400-\u9fff]")),
    ("uk", re.compile(r"[іїєґІЇЄҐ]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
    ("he", re.compile(r"[\u0590-\u05ff]")),
    ("el", re.compile(r"[\u0370-\u03ff]")),
    ("hi", re.compile(r"[\u0900-\u097f]")),
    ("th", re.compile(r"[\u0e00-\u0e7f]")),
)
# Words that no other language in Latin letters has.
_ENGLISH = re.compile(
    r"\b(?:the|and|what|how|why|who|which|you|your|please|write|this|with|does|should|would|from)\b", re.IGNORECASE
)
_READ = 400  # letters


def language(text: str) -> str | None:
    """Return the language of a text, where its script or, for English, its words tell; None where they do not."""
    text = text[:_READ]
    if not text.isascii():
        letters = sum(map(str.isalpha, text))
        for name, script in _SCRIPTS:
            if len(script.findall(text)) * _SHARE.get(name, 4) > letters:
                return name
    return "en" if len(set(map(str.lower, _ENGLISH.findall(text)))) > 1 else None


# A script counts from a fourth of the letters on; Japanese and Ukrainian are known by few.
_SHARE = {"ja": 10, "uk": 50}
