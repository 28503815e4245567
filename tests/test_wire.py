"""Reading and changing bodies: what decides is read, `model` is replaced, every other byte stays."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import wire
from proxy.errors import BadRequest, RequestError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("model"), inner, max_size=4),
    max_leaves=12,
)


def refusal(body: bytes) -> RequestError:
    with pytest.raises(BadRequest) as caught:
        wire.read_json(body)
    return caught.value


def test_model_and_stream_are_read():
    envelope = wire.read_json(b'{"messages": [], "stream": true, "model": "m"}')
    assert (envelope.model, envelope.stream) == ("m", True)
    assert {name: bytes(value) for name, value in envelope.fields.items()}["messages"] == b"[]"


@pytest.mark.parametrize("stream", [b"", b', "stream": false', b', "stream": null'])
def test_no_stream_is_the_default(stream):
    assert not wire.read_json(b'{"model": "m"' + stream + b"}").stream


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (b"{", None, "not valid JSON"),
        (b"", None, "not valid JSON: it is empty"),
        (b'{"model": "\xff"}', None, "byte 11 is not UTF-8"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "caf\xe9"}]}', None, "is not UTF-8"),
        ('{"model": "m"}'.encode("utf-16"), None, "it is UTF-16"),
        ('{"model": "m"}'.encode("utf-16-le"), None, "it is UTF-16"),
        ('{"model": "m"}'.encode("utf-8-sig"), None, "byte order mark"),
        (gzip.compress(b'{"model": "m"}'), None, "it is compressed"),
        (b'{"model": "m"} x', None, "not valid JSON"),
        (b'{"model": "m", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "too deeply"),
        (b"[]", None, "expected `object`, got `array`"),
        (b'"model"', None, "expected `object`"),
        (b'{"model": 5}', "model", "expected `str"),
        (b'{"model": "m", "stream": "yes"}', "stream", "expected `bool"),
        (b"{}", "model", "you must provide a model parameter"),
        (b'{"model": null}', "model", "you must provide a model parameter"),
        (b'{"model": ""}', "model", "you must provide a model parameter"),
    ],
)
def test_a_body_that_cannot_be_routed_is_refused_with_the_field(body, param, said):
    error = refusal(body)
    assert error.status == 400
    assert error.param == param
    assert said in str(error)


def test_the_envelope_of_an_error_is_the_one_of_openai():
    assert json.loads(refusal(b"{}").envelope()) == {
        "error": {
            "message": "you must provide a model parameter: the name of a model or alias, see /v1/models",
            "type": "invalid_request_error",
            "param": "model",
            "code": "missing_required_parameter",
        }
    }


@given(st.dictionaries(st.text(), JSON, max_size=5), st.text(min_size=1), st.text(), st.integers(0, 5))
def test_setting_the_model_changes_the_top_model_and_nothing_else(fields, old, new, place):
    items = [(k, v) for k, v in fields.items() if k != "model"]
    items.insert(place, ("model", old))
    document = dict(items)
    changed = wire.set_model(json.dumps(document).encode(), new)
    assert json.loads(changed) == {**document, "model": new}


@given(st.dictionaries(st.text(), JSON, max_size=5), st.text())
def test_a_document_without_a_model_at_the_top_stays_byte_for_byte(fields, new):
    for key in ("model", "response", "message"):
        fields.pop(key, None)
    document = json.dumps(fields).encode()
    assert json.loads(wire.set_model(document, new)) == json.loads(document)


@pytest.mark.parametrize(
    "spacing", ['{"model":"old", "a" : 1 }', '{ "model" : "old","a":1}', '{"a":1,\n"model":"old"}']
)
def test_other_bytes_are_left_as_they_were(spacing):
    assert wire.set_model(spacing.encode(), "new").decode() == spacing.replace("old", "new")


def test_text_that_looks_like_a_model_is_not_touched():
    body = b'{"model":"old","choices":[{"message":{"content":"say \\"model\\":\\"old\\" twice"}}]}'
    assert wire.set_model(body, "new") == body.replace(b'"old"', b'"new"', 1)


def test_the_model_after_a_nested_one_is_found():
    body = b'{"metadata":{"model":"old"},"model":"old"}'
    assert json.loads(wire.set_model(body, "new")) == {"metadata": {"model": "old"}, "model": "new"}


def test_of_two_models_at_the_top_none_is_left():
    assert b"old" not in wire.set_model(b'{"model":"old","x":{},"model":"old"}', "new")


def test_a_model_spelled_with_escapes_is_replaced():
    assert json.loads(wire.set_model(b'{"x":{"model":"old"},"\\u006dodel":"old"}', "new"))["model"] == "new"


@pytest.mark.parametrize("key", ["response", "message"])
def test_the_model_of_a_wrapped_answer_is_replaced(key):
    body = json.dumps({"type": "start", key: {"id": 1, "metadata": {"model": "old"}, "model": "old"}}).encode()
    assert json.loads(wire.set_model(body, "new"))[key] == {"id": 1, "metadata": {"model": "old"}, "model": "new"}


def test_what_is_not_json_is_left_alone():
    assert wire.set_model(b'oops {"model":"old" {"model":"old"', "new") == b'oops {"model":"old" {"model":"old"'


BOUNDARY = b"multipart/form-data; boundary=XyZ"


def form(*fields: tuple[bytes, bytes]) -> bytes:
    parts = [
        b'--XyZ\r\nContent-Disposition: form-data; name="%s"; filename="f"\r\nContent-Type: a/b\r\n\r\n%s\r\n' % field
        for field in fields
    ]
    return b"".join(parts) + b"--XyZ--\r\n"


def test_model_and_stream_of_a_form_are_read():
    body = form((b"file", b"\x00\xff model"), (b"model", b"whisper"), (b"stream", b"true"))
    envelope = wire.read_form(body, BOUNDARY)
    assert (envelope.model, envelope.stream) == ("whisper", True)


@given(st.binary(), st.text(min_size=1))
def test_setting_the_model_of_a_form_keeps_the_file(content, new):
    content = content.replace(b"--XyZ", b"")
    changed = wire.set_form_model(form((b"file", content), (b"model", b"old")), BOUNDARY, new)
    assert changed == form((b"file", content), (b"model", new.encode()))


@pytest.mark.parametrize(
    ("body", "content_type", "said"),
    [
        (form((b"file", b"x")), BOUNDARY, "model"),
        (form((b"model", b"m")), b"multipart/form-data", "boundary"),
        (form((b"model", b"m"))[:-20], BOUNDARY, "ends before"),
        (b"nothing", BOUNDARY, "does not contain its boundary"),
    ],
)
def test_a_form_that_cannot_be_routed_is_refused(body, content_type, said):
    with pytest.raises(BadRequest, match=said):
        wire.read_form(body, content_type)


@pytest.mark.parametrize(
    "head",
    [
        b"\r\n" + b"content-disposition:" * 100_000,
        b"\r\ncontent-disposition:" * 100_000,
        b"\r\ncontent-disposition:" + b"; name" * 300_000,
    ],
)
def test_the_head_of_a_part_is_read_once_however_long_it_is(head):
    body = b"--XyZ%b\r\n\r\nx\r\n--XyZ--\r\n" % head
    with pytest.raises(BadRequest, match="model"):
        wire.read_form(body, BOUNDARY)


def test_every_model_of_a_form_is_set():
    fields = [(b"model", b"a"), (b"file", b"x")] * 20_000
    changed = wire.set_form_model(form(*fields), BOUNDARY, "bcd")
    assert changed == form(*[(b"model", b"bcd"), (b"file", b"x")] * 20_000)
