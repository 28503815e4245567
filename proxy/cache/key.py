"""What an answer is kept under: a hash of all that decides it. Pure.

A key is the scope, then a SHA-256 of the model and its revision, the path with its query, the headers that change how a
provider reads a request, and the body in a canonical form:

* Objects are sorted by their keys, but for `properties` of a JSON schema, whose order is that in which a constrained
  model writes them. Escapes and white space are those of one encoder. Of a key that is there twice the last
  counts, as it does for engines.
* At the top 1, 1.0 and 1e0 are one number, since fields there have types: a temperature, a limit. Further inside they
  are not, since a template may print a tool's schema into the prompt as it is.
* A null is not the same as nothing: an engine may have a default of its own for what is left out.
* Text is not normalized: é as one character or as two are other tokens.

Left out is what does not change the answer: how it is delivered, who asks, and what is for us.
"""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from proxy.cache import SCOPE_BYTES
from proxy.continuation import CHAT, COMPLETIONS
from proxy.providers import Asked
from proxy.telemetry import OPERATIONS

REPLAYED = frozenset((CHAT, COMPLETIONS))  # paths whose documents and streams can be made of each other
_ALWAYS_SAME = frozenset(
    ("embeddings", "rerank", "score", "classify", "pooling", "tokenize", "detokenize", "count_tokens")
)
_CACHED_PATHS = frozenset(p for p, o in OPERATIONS.items() if o not in ("transcription", "translation"))

_LEFT_OUT = frozenset((
    "model", "stream", "stream_options", "user", "metadata", "cache", "routing", "request_id", "priority",
    "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
))  # fmt: skip
_DELIVERY = ("include_usage", "include_cost")  # of stream_options
# What makes an answer depend on more than the request: state on a server, a search, sound that is kept for an hour.
_STATEFUL = frozenset(
    ("previous_response_id", "conversation", "background", "audio", "web_search_options", "mcp_servers", "container")
)
_OWN_TOOLS = (None, "function", "custom")  # types of tools that the client runs
_SCHEMAS = frozenset(
    ("tools", "functions", "response_format", "text", "output_config", "output_format", "format", "guided_json",
     "structured_outputs")
)  # fmt: skip
_SPECIAL = _LEFT_OUT | _STATEFUL | _SCHEMAS
_TURNS = {CHAT: "messages", "/v1/messages": "messages", "/v1/responses": "input"}
_URLS = ("image_url", "audio_url", "video_url", "file_url", "url")
_HEADERS = (b"anthropic-beta", b"anthropic-version")

Fields = Mapping[str, msgspec.Raw]

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder(order="sorted").encode


def key(asked: Asked, model: str, revision: str, key_id: str) -> bytes | None:
    """Return the key of a request, None where its answer may change though the request does not.

    model, revision: what the name stands for now. key_id: whose answers may be given, "" for those of all.
    """
    if asked.form or asked.path not in _CACHED_PATHS:
        return None
    body = _canonical(asked.path, asked.body)
    if body is None:
        return None
    salt = asked.salt if key_id else None
    form = asked.envelope.stream and asked.path not in REPLAYED
    headers = tuple([header for header in asked.headers if header[0] in _HEADERS])
    scope, rest = _rest(key_id, salt, model, revision, asked.path, asked.query, form, headers)
    return scope + hashlib.sha256(rest + body).digest()[SCOPE_BYTES:]


@lru_cache(maxsize=1024)
def _rest(key_id: str, *parts: Any) -> tuple[bytes, bytes]:
    """Return the scope of a key, and a hash of all but the body, which most requests of a caller have in common."""
    scope = bytes.fromhex(key_id) if key_id else bytes(SCOPE_BYTES)
    return scope, hashlib.sha256(msgspec.msgpack.encode(parts)).digest()


def is_deterministic(path: str, fields: Fields) -> bool:
    """Say whether a request gives the same answer each time, as far as an engine can: its sampling is fixed."""
    if OPERATIONS.get(path) in _ALWAYS_SAME:
        return True
    temperature, seed = fields.get("temperature"), fields.get("seed")
    return (temperature is not None and _is_zero(bytes(temperature))) or (seed is not None and bytes(seed) != b"null")


def _is_zero(value: bytes) -> bool:
    try:
        return float(value) == 0.0
    except ValueError:
        return False


def _canonical(path: str, body: bytes) -> bytes | None:
    """Return a body as it is hashed, None for one whose answer depends on more than the body, or that is not valid."""
    try:
        fields = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if _fetches(path, body, fields):
        return None
    for name in fields.keys() & _SPECIAL:
        value = fields.pop(name)
        if name in _SCHEMAS:
            fields[name] = _with_order(value)
        elif name == "stream_options":
            fields.update(_undelivered(value))
        if (name in _STATEFUL and value) or (name == "tools" and not _are_own(value)):
            return None
    if path == "/v1/responses" and "prompt" in fields:  # a template that is kept, and changed, elsewhere
        return None
    for name, value in fields.items():
        if value.__class__ is float and value.is_integer():
            fields[name] = int(value)
    return _encode(fields)


def _undelivered(options: Any) -> dict[str, Any]:
    """Return what the options of a stream say of more than its delivery."""
    rest = {n: v for n, v in options.items() if v and n not in _DELIVERY} if isinstance(options, dict) else {}
    return {"stream_options": rest} if rest else {}


def _with_order(node: Any) -> Any:
    """Return a document in which `properties` are lists of pairs, which sorting leaves as they are."""
    if isinstance(node, list):
        return [_with_order(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        name: [[inner, _with_order(item)] for inner, item in value.items()]
        if name == "properties" and isinstance(value, dict)
        else _with_order(value)
        for name, value in node.items()
    }


def _fetches(path: str, body: bytes, fields: dict[str, Any]) -> bool:
    """Say whether an engine gets a part of the request from elsewhere, where it may change."""
    turns = fields.get(_TURNS.get(path, ""))
    if turns.__class__ is list:  # looking into what has more than text costs less than searching the body
        return any(_refers(turn) for turn in turns if turn.__class__ is dict and list in map(type, turn.values()))
    return b"url" in body and _refers(list(fields.values()))


def _refers(node: Any) -> bool:
    if isinstance(node, list):
        return any(_refers(item) for item in node)
    if not isinstance(node, dict):
        return False
    for name in _URLS:
        value = node.get(name)
        url = value.get("url") if isinstance(value, dict) else value
        if isinstance(url, str) and url[:5].lower() != "data:":
            return True
    return any(_refers(value) for value in node.values())


def _are_own(tools: Any) -> bool:
    """Say whether all tools are run by the client, and none by the server, which would search or compute anew."""
    return not isinstance(tools, list) or all(isinstance(t, dict) and t.get("type") in _OWN_TOOLS for t in tools)
