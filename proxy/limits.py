"""How much one request may ask for. Pure: the fields of a body in, nothing or BadRequest out.

A field that is not there costs nothing, and a value is decoded only where its bytes could be too many: an item of a
list takes two bytes at least, and a document is as deep as it has opening brackets at most.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from operator import sub
from typing import Annotated

import msgspec
from msgspec import Meta

from proxy import plain
from proxy.errors import BadRequest

Fields = Mapping[str, msgspec.Raw]
Limit = Annotated[int, Meta(ge=0)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The most that one request may hold; more gets 400 with the field and the limit.

    n, best_of: answers to one prompt, and `n` times the prompts are no more than `prompts`. logprobs: for each token.
    prompts: of one completion. inputs: texts to embed, rank or score. messages: of a chat, items of `input` of a
    response included. stop: strings, of stop_chars each. token_lists: entries of logit_bias, bad_words,
    stop_token_ids and the like. images: pictures, sounds and videos together. depth: of nesting in the JSON.
    schema_bytes: a JSON schema, a grammar or one tool. regex_chars: a regular expression. choices: of a guided choice.
    """

    n: Limit = 16
    best_of: Limit = 16
    logprobs: Limit = 20
    prompts: Limit = 256
    inputs: Limit = 2048
    messages: Limit = 4096
    tools: Limit = 512
    stop: Limit = 16
    stop_chars: Limit = 1024
    token_lists: Limit = 4096
    images: Limit = 100
    depth: Annotated[int, Meta(ge=4, le=400)] = 100
    schema_bytes: Limit = 131072
    regex_chars: Limit = 4096
    choices: Limit = 1024


Rule = Callable[[str, bytes, Limits], None]

_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_integer = msgspec.json.Decoder(int | bool | None).decode
_text = msgspec.json.Decoder(str).decode


def check(path: str, body: bytes, fields: Fields, limits: Limits) -> msgspec.Raw | None:
    """Raise BadRequest naming the field and the limit if a request asks for too much.

    path: where it was sent. body: the document, or b"" if it is a form. fields: what is at its top. Return the messages
    if these had to be read and are plain, so that nobody needs to read them again to know that.
    """
    for name in fields.keys() & _RULES.keys():
        _RULES[name](name, bytes(fields[name]), limits)
    if "prompt" in fields and "n" in fields:
        _check_answers(fields, limits)
    if "input" in fields:
        _input(path, bytes(fields["input"]), limits)
    inside = limits.depth - 1
    if _openings(body, inside) > inside and any(deeper_than(bytes(value), inside) for value in fields.values()):
        raise BadRequest(f"The body is nested too deeply; {_at_most(limits.depth, 'depth')}.", code="json_too_deep")
    return _messages(fields["messages"], limits.messages) if "messages" in fields else None


def _messages(value: msgspec.Raw, most: int) -> msgspec.Raw | None:
    if len(value) <= 2 * most:
        return None
    plainly = plain.items(value)
    if (found := length(bytes(value)) if plainly is None else plainly) > most:
        raise too_many("messages", f"{found} items", most, "messages")
    return None if plainly is None else value


_LOOKS = 2  # levels at which values are looked at one by one; most have few brackets, and are done with


def deeper_than(document: bytes, depth: int, looks: int = _LOOKS) -> bool:
    """Say whether a valid JSON document has more than `depth` objects and arrays inside one another.

    Its values are looked at one by one, and theirs, for so many levels; below, brackets are counted, since to look at
    each level of a deep document would take the square of its length.
    """
    first = document.lstrip()[:1]
    if first not in (b"{", b"[") or _openings(document, depth) <= depth:
        return False
    if depth == 0 or not looks:
        return _depth(_brackets(document)) > depth
    return any(deeper_than(bytes(inner), depth - 1, looks - 1) for inner in _inside(document))


def _depth(brackets: bytes) -> int:
    """Return how deep they go. An opening one is 91, a closing one 93, so each is one off 92, up or down."""
    return max(map(sub, itertools.count(92, 92), itertools.accumulate(brackets)), default=0)


_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _brackets(document: bytes) -> bytes:
    """Return the brackets of a document, those in its strings left out, and all of one kind."""
    if b"\\" in document:
        document = document.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(document.split(b'"')[::2]).translate(_TO_SQUARE, _NO_BRACKETS)


def _openings(document: bytes, enough: int) -> int:
    """Count opening brackets, those in strings included, until there are more than enough.

    Searching costs by the bracket, of which most documents have few; counting would cost by the byte.
    """
    found = 0
    for bracket in (b"{", b"["):
        at = document.find(bracket)
        while at >= 0 and found <= enough:
            found += 1
            at = document.find(bracket, at + 1)
    return found


def _inside(document: bytes) -> list[msgspec.Raw]:
    if document.lstrip()[:1] == b"[":
        return _list(document)
    return list(_object(document).values())


def too_many(name: str, what: str, most: int, setting: str) -> BadRequest:
    """Make the error for a field that holds more than it may."""
    return BadRequest(f"{name}: {what}; {_at_most(most, setting)}.", param=name, code="limit_exceeded")


def _at_most(most: int, setting: str) -> str:
    return f"this server takes at most {most} (limits.{setting})"


# The rules


