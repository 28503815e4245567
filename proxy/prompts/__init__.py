"""Rewrites requests for what a model cannot take as it comes. Pure: bytes in, bytes out.

Most models take everything, or their server sees to it: they have no adapter (see proxy.prompts.adapters), and nothing
here is called. What needs no change keeps its bytes. For a chat, in this order:

1. Pictures are refused where the model takes none: leaving them out would answer another question.
2. A developer's message becomes a system message.
3. System messages go in front of the first user's message; or, where turns must alternate, those that come later become
   the user's.
4. Neighbours of one role are merged, so that turns alternate. Calls of tools and their results stay as they are.
5. `stop` gets what ends an answer; `max_tokens` and `temperature` are taken to the nearest value that is allowed.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import msgspec

from proxy import wire
from proxy.errors import BadRequest
from proxy.prompts.adapters import Adapter

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

Message = dict[str, Any]


class Adapted(msgspec.Struct, frozen=True):
    """A request as the model can take it. clamped: what was asked for that it cannot do, as `name=value`."""

    body: bytes
    clamped: tuple[str, ...] = ()


class _Role(msgspec.Struct, frozen=True):
    role: str = ""


class _Bounded(msgspec.Struct, frozen=True):
    """The fields of a request that may be changed, beside its messages."""

    stop: str | list[str] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None


_roles = msgspec.json.Decoder(list[_Role]).decode
_messages = msgspec.json.Decoder(list[Message]).decode
_top = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_bounded = msgspec.json.Decoder(_Bounded).decode


def adapt(path: str, body: bytes, adapter: Adapter) -> Adapted:
    """Return a request for a path of ours as an endpoint can take it.

    Raises BadRequest naming the field that it cannot take, or that has the wrong type.
    """
    if path not in (CHAT, COMPLETIONS):
        return Adapted(body)
    changes: dict[str, Any] = {}
    if path == CHAT and (messages := _adapted_messages(body, adapter)) is not None:
        changes["messages"] = messages
    clamped = _bound(_read(_bounded, body), adapter, changes) if _bounds(adapter) else ()
    return Adapted(wire.replace_fields(body, changes) if changes else body, clamped)


def _read(decode: Any, document: bytes, within: str = "") -> Any:
    """Decode a document. within: the field that it is, "" for the whole body. Raises BadRequest naming the field."""
    try:
        return decode(document)
    except msgspec.ValidationError as e:
        what, _, where = str(e).partition(" - at `$")
        field = f"{within}{where.rstrip('`')}".lstrip(".")
        raise BadRequest(f"{field}: {what[0].lower()}{what[1:]}", param=field) from None


# Messages


def _adapted_messages(body: bytes, adapter: Adapter) -> list[Message] | None:
    """Return the messages as the model takes them, None if it takes them as they are."""
    if not _may_need_change(body, adapter) or (raw := _top(body).get("messages")) is None:
        return None
    given = bytes(raw)
    if not adapter.images and b"image" in given:
        refuse_images(_read(_messages, given, "messages"))
    if not _needs_change([m.role for m in _read(_roles, given, "messages")], adapter):
        return None
    return rewritten(_read(_messages, given, "messages"), adapter)


def _may_need_change(body: bytes, adapter: Adapter) -> bool:
    """Say whether messages have to be looked at, from words that stand in whatever needs a change."""
    return (
        adapter.alternate
        or (not adapter.images and b"image" in body)
        or (adapter.merge_system and b"system" in body)
        or (adapter.developer_is_system and b"developer" in body)
    )


def _needs_change(roles: list[str], adapter: Adapter) -> bool:
    if adapter.developer_is_system and "developer" in roles:
        return True
    if adapter.merge_system and "system" in roles:
        return True
    return adapter.alternate and any(a == b or b == "system" for a, b in pairwise(roles))


def rewritten(messages: list[Message], adapter: Adapter) -> list[Message]:
    """Return messages with the roles, and in the order, that a model knows."""
    if adapter.developer_is_system:
        messages = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in messages]
    if adapter.merge_system:
        messages = _without_system(messages)
    elif adapter.alternate:
        messages = _system_in_front(messages)
    return _alternating(messages) if adapter.alternate else messages


def refuse_images(messages: Iterable[Message]) -> None:
    """Raise BadRequest naming the first part of a message that is a picture."""
    for i, message in enumerate(messages):
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and str(part.get("type")) in ("image_url", "image", "input_image"):
                field = f"messages[{i}].content[{j}]"
                raise BadRequest(
                    f"{field}: this model takes no images; send text, or ask a model whose modalities have image.",
                    param=field,
                    code="unsupported_content",
                )


def _without_system(messages: list[Message]) -> list[Message]:
    """Put what system messages say in front of the first user's message; where there is none, let the user say it."""
    system = [m for m in messages if m.get("role") == "system"]
    rest = [m for m in messages if m.get("role") != "system"]
    if not system:
        return messages
    said = _joined(system)
    first = next((i for i, m in enumerate(rest) if m.get("role") == "user"), None)
    if first is None:
        return [{"role": "user", "content": said}, *rest]
    merged = {**rest[first], "content": _together(said, rest[first].get("content"))}
    return [*rest[:first], merged, *rest[first + 1 :]]


