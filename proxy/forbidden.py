"""Fields that reach past the model: templates, files, processors, upstreams, keys. Pure.

A client may use them only where the model's `allow` has them. They are refused for models of others too: a gateway
behind an endpoint would read them, with our key in its hand.
"""

from collections.abc import Iterable

import msgspec

from proxy import media
from proxy.errors import BadRequest
from proxy.limits import Fields, Limits

_TEMPLATE = "is run as a program by the engine"
_PROCESSOR = "configures how the engine reads media"
_TENSORS = media.FIELDS["prompt_embeds"]
_PLACE = "names a server, file or extension for the engine to use"
_UPSTREAM = "names another upstream, or credentials for one"

FIELDS: dict[str, str] = {
    **dict.fromkeys(("chat_template", "template"), _TEMPLATE),
    **dict.fromkeys(("mm_processor_kwargs", "media_io_kwargs"), _PROCESSOR),
    **dict.fromkeys(("prompt_embeds", "features"), _TENSORS),
    **dict.fromkeys(
        ("kv_transfer_params", "ec_transfer_params", "vllm_xargs", "logits_processors", "lora_request", "lora_path",
         "guided_decoding_backend", "data"), _PLACE
    ),
    **dict.fromkeys(
        ("api_key", "api_base", "api_version", "base_url", "custom_llm_provider", "headers", "extra_headers",
         "extra_body", "extra_query", "user_config", "model_list", "fallbacks", "callbacks", "success_callback",
         "failure_callback", "litellm_params", "mock_response", "aws_access_key_id", "aws_secret_access_key",
         "aws_session_token", "aws_session_name", "aws_profile_name", "aws_role_name", "aws_web_identity_token",
         "aws_sts_endpoint", "aws_bedrock_runtime_endpoint", "vertex_credentials", "vertex_ai_credentials",
         "vertex_project", "azure_ad_token", "azure_endpoint"), _UPSTREAM
    ),
    "priority": "puts one client before the others",
}  # fmt: skip

# Scalars for the template (enable_thinking) pass; the rest of it, and whole or half templates, do not.
_KWARGS = "chat_template_kwargs"
_SERVER_URL = "server_url"
_DEFAULTS = frozenset((b"null", b"0", b"{}", b"[]", b'""', b"false"))
# What tokenizers' apply_chat_template takes beside the variables of a template.
_RESERVED = frozenset(
    ("chat_template", "conversation", "messages", "tools", "documents", "tokenize", "tokenizer", "tokenizer_kwargs",
     "processor_kwargs", "add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length",
     "return_tensors", "return_dict", "return_assistant_tokens_mask", "template", "self")
)  # fmt: skip
_LONGEST_KWARG = 256

ALLOWABLE = frozenset((*FIELDS, *media.FIELDS, _KWARGS, _SERVER_URL))


class Policy(msgspec.Struct, frozen=True):
    """What a model's clients may use. domains: hosts to fetch media from; None where that is not our concern."""

    allow: frozenset[str] = frozenset()
    domains: media.Domains | None = frozenset()


def check(fields: Fields, policy: Policy, limits: Limits, plain: msgspec.Raw | None = None) -> None:
    """Raise BadRequest naming the first field that a client may not use. plain: see limits.check."""
    for name in fields.keys() & FIELDS.keys():
        if name not in policy.allow and bytes(fields[name]) not in _DEFAULTS:
            raise _refused(name, FIELDS[name])
    if _KWARGS in fields and _KWARGS not in policy.allow:
        _check_template_variables(bytes(fields[_KWARGS]))
    if "input" in fields and "tools" in fields and _SERVER_URL not in policy.allow:
        _check_tools(bytes(fields["tools"]))
    media.check(fields, policy.allow, policy.domains, limits, plain)


def _refused(name: str, why: str) -> BadRequest:
    return BadRequest(f"{name}: not taken by this model: it {why}.", param=name.partition(".")[0], code="not_allowed")


_variables = msgspec.json.Decoder(dict[str, str | int | float | bool | None] | None).decode


def _check_template_variables(value: bytes) -> None:
    try:
        variables = _variables(value) or {}
    except msgspec.ValidationError:
        raise _refused(_KWARGS, "may hold only texts, numbers and booleans") from None
    for name, given in variables.items():
        if name in _RESERVED:
            raise _refused(f"{_KWARGS}.{name}", _TEMPLATE)
        if isinstance(given, str) and len(given) > _LONGEST_KWARG:
            raise _refused(f"{_KWARGS}.{name}", f"is longer than {_LONGEST_KWARG} characters")


_tools = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode


def _check_tools(value: bytes) -> None:
    """Refuse tools that an upstream would call at an address of the client's choice (`type: mcp`)."""
    if b'"server_url"' not in value and b"\\u00" not in value:
        return
    try:
        tools: Iterable[dict[str, msgspec.Raw]] = _tools(value)
    except msgspec.ValidationError:
        return  # the engine says what is wrong with them
    if any(_SERVER_URL in tool for tool in tools):
        raise _refused(f"tools.{_SERVER_URL}", _UPSTREAM)
