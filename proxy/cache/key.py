"""What an answer is kept under: a hash of all that decides it. Pure.

A key is the scope, then a BLAKE2b of the model and its revision, the path with its query, the headers that change how a
provider reads a request, and the body in a canonical form:

* Objects are sorted by their keys, but for `properties` of a JSON schema, whose order is that in which a constrained
  model writes them. Escapes and white space are those of one encoder. Of a key that is there twice the last
  counts, as it does for engines.
* At the top 1, 1.0 and 1e0 are one number, since fields there have types: a temperature, a limit. Further inside they
  are not, since a template may print a tool's schema into the prompt as it is.
* A null is not the same as nothing: an engine may have a default of its own for what is left out.
* Text is not normalized: é as one character or as two are other tokens.

Left out is what does not change the answer: how it is delivered, who asks, and what is for us.

Requests of one client mostly differ in what they say (`messages`, `prompt`, `input`) and in nothing else. So the rest
of a body, the frame around that, has a digest of its own, and those of the last frames are remembered by their bytes. A
frame is found by cutting what is said out of the body. It is one only if whatever else stands there is read as that
field: it is read with a secret in its place.
"""

import secrets
from hashlib import blake2b
from typing import Any

import msgspec

from proxy.cache import KEY_BYTES, SCOPE_BYTES
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
_SAID = {**_TURNS, COMPLETIONS: "prompt", "/tokenize": "prompt", "/v1/embeddings": "input"}
_URLS = ("image_url", "audio_url", "video_url", "file_url", "url")
HEADERS = frozenset((b"anthropic-beta", b"anthropic-version"))
_SPOKEN = frozenset((b"[", b'"'))  # what a list and a text begin with
_FRAMES = 256  # that are remembered
_FRAME_BYTES = 16 * 1024  # that one of them may have
_DIGEST_BYTES = KEY_BYTES - SCOPE_BYTES
_NEEDLE = 16  # bytes to look for; looking for long ones takes ten times as long
_HOLE = secrets.token_hex(16)
_FILLED = b'"%b"' % _HOLE.encode()

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder(order="sorted").encode
_encode_turns = msgspec.json.Encoder().encode


