"""The OpenAI shapes that we read or change. What we do not know passes through untouched.

Everything here is bytes in, bytes out: a body is never decoded further than the few fields that decide
where it goes, and never encoded again where a splice will do.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from proxy.errors import BadRequest


class Envelope(msgspec.Struct, frozen=True):
    """What decides where a request goes, and all the fields at the top of its body, not decoded further."""

    model: str
    stream: bool = False
    fields: Mapping[str, msgspec.Raw] = {}


_decode_text = msgspec.json.Decoder(str | None).decode
_decode_flag = msgspec.json.Decoder(bool | None).decode
_NULL = msgspec.Raw(b"null")
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode

_MODEL = re.compile(rb'"model"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"')


def read_json(body: bytes, model: str | None = None) -> Envelope:
    """Read the envelope of a JSON body. Raises BadRequest naming the field or the byte that is wrong.

    model: what it is where the body has none.
    """
    name = None
    try:
        body.isascii() or body.decode()  # in the fields, which are not decoded here
        fields = _decode_object(body)
        name = "model"
        model = _decode_text(fields.get("model", _NULL)) or model
        name = "stream"
        stream = _decode_flag(fields.get("stream", _NULL))
    except msgspec.ValidationError as e:
        raise _wrong_type(str(e), name) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise BadRequest(f"The body is not valid JSON: {_reason(e, body)}") from None
    return Envelope(_required(model), bool(stream), fields)


# What bodies begin with that would be JSON if they were sent otherwise.
_BEGINNINGS = {
    b"\x1f\x8b": "it is compressed; send it without Content-Encoding",
    b"\x28\xb5\x2f\xfd": "it is compressed; send it without Content-Encoding",
    b"\xef\xbb\xbf": "it begins with a byte order mark; leave that out",
    b"\xff\xfe": "it is UTF-16; send it as UTF-8",
    b"\xfe\xff": "it is UTF-16; send it as UTF-8",
    b"{\x00": "it is UTF-16; send it as UTF-8",
    b"\x00{": "it is UTF-16; send it as UTF-8",
}


def _reason(error: Exception, body: bytes) -> str:
    if not body.strip():
        return "it is empty"
    if said := next((said for start, said in _BEGINNINGS.items() if body.startswith(start)), None):
        return said
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return str(error).removeprefix("JSON is malformed: ")


def _wrong_type(what: str, param: str | None) -> BadRequest:
    return BadRequest(f"{param or 'The body'}: {what[0].lower()}{what[1:]}", param=param)


def _required(model: str | None) -> str:
    if not model:
        raise BadRequest(
            "you must provide a model parameter: the name of a model or alias, see /v1/models",
            param="model",
            code="missing_required_parameter",
        )
    return model


def set_model(document: bytes, name: str) -> bytes:
    """Return a JSON document with its `model` replaced and every other byte as it was.

    `model` is the one at the top, or, where the top has none, that of the `response` or `message` it wraps
    (as the events of /v1/responses and /v1/messages do). A document without any is returned as it is.
    """
    first = document.find(b'"model"')
    if document.startswith(_said(name), first) and document.find(b'"model"', first + 7) < 0:
        return document
    match = _MODEL.match(document, max(first, 0)) or _MODEL.search(document)
    if match is None:
        return document
    # One brace before it and no other `model` key behind it: it is the top one. An unescaped `"model"` can
    # not stand inside of a JSON string, so bytes suffice to tell.
    if document.count(b"{", 0, match.start()) == 1 and document.find(b'"model"', match.end()) < 0:
        return document[: match.start(1)] + _encode(name)[1:-1] + document[match.end(1) :]
    return _reassemble(document, name, wrapped=True)


@lru_cache(maxsize=1024)
def _said(name: str) -> tuple[bytes, bytes]:
    """Return how a document says that this is its model, as usual encoders write it."""
    value = _encode(name)
    return b'"model":' + value, b'"model": ' + value


def _reassemble(document: bytes, name: str, *, wrapped: bool) -> bytes:
    """Replace `model` where a splice would be ambiguous: values keep their bytes, duplicate keys go."""
    try:
        fields = _decode_object(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return document
    if "model" in fields:
        fields["model"] = msgspec.Raw(_encode(name))
    elif wrapped:
        for key in fields.keys() & {"response", "message"}:
            fields[key] = msgspec.Raw(_reassemble(bytes(fields[key]), name, wrapped=False))
    return _encode(fields)


def add_field(document: bytes, name: str, value: Any) -> bytes:
    """Return a JSON object that is not empty with one more field, which it must not have, in front."""
    start = document.index(b"{") + 1
    return b"".join((document[:start], _encode(name), b":", _encode(value), b",", memoryview(document)[start:]))


def replace_field(document: bytes, name: str, value: Any) -> bytes:
    """Return a JSON object with a field at its top replaced; other values keep their bytes."""
    return replace_fields(document, {name: value})


def replace_fields(document: bytes, values: Mapping[str, Any]) -> bytes:
    """Return a JSON object with fields at its top replaced, or added; other values keep their bytes."""
    return _encode({**_decode_object(document), **values})


# Multipart forms: /v1/audio/*

_BOUNDARY = re.compile(rb'boundary="?([^";,]{1,200})"?', re.IGNORECASE)
# In two steps, each bound to one place of its line: a search that may begin anywhere takes the square of the time.
_DISPOSITION = re.compile(rb"\r\ncontent-disposition:([^\r\n]*)", re.IGNORECASE)
_PART_NAME = re.compile(rb'[;\s]name="?([^";]*)"?', re.IGNORECASE)


def read_form(body: bytes, content_type: bytes) -> Envelope:
    """Read the envelope of a multipart/form-data body. Raises BadRequest."""
    fields = {name: body[start:end] for name, start, end in _form_fields(body, content_type)}
    model = fields.get(b"model", b"").decode("utf-8", "replace").strip()
    stream = fields.get(b"stream", b"").strip().lower() in (b"true", b"1")
    return Envelope(_required(model), stream, _as_json(fields))


_WHOLE_NUMBER = re.compile(rb"0|[1-9][0-9]{0,9}").fullmatch
_LONGEST_VALUE = 64 * 1024


def _as_json(form: Mapping[bytes, bytes]) -> dict[str, msgspec.Raw]:
    """Return the parts of a form as JSON fields, `name[key]` as `name`, a file as the beginning of its text."""
    return {
        name.partition(b"[")[0].strip().decode("latin-1"): msgspec.Raw(
            value if _WHOLE_NUMBER(value) else _encode(value[:_LONGEST_VALUE].decode("latin-1"))
        )
        for name, value in form.items()
        if name != b"file"
    }


def set_form_model(body: bytes, content_type: bytes, name: str) -> bytes:
    """Return a multipart body with every `model` field replaced."""
    spans = [(start, end) for field, start, end in _form_fields(body, content_type) if field == b"model"]
    parts: list[bytes] = []
    at = 0
    for start, end in spans:
        parts += (body[at:start], name.encode())
        at = end
    return b"".join((*parts, body[at:]))


def _form_fields(body: bytes, content_type: bytes) -> list[tuple[bytes, int, int]]:
    """Return (name, start, end) of the value of each part of a form."""
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        raise BadRequest("multipart/form-data without a boundary in Content-Type")
    mark = b"--" + boundary[1]
    fields, at = [], body.find(mark)
    while at >= 0 and not body.startswith(b"--", at + len(mark)):
        head_end = body.find(b"\r\n\r\n", at)
        end = body.find(b"\r\n" + mark, head_end)
        if head_end < 0 or end < 0:
            raise BadRequest("the multipart body ends before its last boundary")
        disposition = _DISPOSITION.search(body, at, head_end)
        if disposition and (name := _PART_NAME.search(disposition[1])):
            fields.append((name[1], head_end + 4, end))
        at = end + 2
    if at < 0:
        raise BadRequest("the multipart body does not contain its boundary")
    return fields


def encode(value: Any) -> bytes:
    """Encode to compact JSON."""
    return _encode(value)
