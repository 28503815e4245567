"""Messages: OpenAI's, one for each thing that was said, as Anthropic's, which take turns. Pure.

1. What system and developer messages say goes into `system`, in their order.
2. The results of tools are said by the user. Several messages of one role in a row become one turn.
3. Text that is empty is left out: Anthropic refuses it. So is white space at the end of the last turn, if that is the
   assistant's.
"""

import re
from typing import Any, Literal

import msgspec

from proxy.errors import BadRequest

ABSENT = msgspec.Raw()


def given(value: msgspec.Raw) -> msgspec.Raw | None:
    """Return a value of any shape, None where there is none or it is null."""
    return None if bytes(value) in (b"", b"null") else value


class _Url(msgspec.Struct, frozen=True):
    url: str


class _File(msgspec.Struct, frozen=True):
    file_data: str | None = None
    filename: str | None = None


class _Part(msgspec.Struct, frozen=True):
    type: str
    text: str = ""
    refusal: str = ""
    image_url: _Url | str | None = None
    file: _File | None = None
    cache_control: msgspec.Raw = ABSENT


class _Call(msgspec.Struct, frozen=True):
    name: str
    arguments: str = ""


class _ToolCall(msgspec.Struct, frozen=True):
    id: str
    function: _Call | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    """A message of a chat. thinking_blocks: as our answers have them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    thinking_blocks: list[msgspec.Raw] | None = None
    function_call: msgspec.Raw = ABSENT
    audio: msgspec.Raw = ABSENT


Block = dict[str, Any]


class Turn(msgspec.Struct):
    """What one side says until the other does."""

    role: str
    content: list[Any]

    def encoded(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content}


def unsupported(field: str, why: str) -> BadRequest:
    """Make the error for what Anthropic's API cannot be told."""
    return BadRequest(
        f"{field}: cannot be passed on to provider anthropic: it {why}.", param=field, code="unsupported_parameter"
    )


def turns(messages: list[ChatMessage]) -> tuple[list[Block], list[Turn]]:
    """Return `system` and `messages`. Raises BadRequest naming the message and part that cannot be said."""
    system: list[Block] = []
    result: list[Turn] = []
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if message.role in ("system", "developer"):
            system += _texts_only(_blocks(message, at), at)
        elif blocks := _said(message, at):
            role = "assistant" if message.role == "assistant" else "user"
            if not result or result[-1].role != role:
                result.append(Turn(role, []))
            result[-1].content += blocks
    if result and result[-1].role == "assistant":
        _trim(result[-1].content)
    return system, result


def _texts_only(blocks: list[Block], at: str) -> list[Block]:
    if any(block["type"] != "text" for block in blocks):
        raise unsupported(f"{at}.content", "may hold text only where the role is system or developer")
    return blocks


def _trim(content: list[Any]) -> None:
    if isinstance(content[-1], dict) and content[-1]["type"] == "text":
        content[-1]["text"] = content[-1]["text"].rstrip()


def _said(message: ChatMessage, at: str) -> list[Any]:
    for name in ("function_call", "audio"):
        if given(getattr(message, name)):
            raise unsupported(f"{at}.{name}", "has no counterpart there")
    if message.role == "tool":
        return [_tool_result(message, at)]
    if message.role != "assistant":
        return _blocks(message, at)
    calls = [_tool_use(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls or ())]
    return [*(message.thinking_blocks or ()), *_blocks(message, at), *calls]


def _tool_result(message: ChatMessage, at: str) -> Block:
    if not message.tool_call_id:
        raise BadRequest(f"{at}.tool_call_id: is needed where the role is tool", param=f"{at}.tool_call_id")
    result = {"type": "tool_result", "tool_use_id": _id(message.tool_call_id)}
    blocks = _blocks(message, at)
    return {**result, "content": blocks} if blocks else result


def _tool_use(call: _ToolCall, at: str) -> Block:
    if call.function is None:
        raise unsupported(f"{at}.type", "may be function only")
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        field = f"{at}.function.arguments"
        raise BadRequest(f"{field}: expected a JSON object", param=field) from None
    return {"type": "tool_use", "id": _id(call.id), "name": call.function.name, "input": arguments}


def _id(name: str) -> str:
    """Return the id of a call in the letters that Anthropic takes; those of other servers may have dots and colons."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


# Parts


def _blocks(message: ChatMessage, at: str) -> list[Block]:
    content = message.content
    if content is None or isinstance(content, str):
        return _text(content or "")
    return [block for i, part in enumerate(content) for block in _part(part, f"{at}.content[{i}]")]


def _text(text: str) -> list[Block]:
    return [{"type": "text", "text": text}] if text.strip() else []


def _part(part: _Part, at: str) -> list[Block]:
    if part.type in ("text", "refusal"):
        blocks = _text(part.text or part.refusal)
    elif part.type == "image_url" and part.image_url is not None:
        blocks = [_image(part.image_url if isinstance(part.image_url, str) else part.image_url.url, at)]
    elif part.type == "file" and part.file is not None and part.file.file_data is not None:
        blocks = [_document(part.file.file_data, part.file.filename, at)]
    else:
        raise unsupported(f"{at}.type", "may be text, image_url, or file with file_data")
    if blocks and (cache_control := given(part.cache_control)):
        blocks[0]["cache_control"] = cache_control
    return blocks


_DATA = re.compile(r"data:(?P<type>[a-z]+/[a-z0-9.+-]+)(?:;[^,;]*)*?;base64,(?P<data>[A-Za-z0-9+/=_\s-]*)", re.I)
_PICTURES = ("image/jpeg", "image/png", "image/gif", "image/webp")


def _image(url: str, at: str) -> Block:
    if url[:8].lower().startswith(("https://", "http://")):
        return {"type": "image", "source": {"type": "url", "url": url}}
    match = _DATA.fullmatch(url)
    kind = (match["type"].lower() if match else "").replace("image/jpg", "image/jpeg")
    if match is None or kind not in _PICTURES:
        raise unsupported(f"{at}.image_url.url", f"may be an http(s) URL, or data in base64 of {', '.join(_PICTURES)}")
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": match["data"]}}


def _document(data: str, name: str | None, at: str) -> Block:
    match = _DATA.fullmatch(data)
    if match is None or match["type"].lower() != "application/pdf":
        raise unsupported(f"{at}.file.file_data", "may be data in base64 of application/pdf")
    source = {"type": "base64", "media_type": "application/pdf", "data": match["data"]}
    return {"type": "document", "source": source, **({"title": name} if name else {})}