def _number(setting: str) -> Rule:
    """The value is an integer from 0 to the limit. Negative ones are refused: vLLM takes -1 for "all"."""

    def rule(name: str, value: bytes, limits: Limits) -> None:
        most = getattr(limits, setting)
        try:
            number = _integer(value) or 0
        except msgspec.ValidationError:
            raise BadRequest(f"{name}: expected an integer.", param=name) from None
        if not 0 <= number <= most:
            raise too_many(name, f"{number} is out of range" if abs(number) < 10**9 else "out of range", most, setting)

    return rule


def _count(setting: str) -> Rule:
    """The value has no more items than the limit, if it is a list or an object."""

    def rule(name: str, value: bytes, limits: Limits) -> None:
        most = getattr(limits, setting)
        if len(value) > 2 * most and (items := length(value)) > most:
            raise too_many(name, f"{items} items", most, setting)

    return rule


def _size(setting: str) -> Rule:
    """The value is no longer than the limit, in bytes as it was sent."""

    def rule(name: str, value: bytes, limits: Limits) -> None:
        if len(value) > getattr(limits, setting):
            raise too_many(name, f"{len(value)} bytes", getattr(limits, setting), setting)

    return rule


def length(value: bytes) -> int:
    """Return how many items a list or an object has; 1 for anything else."""
    return len(_inside(value)) if value[:1] in (b"[", b"{") else 1


def _batch(setting: str) -> Rule:
    """As _count, but a list of numbers is one text as tokens."""
    count = _count(setting)

    def rule(name: str, value: bytes, limits: Limits) -> None:
        if value[:1] == b"[" and not value[1:].lstrip()[:1].isdigit():
            count(name, value, limits)

    return rule


def _input(path: str, value: bytes, limits: Limits) -> None:
    rule = _count("messages") if path == "/v1/responses" else _batch("inputs")
    rule("input", value, limits)


def _stop(name: str, value: bytes, limits: Limits) -> None:
    _count("stop")(name, value, limits)
    for item in _list(value) if value[:1] == b"[" else [value]:
        _size("stop_chars")(name, bytes(item), limits)


def _tools(name: str, value: bytes, limits: Limits) -> None:
    _count("tools")(name, value, limits)
    if len(value) > limits.schema_bytes and value[:1] == b"[":
        for tool in _list(value):
            _size("schema_bytes")(name, bytes(tool), limits)


_COUNTS = re.compile(r"\{([\s\d,]*)\}")  # one class alone: parts that overlap take the cube of the length
_COUNT = re.compile(r"\d+")
_MOST_REPEATS = 10_000


def _regex(name: str, value: bytes, limits: Limits) -> None:
    """A short expression with a large {count} is unrolled into a large automaton, so counts have a limit too."""
    _size("regex_chars")(name, value, limits)
    if value[:1] == b'"' and any(_is_too_many(n) for m in _COUNTS.finditer(_text(value)) for n in _COUNT.findall(m[1])):
        raise BadRequest(f"{name}: a repetition of more than {_MOST_REPEATS} times.", param=name, code="limit_exceeded")


def _is_too_many(count: str) -> bool:
    return len(count) > len(str(_MOST_REPEATS)) or int(count) > _MOST_REPEATS


def _choice(name: str, value: bytes, limits: Limits) -> None:
    _count("choices")(name, value, limits)
    _size("schema_bytes")(name, value, limits)


def _structured(name: str, value: bytes, limits: Limits) -> None:
    """vLLM's structured_outputs: an object of json, regex, choice, grammar or structural_tag."""
    _size("schema_bytes")(name, value, limits)
    inner = _object(value) if value[:1] == b"{" else {}
    for key in inner.keys() & _STRUCTURED.keys():
        _STRUCTURED[key](f"{name}.{key}", bytes(inner[key]), limits)


def _check_answers(fields: Fields, limits: Limits) -> None:
    value = bytes(fields["prompt"])
    several = value[:1] == b"[" and not value[1:].lstrip()[:1].isdigit()
    answers = (_integer(fields["n"]) or 1) * (length(value) if several else 1)
    if several and answers > limits.prompts:
        raise too_many("n", f"n times the prompts are {answers}", limits.prompts, "prompts")


_STRUCTURED: dict[str, Rule] = {
    "regex": _regex, "whitespace_pattern": _regex, "choice": _choice,
}  # fmt: skip

_RULES: dict[str, Rule] = {
    "n": _number("n"),
    "best_of": _number("best_of"),
    "logprobs": _number("logprobs"),
    "top_logprobs": _number("logprobs"),
    "prompt_logprobs": _number("logprobs"),
    "prompt": _batch("prompts"),
    "previous_input_messages": _count("messages"),
    "tools": _tools,
    "functions": _tools,
    "stop": _stop,
    "stop_sequences": _stop,
    **dict.fromkeys(
        ("logit_bias", "bad_words", "stop_token_ids", "allowed_token_ids", "logprob_token_ids"), _count("token_lists")
    ),
    **dict.fromkeys(
        ("documents", "queries", "items", "text_1", "text_2", "data_1", "data_2"), _count("inputs")
    ),
    **dict.fromkeys(
        ("response_format", "text", "output_config", "guided_json", "guided_grammar"), _size("schema_bytes")
    ),
    "guided_regex": _regex,
    "guided_whitespace_pattern": _regex,
    "guided_choice": _choice,
    "structured_outputs": _structured,
}  # fmt: skip
