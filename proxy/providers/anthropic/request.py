"""A chat completion's request as one for Anthropic's Messages API. Pure.

1. What has a counterpart is translated.
2. Hints that change no answer are left out: they are for OpenAI's own caches and books.
3. Whatever else is refused by name, unless its value says nothing (null, or the default).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from proxy import wire
from proxy.errors import BadRequest
from proxy.mistakes import dotted, located
from proxy.providers.anthropic.content import ABSENT, ChatMessage, Turn, given, turns, unsupported

_TRANSLATED = frozenset(
    ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "stop", "stream",
     "tools", "tool_choice", "parallel_tool_calls", "user", "safety_identifier", "reasoning_effort", "response_format",
     "service_tier", "thinking", "cache_control")
)  # fmt: skip
_HINTS = frozenset(
    ("stream_options", "store", "metadata", "seed", "prediction", "prompt_cache_key", "prompt_cache_retention",
     "prompt_cache_options", "cache_salt")
)  # fmt: skip
# Values that ask for nothing that Anthropic does not do anyway. The last two are how an answer is gone on with.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "echo": (False,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,), "min_tokens": (0,),
    "verbosity": ("medium",), "modalities": (["text"],), "ignore_eos": (False,), "skip_special_tokens": (True,),
    "include_reasoning": (True,),
    "chat_template_kwargs": ({},), "continue_final_message": (True, False), "add_generation_prompt": (True, False),
}  # fmt: skip


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An endpoint's `options`.

    max_tokens: for requests that name none, since Anthropic requires it. prefill: false for models that do not
    continue an assistant's message (Claude Opus 4.6 and later). sampling: false for models that refuse temperature,
    top_p and top_k (Claude Opus 4.7 and later), which are then left out. thinking: what reasoning_effort becomes:
    `adaptive` with an effort, or a `budget` of tokens for models before Claude 4.6.
    """

    max_tokens: Annotated[int, Meta(ge=1)] = 8192
    prefill: bool = True
    sampling: bool = True
    thinking: Literal["adaptive", "budget"] = "adaptive"


class _Function(msgspec.Struct, frozen=True):
    name: str
    description: str | None = None
    parameters: msgspec.Raw = ABSENT
    strict: bool | None = None


class _Tool(msgspec.Struct, frozen=True):
    type: str
    function: _Function | None = None
    cache_control: msgspec.Raw = ABSENT


class _Named(msgspec.Struct, frozen=True):
    name: str


class _Choice(msgspec.Struct, frozen=True):
    type: str
    function: _Named | None = None


class _Schema(msgspec.Struct, frozen=True):
    schema: msgspec.Raw = ABSENT


class _Format(msgspec.Struct, frozen=True):
    type: str
    json_schema: _Schema | None = None


class _Chat(msgspec.Struct, frozen=True):
    messages: list[ChatMessage]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    tools: list[_Tool] | None = None
    tool_choice: str | _Choice | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    response_format: _Format | None = None
    service_tier: Literal["auto", "default"] | None = None
    thinking: msgspec.Raw = ABSENT
    cache_control: msgspec.Raw = ABSENT


_NOTHING: tuple[Any, ...] = (None, [], {})
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_chat = msgspec.json.Decoder(_Chat).decode


def messages_request(body: bytes, model: str, options: Options) -> bytes:
    """Return the body for /v1/messages. model: its name there. Raises BadRequest naming what cannot be said."""
    _check_fields(_fields(body))
    try:
        chat = _chat(body)
    except msgspec.ValidationError as e:
        raise _invalid(e) from None
    system, messages = turns(chat.messages)
    _check_last(messages, options)
    most = chat.max_completion_tokens or chat.max_tokens or options.max_tokens
    least = {"model": model, "max_tokens": most, "messages": [turn.encoded() for turn in messages]}
    thinking, effort = _reasoning(chat, options, most, continues=messages[-1].role == "assistant")
    rest = {
        **_settings(chat, options),
        "system": system,
        "thinking": thinking,
        "output_config": _format(chat.response_format) | effort,
    }
    return wire.encode(least | {name: value for name, value in rest.items() if value not in _NOTHING})


def _settings(chat: _Chat, options: Options) -> dict[str, Any]:
    user = chat.safety_identifier or chat.user
    return {
        **(_sampling(chat) if options.sampling else {}),
        **_tools(chat),
        "stop_sequences": _stop(chat.stop),
        "stream": chat.stream,
        "metadata": {"user_id": user} if user else None,
        "service_tier": _TIERS.get(chat.service_tier or ""),
        "cache_control": given(chat.cache_control),
    }


