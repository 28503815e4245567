"""What an answer used and how it ended, read while its bytes pass, and usage that only we asked for."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.accounting import Account, DocumentAccount, StreamAccount, Usage, ask_usage, take_cost
from proxy.errors import BadRequest

FINGERPRINT = '"system_fingerprint":"vllm-0.32.0-8a8103d3"'


def chunk(rest: str, **choice: object) -> str:
    choices = json.dumps([{"index": 0, **choice}] if choice else [], separators=(",", ":"))
    return f'data: {{"id":"c","object":"chat.completion.chunk","model":"m","choices":{choices}{rest}}}\n\n'


def chat_of_vllm(*, usage: bool) -> bytes:
    """What vLLM 0.32 sends to those who ask for usage, and to those who do not."""
    told = chunk(f',"usage":{{"prompt_tokens":32,"total_tokens":35,"completion_tokens":3}},{FINGERPRINT}')
    return "".join(
        (
            chunk(',"prompt_token_ids":null', delta={"role": "assistant", "content": ""}, finish_reason=None),
            chunk("", delta={"content": 'say "usage":null, "finish_reason":"stop" or é'}, finish_reason=None),
            chunk("" if usage else f",{FINGERPRINT}", delta={"content": "!"}, finish_reason="length"),
            told if usage else "",
            "data: [DONE]\n\n",
        )
    ).encode()


def chat_of_others(*, usage: bool) -> bytes:
    """What servers send that tell of usage in every event, with white space, comments and other line ends."""
    null = ', "usage": null' if usage else ""
    told = 'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2,\r\n'
    told += 'data: "prompt_tokens_details": {"cached_tokens": 4}}}\r\n\r\n'
    return "".join(
        (
            ": PROCESSING\r\n\r\n",
            f'data: {{"choices": [{{"delta": {{"content": "a"}}, "finish_reason": null}}]{null}}}\r\n\r\n',
            f'data: {{"choices": [{{"delta": {{}}, "finish_reason": "tool_calls"}}]{null}}}\r\n\r\n',
            told if usage else "",
            "data: [DONE]\r\n\r\n",
        )
    ).encode()


RESPONSES = b"""event: response.created
data: {"response":{"status":"in_progress","usage":null,"tools":[{"properties":{"usage":{"type":"object"}}}]},"type":"x"}

event: response.output_text.delta
data: {"delta":"the word \\"usage\\"","type":"response.output_text.delta"}

event: response.completed
data: {"response":{"incomplete_details":{"reason":"max_output_tokens"},"status":"incomplete",\
"usage":{"input_tokens":32,"input_tokens_details":{"cached_tokens":16},"output_tokens":4,"total_tokens":36}},"type":"response.completed"}

"""

MESSAGES = b"""event: message_start
data: {"type":"message_start","message":{"stop_reason":null,"usage":{"input_tokens":30,"cache_read_input_tokens":2,\
"output_tokens":0}}}

event: content_block_delta
data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"Talk"},"index":0}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"tool_use","stop_sequence":null},"usage":{"output_tokens":7}}

event: message_stop
data: {"type":"message_stop"}

