"""What is wrong with a value that does not fit its type: where, and which words or keys would do. Pure."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import inspect

Path = tuple[str | int, ...]

_ERROR_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_PATH_STEP = re.compile(r"\.(?P<key>[^.\[\]]+)|\[(?P<index>\d+|\.\.\.)\]")


def located(error: msgspec.ValidationError, kind: Any) -> tuple[Path, str]:
    """Return the place of an error below a value of a type, and what it says, with what would be right."""
    match = _ERROR_PATH.match(str(error))
    assert match
    steps = _PATH_STEP.finditer(match["path"] or "")
    found = tuple(int(s["index"]) if (s["index"] or "").isdigit() else s["key"] for s in steps)
    inner = tuple(step for step in found if step is not None)
    unknown = re.match(r"Object contains unknown field `(.*)`", match["what"])
    if unknown:
        return (*inner, unknown[1]), unknown_key(unknown[1], _fields_at(kind, inner))
    invalid = re.match(r"Invalid enum value (.*)", match["what"])
    if invalid:
        return inner, _none_of(invalid[1], _literals_at(kind, inner))
    if "matching regex" in match["what"] and isinstance(info := _info_at(kind, inner), inspect.Metadata):
        return inner, f"expected {(info.extra_json_schema or {})['description']}"
    return inner, match["what"][0].lower() + match["what"][1:]


def _none_of(word: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.strip("'"), allowed, n=1)
    return f"{word} is none of {', '.join(allowed)}" + (f"; did you mean {near[0]!r}?" if near else "")


def dotted(path: Path) -> str:
    """('models', 'a', 'endpoints', 0) -> 'models.a.endpoints[0]'."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Say that there is no such key, and what comes close or what there is."""
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")


def _fields_at(kind: Any, steps: Path) -> tuple[str, ...]:
    """Return the keys that the Struct at these steps below `kind` takes."""
    info = _info_at(kind, steps)
    fields = info.fields if isinstance(info, inspect.StructType) else ()
    return tuple(f.encode_name for f in fields)


def _literals_at(kind: Any, steps: Path) -> tuple[str, ...]:
    """Return the words that may stand at these steps below `kind`."""
    info = _info_at(kind, steps)
    return tuple(map(str, info.values)) if isinstance(info, inspect.LiteralType) else ()


def _info_at(kind: Any, steps: Path) -> inspect.Type:
    info = inspect.type_info(kind)
    for step in (*steps, None):
        if isinstance(info, inspect.UnionType):
            telling = (t for t in info.types if isinstance(t, inspect.LiteralType | inspect.StructType))
            info = next(telling, None) or next(t for t in info.types if not isinstance(t, inspect.NoneType))
        if isinstance(step, str) and isinstance(info, inspect.StructType):
            info = next(f.type for f in info.fields if f.name == step)
        elif isinstance(step, int) and isinstance(info, inspect.VarTupleType | inspect.ListType):
            info = info.item_type
    return info