class _Turn(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A message of text and nothing else, as most are. The fields are in the order in which they are hashed."""

    content: str
    role: str


_decode_said = msgspec.json.Decoder(list[Any] | str).decode
_decode_turns = msgspec.json.Decoder(list[_Turn]).decode

# Who asks whom, and how: key_id, salt, model, revision, path, query, headers, and whether it is a stream that no
# document can be made of.
_Caller = tuple[str, str | None, str, str, str, bytes, tuple[tuple[bytes, bytes], ...], bool]


# What requests have in common that differ in what they say: their scope, and a digest of all the rest, b"" where no
# answer to them is kept.
_Frame = tuple[bytes, bytes]
_NOT_KEPT = b"", b""

# All mutable state: the frames that were met, by the bytes around what is said, and by who asks whom where.
_frames: dict[tuple[object, ...], _Frame] = {}


def key(asked: Asked, model: str, revision: str, key_id: str, *, fixed: bool = False) -> bytes | None:
    """Return the key of a request, None where its answer may change though the request does not.

    model, revision: what the name stands for now. key_id: whose answers may be given, "" for those of all. fixed: only
    where the answer is the same each time, as far as an engine can make it so: its sampling is fixed.
    """
    # Its steps are no functions of their own: between other work each of these costs half a microsecond.
    path, body = asked.path, asked.body
    said = bytes(asked.envelope.fields.get(_SAID.get(path, ""), b""))
    at = body.find(said[:_NEEDLE])
    try:
        if said[:1] not in _SPOKEN or len(body) - len(said) > _FRAME_BYTES or not body.startswith(said, at):
            return _of_all(asked, _caller(asked, model, revision, key_id), fixed)
        around = body[:at], body[at + len(said) :], path, fixed, model, revision, key_id, asked.salt
        frame = _frames.get(around)
        if frame is None or asked.query or not (asked.ordinary or HEADERS.isdisjoint(dict(asked.headers))):
            caller = _caller(asked, model, revision, key_id)
            frame = _new_frame(asked, caller, fixed, around)
            if frame is None:
                return _of_all(asked, caller, fixed)
        scope, digest = frame
        if not digest:
            return None
        try:
            spelled = _encode_turns(_decode_turns(said)) if path == CHAT else _canonical_said(path, _decode_said(said))
        except msgspec.ValidationError:  # there is more than text
            spelled = _canonical_said(path, _decode_said(said))
        return None if spelled is None else scope + blake2b(digest + spelled, digest_size=_DIGEST_BYTES).digest()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _caller(asked: Asked, model: str, revision: str, key_id: str) -> _Caller:
    headers = tuple([header for header in asked.headers if header[0] in HEADERS])
    streams = asked.envelope.stream and asked.path not in REPLAYED
    return key_id, asked.salt if key_id else None, model, revision, asked.path, asked.query, headers, streams


def _new_frame(asked: Asked, caller: _Caller, fixed: bool, around: tuple[Any, ...]) -> _Frame | None:
    """Read a frame, and remember it. None if what stands in it need not be what is said."""
    try:
        fields = _decode(around[0] + _FILLED + around[1])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if fields.pop(_SAID[asked.path], None) != _HOLE:
        return None
    frame = _digested(fields, asked.path, caller, fixed)
    if not asked.query and not caller[-2]:
        if len(_frames) >= _FRAMES:
            _frames.clear()
        _frames[around] = frame
    return frame


def _of_all(asked: Asked, caller: _Caller, fixed: bool) -> bytes | None:
    """Return the key of a request whose body is read whole. Raises DecodeError."""
    if asked.form or asked.path not in _CACHED_PATHS:
        return None
    fields, name = _decode(asked.body), _SAID.get(asked.path, "")
    said = fields.get(name)
    spelled: bytes | None = b""
    if said.__class__ is list or said.__class__ is str:
        del fields[name]
        spelled = _canonical_said(asked.path, said)
    scope, digest = _digested(fields, asked.path, caller, fixed)
    if not digest or spelled is None:
        return None
    return scope + blake2b(digest + spelled, digest_size=_DIGEST_BYTES).digest()


def _canonical_said(path: str, said: Any) -> bytes | None:
    return None if _fetches(path, said) else _encode(said)


def _digested(fields: dict[str, Any], path: str, caller: _Caller, fixed: bool) -> _Frame:
    canonical = None if fixed and not _is_fixed(path, fields) else _canonical(path, fields)
    if canonical is None:
        return _NOT_KEPT
    key_id = caller[0]
    scope = bytes.fromhex(key_id) if key_id else bytes(SCOPE_BYTES)
    return scope, blake2b(msgspec.msgpack.encode(caller) + canonical).digest()


def _is_fixed(path: str, fields: dict[str, Any]) -> bool:
    temperature = fields.get("temperature")
    is_zero = temperature.__class__ in (int, float) and temperature == 0
    return OPERATIONS.get(path) in _ALWAYS_SAME or is_zero or fields.get("seed") is not None


def _canonical(path: str, fields: dict[str, Any]) -> bytes | None:
    """Return a frame as it is hashed, None for one with which an answer depends on more than the body."""
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
    if path not in _TURNS and _refers(list(fields.values())):
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


def _fetches(path: str, said: Any) -> bool:
    """Say whether an engine gets a part of what is said from elsewhere, where it may change."""
    if path not in _TURNS:
        return _refers(said)
    turns = said if said.__class__ is list else ()
    for turn in turns:  # looking into those that have more than text costs less than looking into all of them
        if turn.__class__ is dict:
            for value in turn.values():
                if value.__class__ is list and _refers(value):
                    return True
    return False


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
