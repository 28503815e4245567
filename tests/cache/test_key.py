"""One key for all spellings of a request, another for whatever changes its answer."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.key import key
from proxy.providers import Asked
from proxy.wire import read_json

CHAT = "/v1/chat/completions"
SALT, KEY_ID = "s" * 64, "0123456789abcdef"
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": TEXTS}), min_size=1,
                    max_size=3)  # fmt: skip
BODIES = st.fixed_dictionaries(
    {"model": st.just("m"), "messages": MESSAGES},
    optional={
        "temperature": st.sampled_from([0, 1, 2]),
        "stop": st.lists(TEXTS, max_size=2),
        "response_format": VALUES,
        "x": VALUES,
    },
)


def of(body: bytes | dict[str, Any], path: str = CHAT, **asked: Any) -> bytes | None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"query": b"", "headers": [], "salt": SALT, "model": "m", "revision": "r", "key_id": KEY_ID, **asked}
    model, revision, key_id = (given.pop(name) for name in ("model", "revision", "key_id"))
    fixed, envelope = given.pop("fixed", False), read_json(data)
    request = Asked(path=path, body=data, envelope=envelope, request_id=b"id", **given)
    return key(request, model, revision, key_id, fixed=fixed)


def spelled(value: Any, chance: random.Random, *, ordered: bool = False) -> str:
    """Return JSON for a value as another client may write it: order, white space, escapes."""

    def space() -> str:
        return chance.choice(["", " ", "\n", "\t "])

    if isinstance(value, dict):
        items = list(value.items())
        if not ordered:
            chance.shuffle(items)
        inner = (
            f"{space()}{spelled(k, chance)}{space()}:{spelled(v, chance, ordered=k == 'properties')}" for k, v in items
        )
        return space() + "{" + ",".join(inner) + space() + "}"
    if isinstance(value, list):
        return "[" + ",".join(space() + spelled(v, chance) + space() for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=chance.random() < 0.5)
    return json.dumps(value)


@given(BODIES, st.randoms(use_true_random=False))
def test_two_spellings_of_one_body_have_one_key(body: dict[str, Any], chance: random.Random) -> None:
    assert of(spelled(body, chance).encode()) == of(body) is not None


@given(BODIES, BODIES)
def test_two_bodies_that_are_not_equal_have_two_keys(one: dict[str, Any], other: dict[str, Any]) -> None:
    def told_apart(body: dict[str, Any]) -> str:  # in Python True is 1, and so is 1.0
        top = {n: int(v) if isinstance(v, float) and v.is_integer() else v for n, v in body.items()}
        return json.dumps(top, sort_keys=True)

    assert (of(one) == of(other)) == (told_apart(one) == told_apart(other))


@given(BODIES, VALUES)
def test_what_does_not_change_an_answer_does_not_change_the_key(body: dict[str, Any], value: Any) -> None:
    for name in ("user", "metadata", "routing", "safety_identifier"):
        assert of({**body, name: value}) == of(body)
    assert of({**body, "stream": True, "stream_options": {"include_usage": True}}) == of(body)
    assert of({**body, "model": "another name of it"}) == of(body)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"temperature":0}', b'{"temperature":0.0}'),
        (b'{"temperature":1}', b'{"temperature":1e0}'),
        (b'{"temperature":0.5}', b'{"temperature":5e-1}'),
        (b'{"temperature":0}', b'{"temperature":-0.0}'),
        (b'{"max_tokens":16}', b'{"max_tokens":16.0}'),
        (b'{"stop":"\\u00e9"}', '{"stop":"é"}'.encode()),
        (b'{"stop":"\\ud83d\\ude00"}', '{"stop":"😀"}'.encode()),
        (b'{"stop":"\\/"}', b'{"stop":"/"}'),
        (b'{"n":1,"n":2}', b'{"n":2}'),
        (b'{"x":{"n":1,"n":2}}', b'{"x":{"n":2}}'),
        (b'{"stream":false,"stream_options":null}', b"{}"),
        (b'{"stream":true,"stream_options":{"continuous_usage_stats":false}}', b"{}"),
    ],
)
def test_spellings_of_one_request(one: bytes, other: bytes) -> None:
    assert of(_with_model(one)) == of(_with_model(other)) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"temperature":0}', b'{"temperature":null}'),
        (b'{"temperature":0}', b"{}"),
        (b'{"temperature":0}', b'{"temperature":"0"}'),
        (b'{"x":true}', b'{"x":1}'),
        (b'{"x":[]}', b'{"x":{}}'),
        (b'{"x":"1"}', b'{"x":1}'),
        (b'{"seed":9007199254740993}', b'{"seed":9007199254740992}'),
        (b'{"seed":123456789012345678901234}', b'{"seed":123456789012345678901235}'),
        (b'{"messages":[1,2]}', b'{"messages":[2,1]}'),
        ('{"stop":"é"}'.encode(), '{"stop":"e\u0301"}'.encode()),  # one character or two: other tokens
        (b'{"tools":[{"type":"function","minimum":1}]}', b'{"tools":[{"type":"function","minimum":1.0}]}'),
        (
            b'{"response_format":{"schema":{"properties":{"a":1,"b":2}}}}',
            b'{"response_format":{"schema":{"properties":{"b":2,"a":1}}}}',
        ),
        (b'{"stream":true,"stream_options":{"continuous_usage_stats":true}}', b'{"stream":true}'),
        (b'{"cache_salt":"a"}', b'{"cache_salt":"b"}'),
        (b'{"logprobs":true}', b"{}"),
        (b'{"n":2}', b"{}"),
    ],
)
def test_requests_that_may_have_other_answers(one: bytes, other: bytes) -> None:
    first, second = of(_with_model(one)), of(_with_model(other))
    assert first is not None
    assert second is not None
    assert first != second


def _with_model(body: bytes) -> bytes:
    return b'{"model":"m"' + (b"," + body[1:] if len(body) > 2 else b"}")


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "n"},
        {"revision": "s"},
        {"salt": "t" * 64},
        {"key_id": "fedcba9876543210"},
        {"key_id": ""},
        {"path": "/v1/completions"},
        {"query": b"api-version=2"},
        {"headers": [(b"anthropic-beta", b"context-1m")]},
    ],
)
def test_who_asks_whom_and_how_is_a_part_of_the_key(changed: dict[str, Any]) -> None:
    body = {"model": "m", "prompt": "hi"}
    assert of(body, **changed) != of(body)


def test_a_shared_key_is_that_of_every_caller() -> None:
    body = {"model": "m", "prompt": "hi"}
    assert of(body, key_id="", salt="a") == of(body, key_id="", salt="b")


def test_a_key_begins_with_the_id_of_its_caller() -> None:
    made = of({"model": "m"})
    assert made is not None
    assert (made.hex()[:16], len(made)) == (KEY_ID, 32)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/responses", {"previous_response_id": "resp_1"}),
        ("/v1/responses", {"background": True}),
        ("/v1/responses", {"prompt": {"id": "pmpt_1"}}),
        ("/v1/responses", {"tools": [{"type": "web_search"}]}),
        (CHAT, {"web_search_options": {}, "messages": [], "audio": {"voice": "alloy"}}),
        (CHAT, {"messages": [{"role": "user", "content": [{"image_url": {"url": "https://example.com/now.png"}}]}]}),
        (
            "/v1/messages",
            {"messages": [{"content": [{"source": {"type": "url", "url": "https://example.com/a.png"}}]}]},
        ),
        ("/v1/messages", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
        ("/v1/embeddings", {"messages": [{"content": [{"image_url": {"url": "https://example.com/a.png"}}]}]}),
        ("/v1/embeddings", {"input": [{"content": [{"image_url": {"url": "https://example.com/a.png"}}]}]}),
        ("/v1/audio/transcriptions", {}),
    ],
)
def test_an_answer_that_depends_on_more_than_the_request_has_no_key(path: str, fields: dict[str, Any]) -> None:
    assert of({"model": "m", **fields}, path) is None


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [{"content": [{"image_url": {"url": "data:image/png;base64,AA"}}]}]}),
        (CHAT, {"messages": [{"role": "user", "content": "see https://example.com/url"}]}),
        (
            CHAT,
            {"tools": [{"type": "function", "function": {"parameters": {"properties": {"url": {"type": "string"}}}}}]},
        ),
        ("/v1/responses", {"input": "hi", "previous_response_id": None, "background": False}),
        ("/v1/messages", {"tools": [{"name": "mine", "input_schema": {}}]}),
    ],
)
def test_an_answer_that_depends_on_the_request_alone_has_a_key(path: str, fields: dict[str, Any]) -> None:
    assert of({"model": "m", **fields}, path) is not None


SAID = [
    # What is said stands there twice, or inside of something else, or is cut where it is not meant.
    '{"model":"m","messages":["a"],"messages":["a"]}',
    '{"model":"m","messages":["b"],"messages":["a"]}',
    '{"model":"m","x":["a"],"messages":["a"]}',
    '{"model":"m","x":null,"messages":["a"]}',
    '{"model":"m","messages":["a"],"x":["a"]}',
    '{"model":"m","x":"[]","messages":[]}',
    '{"model":"m","x":"","messages":[]}',
    '{"model":"m","x":{"messages":["a"]},"messages":["a"]}',
    '{"model":"m","x":{"messages":["a"]},"messages":["b"]}',
    '{"model":"m","x":"k[",",":"]z","messages":[",",":"]}',
    '{"model":"m","x":"kz","messages":[",",":"]}',
    '{"model":"m","messages":"a"}',
    '{"model":"a","messages":"a"}',
    '{"model":"m","messages":null}',
    '{"model":"m","messages":[]}',
    '{"model":"m"}',
]


@pytest.mark.parametrize("first", range(len(SAID)))
def test_a_body_has_the_key_of_what_is_read_of_it_wherever_its_parts_stand(first: int) -> None:
    def read(body: str) -> str:
        return json.dumps({k: v for k, v in json.loads(body).items() if k != "model"}, sort_keys=True)

    for other in SAID:
        assert (of(SAID[first].encode()) == of(other.encode())) == (read(SAID[first]) == read(other)), other


TOLD = st.lists(st.sampled_from(["[", "]", '"', ",", ":", "messages", "x", "[]", "null"]), max_size=5).map("".join)
NESTED = st.recursive(
    st.none() | TOLD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TOLD, inner, max_size=2), max_leaves=6
)


@given(st.lists(st.tuples(st.sampled_from(["messages", "x", "y"]), NESTED), max_size=4), st.data())
def test_no_two_bodies_have_one_key_though_they_are_cut(fields: list[tuple[str, Any]], data: st.DataObject) -> None:
    """A body is written with keys that come twice, and compared with one that is written from what it means."""

    def written(pairs: list[tuple[str, Any]]) -> bytes:
        inner = "".join(f",{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs)
        return f'{{"model":"m"{inner}}}'.encode()

    meant = dict(fields)
    assert of(written(fields)) == of(written(list(meant.items()))) == of(written(sorted(meant.items()))) is not None
    values = NESTED | st.sampled_from([value for _, value in fields] or [1])
    other = data.draw(st.lists(st.tuples(st.sampled_from(["messages", "x", "y"]), values), max_size=4))
    assert (of(written(other)) == of(written(fields))) == (dict(other) == meant)


def test_where_forms_cannot_be_made_of_each_other_each_has_its_key() -> None:
    assert of({"model": "m", "stream": True}, "/v1/messages") != of({"model": "m"}, "/v1/messages")


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        (CHAT, {"temperature": 0}, True),
        (CHAT, {"temperature": -0.0}, True),
        (CHAT, {"seed": 0, "temperature": 2}, True),
        (CHAT, {"temperature": 0.1}, False),
        (CHAT, {"temperature": "0"}, False),
        (CHAT, {"temperature": False}, False),
        (CHAT, {"seed": None}, False),
        (CHAT, {}, False),
        ("/v1/embeddings", {}, True),
        ("/v2/rerank", {"temperature": 1}, True),
    ],
)
def test_what_gives_the_same_answer_each_time(path: str, fields: dict[str, Any], expected: bool) -> None:
    for said in ({}, {"messages": [], "input": "x"}):
        assert (of({"model": "m", **fields, **said}, path, fixed=True) is not None) is expected
