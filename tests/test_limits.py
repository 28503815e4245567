"""How much one request may ask for, and what it may reach past the model."""

import json
import urllib.parse

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import forbidden, limits, media, wire
from proxy.errors import BadRequest
from proxy.forbidden import Policy
from proxy.limits import Limits

CHAT = "/v1/chat/completions"
SMALL = Limits(
    n=2, best_of=2, logprobs=5, prompts=3, inputs=3, messages=3, tools=2, stop=2, stop_chars=10, token_lists=2,
    images=2, depth=8, schema_bytes=200, regex_chars=20, choices=2,
)  # fmt: skip
NOTHING = Policy()
USER = {"role": "user", "content": "hi"}


def check(fields: dict[str, object], path: str = CHAT, most: Limits = SMALL, policy: Policy = NOTHING) -> None:
    body = json.dumps({"model": "m", **fields}).encode()
    envelope = wire.read_json(body)
    limits.check(path, body, envelope.fields, most)
    forbidden.check(envelope.fields, policy, most)


def refusal(fields: dict[str, object], path: str = CHAT, policy: Policy = NOTHING) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        check(fields, path, policy=policy)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param", "setting"),
    [
        ({"n": 3}, "n", "limits.n"),
        ({"n": -1}, "n", "limits.n"),
        ({"n": 10**30}, "n", "limits.n"),
        ({"best_of": 20}, "best_of", "limits.best_of"),
        ({"logprobs": 6}, "logprobs", "limits.logprobs"),
        ({"top_logprobs": -1}, "top_logprobs", "limits.logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "limits.logprobs"),
        ({"prompt": ["a"] * 4}, "prompt", "limits.prompts"),
        ({"prompt": [[1], [2], [3], [4]]}, "prompt", "limits.prompts"),
        ({"prompt": ["a", "b"], "n": 2}, "n", "limits.prompts"),
        ({"messages": [USER] * 4}, "messages", "limits.messages"),
        ({"tools": [{}] * 3}, "tools", "limits.tools"),
        ({"tools": [{"x": "y" * 300}]}, "tools", "limits.schema_bytes"),
        ({"stop": ["a"] * 3}, "stop", "limits.stop"),
        ({"stop": "a" * 20}, "stop", "limits.stop_chars"),
        ({"stop_sequences": ["a" * 20]}, "stop_sequences", "limits.stop_chars"),
        ({"logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias", "limits.token_lists"),
        ({"bad_words": ["a"] * 3}, "bad_words", "limits.token_lists"),
        ({"documents": ["a"] * 4}, "documents", "limits.inputs"),
        ({"response_format": {"json_schema": "x" * 300}}, "response_format", "limits.schema_bytes"),
        ({"text": {"format": "x" * 300}}, "text", "limits.schema_bytes"),
        ({"guided_json": "x" * 300}, "guided_json", "limits.schema_bytes"),
        ({"guided_grammar": "x" * 300}, "guided_grammar", "limits.schema_bytes"),
        ({"guided_regex": "x" * 30}, "guided_regex", "limits.regex_chars"),
        ({"guided_choice": ["a"] * 3}, "guided_choice", "limits.choices"),
        ({"structured_outputs": {"grammar": "x" * 300}}, "structured_outputs", "limits.schema_bytes"),
        ({"structured_outputs": {"regex": "x" * 30}}, "structured_outputs.regex", "limits.regex_chars"),
        ({"structured_outputs": {"choice": ["a"] * 3}}, "structured_outputs.choice", "limits.choices"),
    ],
)
def test_too_much_is_refused_with_field_and_limit(fields, param, setting):
    error = refusal(fields)
    assert error.status == 400
    assert error.param == param
    assert setting in str(error)
    assert len(str(error)) < 200


@pytest.mark.parametrize("value", ["5", 1.5, 1e9, [1], {"a": 1}])
def test_a_count_that_is_no_integer_is_refused_because_an_engine_might_read_it_as_one(value):
    assert refusal({"n": value}).param == "n"


def test_the_last_of_two_equal_fields_counts_as_it_does_for_the_engine():
    body = b'{"model":"m","n":1,"\\u006e":1000}'
    with pytest.raises(BadRequest, match=r"limits\.n"):
        limits.check(CHAT, body, wire.read_json(body).fields, SMALL)


@pytest.mark.parametrize("count", ["3,99999", "99999", "99999,", " 99999 ", "3 , 99999", "1" * 5000])
def test_a_regex_with_a_huge_repetition_is_refused(count):
    with pytest.raises(BadRequest, match="repetition"):
        check({"guided_regex": f"(a{{{count}}})"}, most=Limits(regex_chars=8192))


@pytest.mark.parametrize("text", ["{" + " " * 8000, "{ " * 4000, "{" + "1 " * 4000, "{" + "," * 8000, "{9999}"])
def test_a_regex_is_read_once_whatever_it_holds(text):
    check({"guided_regex": text}, most=Limits(regex_chars=16384))


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2, "best_of": None, "logprobs": True, "top_logprobs": 5, "stop": "a", "stop_sequences": None},
        {"prompt": [1, 2, 3, 4, 5, 6, 7]},
        {"prompt": "a, b, c, d, e, f, g"},
        {"messages": [USER] * 3, "tools": [{}, {}], "response_format": {"type": "text"}},
        {"structured_outputs": {"choice": ["a", "b"]}, "guided_regex": "[a-z]{1,9}"},
        {"messages": "not a list", "tools": 5, "stop": None, "prompt": None, "chat_template": None, "priority": 0},
    ],
)
def test_what_is_within_the_limits_passes(fields):
    check(fields)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/classify"])