def _check_fields(fields: Mapping[str, msgspec.Raw]) -> None:
    for name in fields.keys() - _TRANSLATED - _HINTS:
        value = msgspec.json.decode(fields[name])
        if value is not None and value not in _NEUTRAL.get(name, ()):
            raise unsupported(name, "has no counterpart there")


def _invalid(error: msgspec.ValidationError) -> BadRequest:
    path, said = located(error, _Chat)
    where = dotted(path) or "messages"
    return BadRequest(f"{where}: {said}", param=where)


def _check_last(messages: list[Turn], options: Options) -> None:
    if not messages:
        raise BadRequest("messages: there is nothing in them to answer", param="messages")
    if messages[-1].role == "assistant" and not options.prefill:
        raise unsupported("messages", "end with the assistant's, which this model does not continue")


def _sampling(chat: _Chat) -> dict[str, Any]:
    """Anthropic's temperatures end at 1; what is above is taken for 1, as its own compatible API does."""
    temperature = None if chat.temperature is None else min(chat.temperature, 1.0)
    return {"temperature": temperature, "top_p": chat.top_p, "top_k": chat.top_k}


def _stop(stop: str | list[str] | None) -> list[str]:
    texts = [stop] if isinstance(stop, str) else stop or []
    if not all(text.strip() for text in texts):
        raise unsupported("stop", "may not hold a string of white space alone")
    return texts


_TIERS = {"auto": "auto", "default": "standard_only"}


def _tools(chat: _Chat) -> dict[str, Any]:
    choice = _tool_choice(chat.tool_choice)
    if not chat.tools:
        if choice and choice["type"] in ("any", "tool"):
            raise BadRequest("tool_choice: there are no tools to choose from", param="tool_choice")
        return {}
    if chat.parallel_tool_calls is False and choice != {"type": "none"}:
        choice = {**(choice or {"type": "auto"}), "disable_parallel_tool_use": True}
    tools = [_tool(tool, i) for i, tool in enumerate(chat.tools)]
    return {"tools": tools, "tool_choice": choice} if choice else {"tools": tools}


_CHOICES = {"auto": "auto", "required": "any", "none": "none"}


def _tool_choice(choice: str | _Choice | None) -> dict[str, Any] | None:
    if choice is None:
        return None
    if isinstance(choice, _Choice) and choice.type == "function" and choice.function:
        return {"type": "tool", "name": choice.function.name}
    if isinstance(choice, str) and choice in _CHOICES:
        return {"type": _CHOICES[choice]}
    raise unsupported("tool_choice", "may be auto, required, none, or a function")


def _tool(tool: _Tool, i: int) -> dict[str, Any]:
    if tool.type != "function" or tool.function is None:
        raise unsupported(f"tools[{i}].type", "may be function only")
    f = tool.function
    schema: Any = given(f.parameters) or {"type": "object", "properties": {}}
    result = {"name": f.name, "description": f.description, "input_schema": schema, "strict": f.strict}
    result["cache_control"] = given(tool.cache_control)
    return {name: value for name, value in result.items() if value is not None}


def _format(wanted: _Format | None) -> dict[str, Any]:
    """A JSON schema is what Anthropic calls structured outputs; for JSON of any shape it has nothing."""
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.type != "json_schema" or wanted.json_schema is None or not given(wanted.json_schema.schema):
        raise unsupported("response_format", "may be text, or a json_schema with its schema")
    return {"format": {"type": "json_schema", "schema": wanted.json_schema.schema}}


_EFFORTS = {"minimal": "low"}
_BUDGETS = {"minimal": 1024, "low": 1024, "medium": 4096, "high": 16384, "xhigh": 32768, "max": 65536}
_SMALLEST_BUDGET = 1024


def _reasoning(chat: _Chat, options: Options, most: int, *, continues: bool) -> tuple[Any, dict[str, Any]]:
    """Return `thinking` and the effort for `output_config`: as the client says, or as its reasoning_effort comes to.

    An assistant's message is continued only without thinking.
    """
    effort = chat.reasoning_effort
    if given(chat.thinking) or effort is None or continues:
        return given(chat.thinking), {}
    if effort == "none":
        return {"type": "disabled"}, {}
    if options.thinking == "adaptive":
        return {"type": "adaptive"}, {"effort": _EFFORTS.get(effort, effort)}
    budget = min(_BUDGETS[effort], most - 1)
    return {"type": "enabled", "budget_tokens": budget} if budget >= _SMALLEST_BUDGET else None, {}
