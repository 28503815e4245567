"""What a request says of how it is to be routed: `routing` in its body, or `x-polyvox-*` headers. Pure.

    x-polyvox-task: legal              as routing.task_type
    x-polyvox-complexity: complex      as routing.complexity, a word or 0 to 1
    x-polyvox-budget: 0.01             as routing.budget_limit, USD
    x-polyvox-prefer: cost             as routing.prefer
    x-polyvox-region: eu               as routing.requirements.region
    x-polyvox-languages: ru,en         as routing.requirements.languages
    x-polyvox-explain: 1               the answer says in x-polyvox-route why it is from this model

What the body says counts for more.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from proxy.errors import BadRequest
from proxy.mistakes import dotted, located
from proxy.naming import Prefer
from proxy.routing.traits import Language, Modality, Region, Score

FIELD = "routing"

Level = Literal["simple", "medium", "complex"]
Tokens = Annotated[int, Meta(ge=1, le=2**40)]
Complexity = Annotated[float, Meta(ge=0, le=1)]


class Requirements(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model must have, beside what the request shows by itself.

    context: tokens that prompt and answer need together. max_tokens: of the answer. speed, quality: scores that are not
    to be less.
    """

    max_tokens: Tokens | None = None
    context: Tokens | None = None
    languages: tuple[Language, ...] = ()
    modalities: tuple[Modality, ...] = ()
    tools: bool = False
    json_mode: bool = False
    json_schema: bool = False
    logprobs: bool = False
    region: Region | None = None
    speed: Score | None = None
    quality: Score | None = None


class Wishes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request says of its routing. budget_limit: USD that it may cost, by the estimate."""

    task_type: str | None = None
    complexity: Complexity | Level | None = None
    budget_limit: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    prefer: Prefer | None = None
    requirements: Requirements = Requirements()


_decode = msgspec.json.Decoder(Wishes).decode


def are_in(fields: Mapping[str, msgspec.Raw], headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Say whether a request says anything of its routing."""
    return FIELD in fields or not NAMES.isdisjoint(dict(headers))


def read(
    fields: Mapping[str, msgspec.Raw], headers: Iterable[tuple[bytes, bytes]], tasks: Collection[str]
) -> tuple[Wishes, bool]:
    """Return the wishes of a request, and whether it wants the choice explained. Raises BadRequest.

    tasks: the names there are.
    """
    said = _of_body(fields.get(FIELD))
    in_body, explain = said.task_type is not None, False
    for name, value in headers:
        if name.startswith(b"x-polyvox-"):
            text = value.decode("latin-1").strip()
            if name == _EXPLAIN:
                explain = _flag(text)
            elif name in _HEADERS and text:
                said = _with_header(said, name, text)
    if said.task_type is not None and said.task_type not in tasks:
        raise _no_task("routing.task_type" if in_body else "x-polyvox-task", said.task_type, tasks)
    return said, explain


def _of_body(raw: msgspec.Raw | None) -> Wishes:
    if raw is None or bytes(raw) == b"null":
        return Wishes()
    try:
        return _decode(raw)
    except msgspec.ValidationError as e:
        path, said = located(e, Wishes)
        raise _bad(dotted((FIELD, *path)), _worded(path, said)) from None


def _with_header(said: Wishes, name: bytes, text: str) -> Wishes:
    """Add what a header says, unless the body says it."""
    path, convert = _HEADERS[name]
    holder = said.requirements if len(path) > 1 else said
    if getattr(holder, path[-1]) not in (None, ()):
        return said
    value: Any = convert(text)
    for step in reversed(path):
        value = {step: value}
    try:
        given = msgspec.convert(value, Wishes)
    except msgspec.ValidationError as e:
        raise _bad(name.decode(), _worded(*located(e, Wishes))) from None
    if len(path) == 1:
        return msgspec.structs.replace(said, **{path[0]: getattr(given, path[0])})
    new = {path[1]: getattr(given.requirements, path[1])}
    return msgspec.structs.replace(said, requirements=msgspec.structs.replace(said.requirements, **new))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


_HEADERS: dict[bytes, tuple[tuple[str, ...], Callable[[str], Any]]] = {
    b"x-polyvox-task": (("task_type",), str),
    b"x-polyvox-complexity": (("complexity",), _number),
    b"x-polyvox-budget": (("budget_limit",), _number),
    b"x-polyvox-prefer": (("prefer",), str),
    b"x-polyvox-region": (("requirements", "region"), str),
    b"x-polyvox-languages": (("requirements", "languages"), _items),
}
_EXPLAIN = b"x-polyvox-explain"
NAMES = frozenset((*_HEADERS, _EXPLAIN))


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "0", "false", ""):
        return text.lower() in ("1", "true")
    raise _bad("x-polyvox-explain", f"{text[:40]!r} is none of 1, 0")


def _worded(path: tuple[str | int, ...], said: str) -> str:
    """Say of complexity, which is a number or a word, what it may be."""
    return "expected 0 to 1, or simple, medium, complex" if path[-1:] == ("complexity",) else said


def _no_task(field: str, task: str, tasks: Collection[str]) -> BadRequest:
    near = difflib.get_close_matches(task, tasks, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; tasks: {', '.join(tasks)}"
    return _bad(field, f"there is no task {task[:100]!r}{hint}")


def _bad(field: str, said: str) -> BadRequest:
    return BadRequest(f"{field}: {said}", param=field, code="invalid_routing")