def test_the_inputs_of_an_embedding_are_counted(path):
    assert refusal({"input": ["a"] * 4}, path).param == "input"
    check({"input": [1, 2, 3, 4, 5]}, path)


def test_the_items_of_a_response_are_counted_as_messages():
    assert "limits.messages" in str(refusal({"input": [USER] * 4}, "/v1/responses"))


def nested(depth: int, *, opening: str, closing: str) -> bytes:
    return (opening * depth + "1" + closing * depth).encode()


@given(st.integers(1, 30), st.integers(1, 30), st.booleans())
def test_depth_is_measured_exactly(depth, most, listed):
    document = nested(depth, opening="[" if listed else '{"a":', closing="]" if listed else "}")
    assert limits.deeper_than(document, most) is (depth > most)


JSON = st.recursive(
    st.none() | st.integers(0, 9) | st.text('[{}]"\\ a'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("[{a"), inner, max_size=3),
    max_leaves=12,
)


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@given(JSON, st.integers(0, 6), st.sampled_from([None, 1]))
def test_brackets_in_texts_are_not_depth(value, most, indent):
    assert limits.deeper_than(json.dumps(value, indent=indent).encode(), most) is (depth_of(value) > most)


def test_a_document_nested_too_deeply_is_refused():
    assert refusal({"metadata": json.loads(nested(8, opening="[", closing="]"))}).code == "json_too_deep"
    check({"metadata": json.loads(nested(7, opening="[", closing="]"))})


def test_the_parts_of_a_form_have_the_same_limits():
    parts = [b'--X\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % p for p in
             ((b"model", b"m"), (b"n", b"5"), (b"file", b"\x00"))]  # fmt: skip
    fields = wire.read_form(b"".join(parts) + b"--X--\r\n", b"multipart/form-data; boundary=X").fields
    with pytest.raises(BadRequest, match=r"limits\.n"):
        limits.check("/v1/audio/transcriptions", b"", fields, SMALL)


def test_an_item_of_a_form_that_reaches_past_the_model_is_refused():
    part = b'--X\r\nContent-Disposition: form-data; name="%s"\r\n\r\nm\r\n'
    body = part % b"model" + part % b"vllm_xargs[a]" + b"--X--\r\n"
    with pytest.raises(BadRequest, match="vllm_xargs"):
        forbidden.check(wire.read_form(body, b"multipart/form-data; boundary=X").fields, Policy(), SMALL)


def test_a_coding_agent_with_dozens_of_tools_passes_by_default():
    schema = {"type": "object", "properties": {k: {"type": "string", "description": "url " * 20} for k in "abcdefgh"}}
    schema["properties"]["image_url"] = {"type": "string", "url": "http://127.0.0.1/"}
    tools = [{"type": "function", "function": {"name": f"t{i}", "parameters": schema}} for i in range(60)]
    use = {"type": "tool_use", "id": "1", "name": "fetch", "input": {"url": "http://x", "image_url": "http://10.0.0.1"}}
    system = [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}]
    call = {"id": "1", "type": "function", "function": {"name": "t1", "arguments": '{"url": "http://10.0.0.1"}'}}
    messages = [USER, {"role": "assistant", "content": [use]}, {"role": "assistant", "tool_calls": [call]}] * 100
    check({"messages": messages, "tools": tools, "system": system, "max_tokens": 32000}, most=Limits())
    assert len(json.dumps(tools)) > 60_000


