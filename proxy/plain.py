"""Messages with nothing in them but text and tool calls, as nearly all are. Pure."""

import msgspec


class _Plain(msgspec.Struct, forbid_unknown_fields=True):
    """A message or a part of one."""

    role: str = ""
    type: str | None = None
    content: "str | list[str | _Plain] | None" = None
    text: str | None = None
    name: str | None = None
    id: str | None = None
    cache_control: msgspec.Raw = msgspec.Raw()
    tool_calls: msgspec.Raw = msgspec.Raw()
    tool_call_id: str | None = None
    tool_use_id: str | None = None
    input: msgspec.Raw = msgspec.Raw()
    call_id: str | None = None
    arguments: str | None = None
    output: str | None = None
    is_error: bool | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    thinking: str | None = None
    signature: str | None = None
    status: str | None = None


_decode = msgspec.json.Decoder(str | int | list[str | int | _Plain] | None).decode


def items(value: msgspec.Raw) -> int | None:
    """Return how many items a value has, 1 where it is no list; None where it has a key that may stand for media."""
    try:
        found = _decode(value)
    except msgspec.ValidationError:
        return None
    return len(found) if isinstance(found, list) else 1
