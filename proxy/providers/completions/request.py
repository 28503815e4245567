"""The request of a chat as one for text. Pure."""

from typing import Any

import msgspec

from proxy.errors import BadRequest
from proxy.prompts import Message, rendering
from proxy.prompts.adapters import Form

# What a chat can ask for and text cannot, with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
    "prediction": (None,),
}
# What is for the template of a server, or stands in another field here.
_LEFT_OUT = frozenset(
    ("messages", "max_completion_tokens", "logprobs", "top_logprobs", "add_generation_prompt", "continue_final_message",
     "add_special_tokens", "chat_template_kwargs", "reasoning_effort", "store", "verbosity")
)  # fmt: skip


class _Chat(msgspec.Struct, frozen=True):
    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


_chat = msgspec.json.Decoder(_Chat).decode
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def completions_request(body: bytes, form: Form) -> bytes:
    """Return the request of a chat as one for the text that goes on with it.

    Raises BadRequest naming the field that cannot be said in text, or has the wrong type.
    """
    fields = _fields(body)
    try:
        chat = _chat(body)
    except msgspec.ValidationError as e:
        what, _, where = str(e).partition(" - at `$.")
        field = where.rstrip("`") or "messages"
        raise BadRequest(f"{field}: {what[0].lower()}{what[1:]}", param=field) from None
    _refuse(fields, chat.messages)
    kept = {name: value for name, value in fields.items() if name not in _LEFT_OUT and name not in _REFUSED}
    return msgspec.json.encode({**kept, **_said_otherwise(chat, form)})


def _said_otherwise(chat: _Chat, form: Form) -> dict[str, Any]:
    opened = bool(chat.continue_final_message) and bool(chat.messages) and chat.messages[-1].get("role") == "assistant"
    most = chat.max_completion_tokens if chat.max_completion_tokens is not None else chat.max_tokens
    said: dict[str, Any] = {
        "prompt": rendering.render(form, chat.messages, opened=opened),
        "max_tokens": form.default_max_tokens if most is None else most,
    }
    return {**said, "logprobs": chat.top_logprobs or 0} if chat.logprobs else said


def _refuse(fields: dict[str, msgspec.Raw], messages: list[Message]) -> None:
    for name in _REFUSED.keys() & fields.keys():
        if msgspec.json.decode(fields[name]) not in _REFUSED[name]:
            raise _unsupported(name)
    for i, message in enumerate(messages):
        if message.get("role") in ("tool", "function") or message.get("tool_calls"):
            raise _unsupported(f"messages[{i}]")


def _unsupported(field: str) -> BadRequest:
    return BadRequest(
        f"{field}: cannot be passed on to provider completions: its server takes text only, and calls no tools.",
        param=field,
        code="unsupported_parameter",
    )