# What reaches past the model


@pytest.mark.parametrize("name", sorted(forbidden.FIELDS))
def test_a_field_that_reaches_past_the_model_is_refused_unless_the_model_allows_it(name):
    error = refusal({name: "x"})
    assert (error.status, error.param, error.code) == (400, name, "not_allowed")
    check({name: "x"}, policy=Policy(frozenset((name,))))


def test_variables_of_a_template_pass_if_they_are_plain():
    check({"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low", "budget": 5}})
    check({"chat_template_kwargs": None})


@pytest.mark.parametrize(
    "variables",
    [{"chat_template": "{{ 1 }}"}, {"tokenize": True}, {"x": ["a"]}, {"x": {"a": 1}}, {"x": "y" * 1000}, "text", [1]],
)
def test_variables_that_are_templates_or_arguments_of_the_renderer_are_refused(variables):
    assert refusal({"chat_template_kwargs": variables}).param == "chat_template_kwargs"
    check({"chat_template_kwargs": variables}, policy=Policy(frozenset(("chat_template_kwargs",))))


@pytest.mark.parametrize("key", ["server_url", "server\\u005furl"])
def test_a_tool_at_an_address_of_the_clients_choice_is_refused(key):
    body = b'{"model":"m","input":"x","tools":[{"type":"mcp","%b":"http://10.0.0.1"}]}' % key.encode()
    with pytest.raises(BadRequest, match="server_url"):
        forbidden.check(wire.read_json(body).fields, Policy(), SMALL)


# Media

DATA = "data:image/png;base64,AAAA"
DOMAINS = frozenset(("img.example.com",))
WHERE = [
    lambda url: {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]},
    lambda url: {"messages": [{"role": "user", "content": [{"image_url": url}]}]},
    lambda url: {"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": url}}]}]},
    lambda url: {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}]},
    lambda url: {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": url}}]}]},
    lambda url: {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [
        {"type": "image", "source": {"type": "url", "url": url}}]}]}]},
    lambda url: {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
    lambda url: {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": url}]}]},
    lambda url: {"input": [{"type": "computer_call_output", "output": {"image_url": url}}]},
    lambda url: {"query": "x", "documents": [{"content": [{"type": "image_url", "image_url": {"url": url}}]}]},
    lambda url: {"text_1": {"content": [{"type": "image_url", "image_url": {"url": url}}]}, "text_2": "x"},
]  # fmt: skip


@pytest.mark.parametrize("place", WHERE)
def test_media_pass_as_data_and_from_the_domains_of_the_server_in_every_shape(place):
    check(place(DATA))
    check(place("https://img.example.com/a.png?x=1"), policy=Policy(domains=DOMAINS))
    check(place("https://anywhere.example/a.png"), policy=Policy(domains=None))
    error = refusal(place("https://img.example.com/a.png"))
    assert error.code == "url_not_allowed"
    assert refusal(place("http://169.254.169.254/latest/"), policy=Policy(domains=DOMAINS)).code == "url_not_allowed"


def test_a_key_spelled_with_escapes_hides_nothing():
    body = b'{"model":"m","messages":[{"role":"user","content":[{"\\u0069mage_url":{"\\u0075rl":"http://10.0.0.1"}}]}]}'
    with pytest.raises(BadRequest, match="data:"):
        forbidden.check(wire.read_json(body).fields, Policy(), SMALL)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://img.example.com/a", "gopher://img.example.com", "//img.example.com/a",
        "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/", "http://127.1/", "http://[::1]/",
        "http://[::ffff:127.0.0.1]/", "http://[::ffff:img.example.com]/", "http://127.0.0.1#@img.example.com/",
        "http://img.example.com@10.0.0.1/", "http://user:pass@img.example.com/", "http://img.example.com\\@10.0.0.1/",
        "http://10.0.0.1\\img.example.com/", "http://img.example.com./", "http://img.example.com:22/",
        "http://img.example.com:80@10.0.0.1/", "http://img.example.com.evil.org/", "http://evil-img.example.com/",
        "http://a.img.example.com/", "http://img。example。com/", "http://ⅰmg.example.com/", "http://img.example.com/\n",
        "\nhttp://img.example.com/", " http://img.example.com/", "http://img.example.com/ a", "http:/img.example.com/",
        "http:img.example.com", "http://img%2eexample.com/", "http://img.example.com%00.evil.org/", "https://", "",
        "http://img.example.com?@10.0.0.1/\\", "http://img.example.com#x", "javascript:alert(1)", "DATA",
    ],
)  # fmt: skip
def test_another_spelling_of_a_host_is_another_host(url):
    assert not media.may_fetch(url, DOMAINS)