"""

STREAMS = [
    (chat_of_vllm(usage=True), chat_of_vllm(usage=False), Usage(32, 3), "length"),
    (chat_of_others(usage=True), chat_of_others(usage=False), Usage(5, 2, 4), "tool_calls"),
    (chat_of_others(usage=True).replace(b"\r", b""), chat_of_others(usage=False).replace(b"\r", b""), Usage(5, 2, 4),
     "tool_calls"),
    (RESPONSES, RESPONSES, Usage(32, 4, 16), "length"),
    (MESSAGES, MESSAGES, Usage(32, 7, 2), "tool_calls"),
]  # fmt: skip
CUTS = st.lists(st.integers(0, 2000), max_size=40)


def passed(account: Account, stream: bytes, cuts: list[int]) -> bytes:
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    out = [account.feed(stream[start:end]) for start, end in itertools.pairwise(edges)]
    return b"".join([*out, account.end()])


@given(st.sampled_from(STREAMS), CUTS)
def test_a_stream_that_was_asked_for_its_usage_passes_as_if_it_had_not_been_however_it_is_cut(stream, cuts):
    asked, unasked, usage, reason = stream
    account = StreamAccount(hide_usage=True)
    assert passed(account, asked, cuts) == unasked
    assert (account.tally.usage, account.tally.finish_reason) == (usage, reason)


@given(st.sampled_from(STREAMS), CUTS)
def test_a_stream_whose_client_asked_passes_byte_for_byte_and_is_counted_alike_however_it_is_cut(stream, cuts):
    asked, _, usage, reason = stream
    account = StreamAccount()
    assert passed(account, asked, cuts) == asked
    assert (account.tally.usage, account.tally.finish_reason) == (usage, reason)


@given(st.binary(max_size=300), CUTS, st.booleans())
def test_any_bytes_pass_unchanged(stream, cuts, hide_usage):
    assert passed(StreamAccount(hide_usage=hide_usage), stream, cuts) == stream


def test_the_events_of_a_stream_pass_as_soon_as_they_are_whole():
    account = StreamAccount(hide_usage=True)
    event = chunk("", delta={"content": "a"}, finish_reason=None).encode()
    assert account.feed(event) == event
    assert account.feed(event[:20]) == b""
    assert account.feed(event[20:] + event[:5]) == event


def test_a_stream_that_breaks_leaves_no_piece_of_an_event_behind_and_loses_no_whole_one():
    account = StreamAccount(hide_usage=True)
    last = chunk("", delta={"content": "b"}, finish_reason="stop").encode()
    assert account.feed(last + b'data: {"cho') + account.broken() == last


def test_of_several_choices_the_one_that_ends_last_tells_why():
    account = StreamAccount()
    for reason in ("length", "stop"):
        account.feed(chunk("", delta={}, finish_reason=reason).encode())
    assert account.tally.finish_reason == "stop"


def test_the_first_token_of_a_stream_is_not_its_first_byte():
    account = StreamAccount(first_token=b'.delta"')
    events = [event + b"\n\n" for event in RESPONSES.split(b"\n\n")[:2]]
    begun = []
    for event in events:
        account.feed(event)
        begun.append(account.begun)
    assert begun == [False, True]


@pytest.mark.parametrize("event", [b'data: {"error":{"message":"x","code":500}}\n\n', b'data: {"error": "x"}\n\n'])
def test_an_error_that_an_engine_puts_into_its_stream_is_noticed(event):
    account = StreamAccount(hide_usage=True)
    assert account.feed(event) == event
    assert account.tally.failed


@pytest.mark.parametrize("usage", [b'"many"', b'{"prompt_tokens":-1}', b'{"prompt_tokens":1e99}', b"[", b"null", b"{}"])
def test_figures_that_make_no_sense_are_not_counted(usage):
    event = b'data: {"choices":[],"usage":' + usage + b"}\n\n"
    account = StreamAccount()
    assert account.feed(event) == event
    assert account.tally.usage is None


def test_a_reason_that_nobody_knows_is_not_a_name_of_its_own():
    account = StreamAccount()
    account.feed(chunk("", delta={}, finish_reason="x" * 50).encode())
    assert account.tally.finish_reason == "other"


DOCUMENTS = [
    ({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}],
      "usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}},
     Usage(9, 4, 8), "stop"),
    ({"choices": [{"finish_reason": "length"}, {"finish_reason": None}], "usage": {"prompt_tokens": 9}},
     Usage(9, 0), "length"),
    ({"object": "list", "data": [{"embedding": [0.25] * 100}], "usage": {"prompt_tokens": 7, "total_tokens": 7}},
     Usage(7, 0), None),
    ({"object": "list", "data": [{"embedding": [0.25] * 20_000}], "usage": {"prompt_tokens": 7, "total_tokens": 7}},
     Usage(7, 0), None),
    ({"choices": [{"message": {"content": "x" * 80_000}, "finish_reason": "stop"}],
      "usage": {"prompt_tokens": 9, "completion_tokens": 4}, "metrics": None}, Usage(9, 4), "stop"),
    ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"},
      "metadata": {"usage": "mine"}, "usage": {"input_tokens": 3, "output_tokens": 2}}, Usage(3, 2), "length"),
    ({"type": "message", "stop_reason": "end_turn", "usage": {"input_tokens": 3, "output_tokens": 2}},
     Usage(3, 2), "stop"),
    ({"text": "spoken", "usage": {"type": "duration", "seconds": 3}}, None, None),
    ({"results": []}, None, None),
    ([1, 2], None, None),
]  # fmt: skip


@given(st.sampled_from(DOCUMENTS), st.lists(st.integers(0, 100_000), max_size=8), st.sampled_from([None, 2]))
def test_a_document_passes_byte_for_byte_and_is_counted_alike_however_it_is_cut(document, cuts, indent):
    value, usage, reason = document
    data = json.dumps(value, indent=indent).encode()
    account = DocumentAccount()
    assert passed(account, data, cuts) == data
    assert (account.tally.usage, account.tally.finish_reason) == (usage, reason)


@given(st.binary(max_size=200), st.sampled_from([1, 1000]), CUTS)
def test_a_document_that_is_none_passes_and_counts_nothing(data, times, cuts):
    data, account = data * times, DocumentAccount()
    assert passed(account, data, cuts) == data
    assert account.tally.usage is None


# Asking

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.sampled_from([None, "", " ", "\n"]))
def test_asking_for_usage_changes_nothing_else(fields, space):
    body = {**fields, "model": "m"}
    body.pop("stream_options", None)
    encoded = json.dumps(body, indent=space).encode()
    asking = ask_usage(encoded, b"")
    assert asking is not None
    assert json.loads(asking) == {**body, "stream_options": {"include_usage": True}}
    assert asking.replace(b'"stream_options":{"include_usage":true},', b"", 1) == encoded


@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_usage": 1}, {"include_usage": "true"}])
def test_a_client_that_asks_is_left_alone(options):
    body = {"model": "m", "stream": True, "stream_options": options}
    assert ask_usage(json.dumps(body).encode(), json.dumps(options).encode()) is None


@pytest.mark.parametrize("options", [5, "x", [1], {"include_usage": "perhaps"}, {"include_usage": []}])
def test_options_that_are_not_valid_are_left_for_the_engine_to_refuse(options):
    body = {"model": "m", "stream": True, "stream_options": options}
    assert ask_usage(json.dumps(body).encode(), json.dumps(options).encode()) is None


@pytest.mark.parametrize(
    "options", [None, {}, {"include_usage": False}, {"include_usage": None}, {"continuous_usage_stats": True, "x": [1]}]
)
def test_other_options_stay_but_for_those_that_would_show_usage(options):
    body = {"model": "m", "stream": True, "stream_options": options, "n": 1}
    asking = ask_usage(json.dumps(body).encode(), json.dumps(options).encode())
    assert asking is not None
    expected = {**(options or {}), "include_usage": True, "continuous_usage_stats": False}
    assert json.loads(asking) == {**body, "stream_options": expected}


def test_of_options_that_come_twice_none_is_left():
    asking = ask_usage(b'{"stream_options":{"include_usage":true},"model":"m","stream_options":null}', b"null")
    assert asking is not None
    assert asking.count(b"stream_options") == 1


# What it cost

TOLD = b'event: x\ndata: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":5}}\n\n'


@pytest.mark.parametrize(("usd", "shown"), [(0.25, b"0.25"), (None, b"null")])
def test_the_cost_stands_in_the_usage_and_all_else_of_the_event_stays(usd, shown):
    account = StreamAccount(cost=lambda usage: usd if usage == Usage(11, 5) else 99.0)
    assert account.feed(TOLD) == TOLD.replace(b"5}}", b'5,"cost":' + shown + b"}}")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (b'{"include_cost":true}', ({"include_usage": True}, True)),
        (b'{"include_cost": true, "include_usage": false, "a": [1]}', ({"include_usage": True, "a": [1]}, True)),
        (b'{"include_cost":false,"include_usage":false}', ({"include_usage": False}, False)),
        (b'{"include_cost":null}', ({}, False)),
        (b'{"include_usage":true}', None),
        (b"null", None),
    ],
)
def test_a_wish_for_the_cost_is_taken_out_and_is_one_for_the_usage(options, expected):
    taken = take_cost(options)
    assert (taken and (json.loads(taken[0]), taken[1])) == expected


@pytest.mark.parametrize(
    "options", [b'{"include_cost":1}', b'{"include_cost":"true"}', b'["include_cost", "include_cost":']
)
def test_a_wish_for_the_cost_is_true_or_false(options):
    with pytest.raises(BadRequest) as caught:
        take_cost(options)
    assert caught.value.param == "stream_options.include_cost"