def _system_in_front(messages: list[Message]) -> list[Message]:
    """Let the user say what a system message says that comes later than in front."""
    leading = next((i for i, m in enumerate(messages) if m.get("role") != "system"), len(messages))
    later = [{**m, "role": "user"} if m.get("role") == "system" else m for m in messages[leading:]]
    return [*messages[:leading], *later]


def _alternating(messages: list[Message]) -> list[Message]:
    turns: list[Message] = []
    for message in messages:
        if turns and _may_join(turns[-1], message):
            content = _together(turns[-1].get("content"), message.get("content"))
            turns[-1] = {**turns[-1], **message, "content": content}
        else:
            turns.append(message)
    return turns


def _may_join(one: Message, other: Message) -> bool:
    """Say whether two messages can be one: calls of tools and their results have places of their own."""
    same = one.get("role") == other.get("role") and one.get("role") != "tool"
    return same and not (one.get("tool_calls") or other.get("tool_calls"))


def _joined(messages: list[Message]) -> Any:
    said: Any = None
    for message in messages:
        said = _together(said, message.get("content"))
    return said


def _together(one: Any, other: Any) -> Any:
    """Join two contents: texts by a blank line, and lists of parts end to end."""
    if not one or not other:
        return one or other
    if isinstance(one, str) and isinstance(other, str):
        return f"{one}\n\n{other}"
    return [*_parts(one), *_parts(other)]


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


# What else is bounded


def _bounds(adapter: Adapter) -> bool:
    return bool(adapter.stop or adapter.max_tokens or adapter.temperature)


def _bound(asked: _Bounded, adapter: Adapter, changes: dict[str, Any]) -> tuple[str, ...]:
    """Note the fields that must be other than asked for; return those that a client has to know of."""
    clamped = []
    ranges = {
        "max_tokens": adapter.max_tokens,
        "max_completion_tokens": adapter.max_tokens,
        "temperature": adapter.temperature,
    }
    for name, limits in ranges.items():
        value = getattr(asked, name)
        if limits and value is not None and not limits[0] <= value <= limits[1]:
            changes[name] = min(max(value, limits[0]), limits[1])
            clamped.append(f"{name}={changes[name]:g}")
    if adapter.stop:
        own = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        changes["stop"] = list(dict.fromkeys([*own, *adapter.stop]))
    return tuple(clamped)


def text_of(message: Mapping[str, Any], at: str) -> str:
    """Return what a message says. Raises BadRequest for a part that is no text."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    for j, text in enumerate(texts):
        if not isinstance(text, str):
            field = f"{at}.content[{j}]"
            raise BadRequest(f"{field}: this model takes text only", param=field, code="unsupported_content")
    return "\n".join(t for t in texts if t is not None)
