"""A message of Anthropic's as a chat completion, and its errors in OpenAI's envelope. Pure."""

from typing import Any

import msgspec

from proxy import wire
from proxy.errors import MalformedAnswer

# What OpenAI calls the reasons of an end. Those that we do not know are ends as well.
FINISH = {
    "end_turn": "stop", "stop_sequence": "stop", "pause_turn": "stop", "max_tokens": "length",
    "model_context_window_exceeded": "length", "tool_use": "tool_calls", "refusal": "content_filter",
}  # fmt: skip


class _OutputDetails(msgspec.Struct, frozen=True):
    thinking_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens, None where a part of an answer does not tell. input_tokens are those that the cache had no part in."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    output_tokens_details: _OutputDetails | None = None

    def then(self, later: "Usage") -> "Usage":
        """Return these figures with those that a later event of a stream tells; they are cumulative."""
        told = {name: value for name in self.__struct_fields__ if (value := getattr(later, name)) is not None}
        return msgspec.structs.replace(self, **told)

    def for_openai(self) -> dict[str, Any]:
        """Return `usage` in OpenAI's names, where the tokens of a prompt are all of them."""
        read, written = self.cache_read_input_tokens or 0, self.cache_creation_input_tokens or 0
        given, made = (self.input_tokens or 0) + read + written, self.output_tokens or 0
        usage: dict[str, Any] = {
            "prompt_tokens": given,
            "completion_tokens": made,
            "total_tokens": given + made,
            "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
        }
        if self.output_tokens_details and self.output_tokens_details.thinking_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.output_tokens_details.thinking_tokens}
        return usage


class Block(msgspec.Struct, frozen=True):
    """A part of a message: text, thinking, redacted_thinking or tool_use; what is neither is left out."""

    type: str
    text: str = ""
    thinking: str = ""
    signature: str = ""
    data: str = ""
    id: str = ""
    name: str = ""
    input: msgspec.Raw = msgspec.Raw(b"{}")

    def kept(self) -> dict[str, str]:
        """Return a block of thinking so that a client can send it back, as Anthropic asks for between tool calls."""
        if self.type == "redacted_thinking":
            return {"type": self.type, "data": self.data}
        return {"type": self.type, "thinking": self.thinking, "signature": self.signature}


class _Refusal(msgspec.Struct, frozen=True):
    explanation: str | None = None


class Message(msgspec.Struct, frozen=True):
    """An answer."""

    id: str
    model: str
    content: list[Block] = []
    stop_reason: str | None = None
    stop_details: _Refusal | None = None
    usage: Usage = Usage()


_message = msgspec.json.Decoder(Message).decode


def completion(body: bytes, created: int) -> bytes:
    """Translate an answer. created: Unix time, which Anthropic does not tell. Raises MalformedAnswer."""
    try:
        message = _message(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise MalformedAnswer("it is not a message of Anthropic's API") from None
    choice = {
        "index": 0,
        "message": _openai_message(message),
        "logprobs": None,
        "finish_reason": finish_reason(message.stop_reason),
    }
    return wire.encode(
        {
            "id": message.id,
            "object": "chat.completion",
            "created": created,
            "model": message.model,
            "choices": [choice],
            "usage": message.usage.for_openai(),
        }
    )


def finish_reason(stop_reason: str | None) -> str:
    """Return OpenAI's word for why an answer ended."""
    return FINISH.get(stop_reason or "", "stop")


def _openai_message(message: Message) -> dict[str, Any]:
    of = {kind: [b for b in message.content if b.type == kind] for kind in ("text", "thinking", "tool_use")}
    result: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(b.text for b in of["text"]) if of["text"] else None,
        "refusal": message.stop_details.explanation if message.stop_details else None,
    }
    if of["thinking"]:
        result["reasoning_content"] = "".join(b.thinking for b in of["thinking"])
    if kept := [b.kept() for b in message.content if b.type in ("thinking", "redacted_thinking")]:
        result["thinking_blocks"] = kept
    if of["tool_use"]:
        result["tool_calls"] = [_tool_call(b) for b in of["tool_use"]]
    return result


def _tool_call(block: Block) -> dict[str, Any]:
    arguments = bytes(block.input).decode()
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


# Errors

_TYPES = {"rate_limit_error": ("rate_limit_error", "rate_limit_exceeded")}
_CODES = {"not_found_error": "model_not_found", "request_too_large": "request_too_large"}


class _Error(msgspec.Struct, frozen=True):
    type: str = ""
    message: str = ""


class _Envelope(msgspec.Struct, frozen=True):
    error: _Error


_envelope = msgspec.json.Decoder(_Envelope).decode


def error(body: bytes, status: int) -> bytes:
    """Translate the body of an error of the client (4xx)."""
    try:
        said = _envelope(body).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = _Error()
    kind, code = _TYPES.get(said.type, ("invalid_request_error", _CODES.get(said.type)))
    message = said.message or f"The upstream refused the request with status {status}."
    return wire.encode({"error": {"message": message, "type": kind, "param": None, "code": code}})