@pytest.mark.parametrize(
    "url",
    ["http://img.example.com", "https://img.example.com/a%20b.png?c=d", "https://IMG.example.com/a",
     "https://img.example.com:443/", "http://img.example.com:80/x", DATA, "DATA:image/png;base64,AA"],
)  # fmt: skip
def test_a_plain_url_of_a_domain_may_be_fetched(url):
    assert media.may_fetch(url, DOMAINS)


@given(st.text(), st.sampled_from(["http://", "https://", "//", "", "http://img.example.com"]))
def test_no_other_host_gets_through(rest, start):
    url = start + rest
    if media.may_fetch(url, DOMAINS) and url[:5].lower() != "data:":
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname == "img.example.com"
        assert parts.username is None
        assert "\\" not in url


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"type": "image_embeds", "image_embeds": "AAAA"}, "image_embeds"),
        ({"type": "prompt_embeds", "data": "AAAA"}, "prompt_embeds"),
        ({"image_pil": "x"}, "image_pil"),
        ({"type": "file", "file": {"file_id": "f-1"}}, "file_id"),
        ({"type": "image_url", "uuid": "1"}, "uuid"),
        ({"image_url": {"url": DATA}, "uuid": "1"}, "uuid"),
    ],
)
def test_parts_that_name_files_tensors_or_what_others_sent_are_refused(part, name):
    fields = {"messages": [{"role": "user", "content": [part]}]}
    assert refusal(fields).param == name
    check(fields, policy=Policy(frozenset((name,))))


def test_images_are_counted_over_all_messages():
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": DATA}}]}
    check({"messages": [image] * 2})
    assert "limits.images" in str(refusal({"messages": [image] * 3}))


@given(JSON)
def test_whatever_the_body_holds_it_passes_or_is_a_bad_request(value):
    for name in ("messages", "tools", "input", "stop", "structured_outputs", "chat_template_kwargs", "n", "prompt"):
        try:
            check({name: value})
        except BadRequest as e:
            msgspec.json.decode(e.envelope())


LONG = "word " * 4000


def test_a_long_prompt_is_known_to_be_plain_and_no_other_value_is():
    fields = wire.read_json(json.dumps({"model": "m", "messages": [{"role": "user", "content": LONG}]}).encode()).fields
    known = limits.check(CHAT, b"", fields, Limits())
    assert known is fields["messages"]
    picture = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
    for messages in ([{"role": "user", "content": [picture]}], [{"role": "user", "content": [picture, LONG]}]):
        other = {"messages": msgspec.Raw(json.dumps(messages).encode())}
        with pytest.raises(BadRequest, match="image_url"):
            forbidden.check(other, NOTHING, Limits(), known)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "text", "text": LONG}, {"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": LONG, "unheard_of": 1},
        [LONG],
    ],
)
def test_what_is_long_and_not_plain_is_looked_at(message):
    fields = {"messages": msgspec.Raw(json.dumps([message]).encode())}
    assert limits.check(CHAT, b"", fields, Limits()) is None


@pytest.mark.parametrize("message", [USER, {}, 1, "a", [], {"role": "user", "content": [{"type": "image_url"}]}])
def test_too_many_messages_are_refused_whatever_they_are(message):
    fields = {"messages": msgspec.Raw(json.dumps([message] * 5000).encode())}
    with pytest.raises(BadRequest, match=r"5000 items.*limits\.messages"):
        limits.check(CHAT, b"", fields, Limits())
