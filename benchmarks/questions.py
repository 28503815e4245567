"""What `make chaos` asks, and how each answer is judged. Pure.

The real engines answer greedily, so that their answer to a question is known from before the faults. The cloud, which
is simulated, says "simulated token 1 simulated token 2 ...", and goes on with a text where it would have been. So every
word of an answer can be checked, also when several have spoken it:

1. the engines alone: exactly what they had said undisturbed;
2. the cloud alone: exactly so many simulated words;
3. the cloud after an engine: a beginning of what the engines say, then simulated words, as many as were asked for;
4. an engine after the cloud: it goes on with words that are its own. That it ends well is all that can be checked;
5. the same after an engine and the cloud.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

HOME: Final = "smollm2"  # the engines, then the cloud
FAR: Final = "far"  # the cloud, then the engines

_PROMPTS: Final = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write one sentence about the sea.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What is a prime number?",
    "Tell me a short story about a dog.",
    "How do birds fly?",
)
_SIMULATED: Final = re.compile(r"\bsimulated\b|\btoken \d+")
_LATE_TOKENS: Final = 4  # that a count of tokens may be off by when several have spoken: see proxy.continuation


class Question(msgspec.Struct, frozen=True):
    """One request. number: chooses the prompt."""

    model: str
    number: int
    stream: bool

    @property
    def max_tokens(self) -> int:
        return 24 + 8 * (self.number % 4)

    @property
    def body(self) -> dict[str, Any]:
        asked = {"model": self.model, "temperature": 0, "max_tokens": self.max_tokens, "stream": self.stream}
        usage = {"stream_options": {"include_usage": True}} if self.stream else {}
        return {**asked, **usage, "messages": [{"role": "user", "content": _PROMPTS[self.number % len(_PROMPTS)]}]}


QUESTIONS: Final = tuple(Question(HOME, number, stream=False) for number in range(len(_PROMPTS)))


class Said(msgspec.Struct, frozen=True):
    """An answer that is whole. tokens: of the answer, as its usage tells."""

    text: str
    finish: str
    tokens: int


class Unsound(Exception):
    """An answer that no client should see; says what is wrong."""


def read(question: Question, status: int, body: bytes) -> Said:
    """Read an answer. Raises Unsound where it is an error, no JSON, or a stream that does not look whole."""
    if status != 200:
        raise Unsound(f"status {status}: {body[:300].decode(errors='replace')}")
    try:
        return _read_stream(body) if question.stream else _read_document(json.loads(body))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Unsound(f"not an answer: {error!r}: {body[-300:].decode(errors='replace')}") from error


def _read_document(document: Mapping[str, Any]) -> Said:
    (choice,) = document["choices"]
    return Said(choice["message"]["content"], choice["finish_reason"], document["usage"]["completion_tokens"])


def _read_stream(body: bytes) -> Said:
    events = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    if not events or events.count("[DONE]") != 1 or events[-1] != "[DONE]":
        raise Unsound(f"a stream that does not end in one [DONE]: {events[-2:]}")
    chunks = [json.loads(event) for event in events[:-1]]
    if errors := [chunk["error"] for chunk in chunks if "error" in chunk]:
        raise Unsound(f"an error in a stream: {errors[0]}")
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    roles = [c["delta"]["role"] for c in choices if c["delta"].get("role")]
    finishes = [c["finish_reason"] for c in choices if c.get("finish_reason")]
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    ids = {chunk["id"] for chunk in chunks}
    for what, count in (("roles", len(roles)), ("finishes", len(finishes)), ("usages", len(usages)), ("ids", len(ids))):
        if count != 1:
            raise Unsound(f"a stream with {count} {what}")
    text = "".join(c["delta"].get("content") or "" for c in choices)
    return Said(text, finishes[0], usages[0]["completion_tokens"])


def judge(question: Question, said: Said, known: Said) -> str:
    """Return who has spoken, as "engine, cloud". Raises Unsound for words that nobody said.

    known: what the engines say to this question when nothing disturbs them.
    """
    if not said.text:
        raise Unsound("an empty answer")
    if said.text == simulated(0, question.max_tokens):  # 2
        return _whole("cloud", said, question, exactly=True)
    if (said.text, said.finish) == (known.text, known.finish):  # 1
        return "engine"
    if _ends_simulated(said.text, known.text, question.max_tokens):  # 3
        return _whole("engine, cloud", said, question, exactly=False)
    if said.text.startswith("simulated"):  # 4
        return "cloud, engine"
    if said.text[:1] == known.text[:1] and _SIMULATED.search(said.text):  # 5
        return "engine, cloud, engine"
    raise Unsound(f"{said.finish} {said.text!r} is not {known.finish} {known.text!r}")


def simulated(first: int, count: int) -> str:
    """Return so many words of the simulator, from a number on."""
    words = (("simulated", "token", str(i // 3 + 1))[i % 3] for i in range(first, first + count))
    return " ".join(words)


def _whole(who: str, said: Said, question: Question, *, exactly: bool) -> str:
    missing = question.max_tokens - said.tokens
    if said.finish != "length" or abs(missing) > (0 if exactly else _LATE_TOKENS):
        raise Unsound(f"{said.finish} after {said.tokens} of {question.max_tokens} tokens: {said.text!r}")
    return who


def _ends_simulated(text: str, known: str, most: int) -> bool:
    """Say whether a text is a beginning of what is known, and then words of the simulator, which follow each other."""
    parts = (text[at:].strip() for at in range(_shared(text, known), 0, -1))
    return any(part == simulated(first, part.count(" ") + 1) for part in parts if part for first in range(most))


def _shared(a: str, b: str) -> int:
    """Return the length of the beginning that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
