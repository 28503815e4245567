"""A preset put into a request: its system prompt in front, its defaults where the client says nothing. Pure.

The system prompt is merged with the client's own, before it, since many templates take no second one. Messages keep
their bytes; only a first message that is the client's system prompt is written anew.
"""

from collections.abc import Callable

import msgspec

from proxy import wire
from proxy.errors import BadRequest
from proxy.registry import Preset

Fields = dict[str, msgspec.Raw]

_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode = msgspec.json.Decoder().decode
_BETWEEN = "\n\n"
# Fields that say the same: a default for one is none for who gives another.
_SAME = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def applied(preset: Preset, path: str, fields: Fields) -> Fields:
    """Return the fields of a request with a preset put in.

    It has a meaning at the paths of chats and completions only; at others the fields stay as they are. Raises
    BadRequest where a prompt is given as tokens, which a system prompt cannot be put before.
    """
    if path not in _SYSTEMS:
        return fields
    changed = dict(fields)
    if preset.system:
        _SYSTEMS[path](changed, preset.system)
    if path not in _NO_DEFAULTS:
        changed.update(_defaults(preset, path, fields))
    return changed


def _defaults(preset: Preset, path: str, fields: Fields) -> Fields:
    limited = any(_given(fields, name) for name in _SAME)
    found = {}
    for name, value in preset.defaults.items():
        if name in _SAME and limited:
            continue
        name = "max_output_tokens" if name in _SAME and path == "/v1/responses" else name
        if not _given(fields, name):
            found[name] = value
    return found


def _given(fields: Fields, name: str) -> bool:
    return name in fields and bytes(fields[name]) != b"null"


def _messages(fields: Fields, system: str) -> None:
    """Of chats: a first message of the role system or developer is merged with, or one is put in front."""
    try:
        items = _decode_items(fields.get("messages", msgspec.Raw(b"[]")))
        first = _decode_object(items[0]) if items else {}
    except msgspec.DecodeError:
        return  # the server says what is wrong with them
    if bytes(first.get("role", b"")) in (b'"system"', b'"developer"'):
        first["content"] = _merged(first.get("content"), system)
        items[0] = msgspec.Raw(wire.encode(first))
    else:
        items.insert(0, msgspec.Raw(wire.encode({"role": "system", "content": system})))
    fields["messages"] = msgspec.Raw(wire.encode(items))


def _merged(own: msgspec.Raw | None, system: str) -> msgspec.Raw:
    """Put a system prompt before another, which is a text, or a list of parts."""
    given = None if own is None else _decode(own)
    if isinstance(given, list) and own is not None:
        part = msgspec.Raw(wire.encode({"type": "text", "text": system}))
        return msgspec.Raw(wire.encode([part, *_decode_items(own)]))
    return msgspec.Raw(wire.encode(f"{system}{_BETWEEN}{given}" if isinstance(given, str) and given else system))


def _field(name: str) -> Callable[[Fields, str], None]:
    """Of responses and messages: a field holds the system prompt."""

    def put(fields: Fields, system: str) -> None:
        fields[name] = _merged(fields.get(name), system)

    return put


def _prompt(fields: Fields, system: str) -> None:
    """Of completions, which know no system: it begins each prompt."""
    given = _decode(fields.get("prompt", msgspec.Raw(b"null")))
    if isinstance(given, str):
        fields["prompt"] = msgspec.Raw(wire.encode(f"{system}{_BETWEEN}{given}"))
    elif isinstance(given, list) and all(isinstance(item, str) for item in given):
        fields["prompt"] = msgspec.Raw(wire.encode([f"{system}{_BETWEEN}{item}" for item in given]))
    elif given is not None:
        raise BadRequest(
            "prompt: this preset has a system prompt, so the prompt must be text, not tokens.", param="prompt"
        )


_SYSTEMS: dict[str, Callable[[Fields, str], None]] = {
    "/v1/chat/completions": _messages,
    "/v1/completions": _prompt,
    "/v1/responses": _field("instructions"),
    "/v1/messages": _field("system"),
    "/v1/messages/count_tokens": _field("system"),
}
_NO_DEFAULTS = frozenset(("/v1/messages/count_tokens",))
