"""A stream that breaks and is gone on with elsewhere looks to its client as if it had not broken."""

import itertools
import json

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.accounting import StreamAccount
from proxy.continuation import Continuation
from tests.fakes.greedy_engine import CHAT, COMPLETIONS, QUESTION_TOKENS, GreedyEngine, encode, request

PATHS = (CHAT, COMPLETIONS)
CUTS = st.lists(st.integers(0, 3000), max_size=12)
# One token, one event, as vLLM sends them. White space is a token, or begins one.
TOKENS = st.sampled_from(
    ("Hello", " world", ",", " ", "\n\n", "  ", "\t", " é", "日本", "🙂", '"', " \\", "</p>", "\u2028", " a")
)
# Tokens that white space ends, which a partial message cannot end in the middle of, are counted less exactly.
ANY_TOKENS = TOKENS | st.sampled_from((".\n", "x ", ";\n\n")) | st.text(min_size=1, max_size=3)


class Told(msgspec.Struct):
    """What a client learns from the events of a stream."""

    text: str
    reasons: list[str]
    roles: int
    ids: set[tuple[object, ...]]
    usage: dict[str, int] | None
    done: int


def told(stream: bytes) -> Told:
    *events, rest = stream.split(b"\n\n")
    assert rest == b"", "only whole events"
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events if event != b"data: [DONE]"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    deltas = [choice.get("delta", {"content": choice.get("text")}) for choice in choices]
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    return Told(
        text="".join(delta.get("content") or "" for delta in deltas),
        reasons=[choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        roles=sum("role" in delta for delta in deltas),
        ids={(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks},
        usage=usages[-1] if usages else None,
        done=events.count(b"data: [DONE]"),
    )


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    return [stream[start:end] for start, end in itertools.pairwise(edges)]


def continuation_of(path: str, body: dict[str, object]) -> Continuation | None:
    return Continuation.of(path, msgspec.json.decode(encode(body), type=dict[str, msgspec.Raw]))


def passed(engine: GreedyEngine, body: dict[str, object], breaks: list[int], cuts: list[int]) -> bytes:
    """Return what a client gets whose streams break after so many events each, the last not at all.

    The break is in the middle of the next event; none comes after the end of an answer was told.
    """
    continuation = continuation_of(engine.path, body)
    client, number = b"", 0
    while (asked := continuation.resume(encode(body))) is not None:
        splice, account = continuation.splice() if number else None, StreamAccount()
        events = engine.stream(asked, number + 1)
        breaks_here = number < len(breaks)
        if breaks_here:
            end = min(breaks[number], len(events) - 3)
            events = [*events[:end], events[end][:9]]
        for piece in pieces(b"".join(events), cuts):
            out = account.feed(splice.feed(piece) if splice else piece)
            continuation.note(out)
            client += out
        if not breaks_here:
            return client + (splice.end() if splice else b"")
        number += 1
    return client + continuation.finish()


@st.composite
def engines(draw, tokens=TOKENS, most_together=1):
    return GreedyEngine(
        draw(st.sampled_from(PATHS)),
        tuple(draw(st.lists(tokens, max_size=14))),
        together=draw(st.integers(1, most_together)),
        continuous_usage=draw(st.booleans()),
    )


LIMITS = st.fixed_dictionaries({}, optional={"max_tokens": st.integers(1, 20)}) | st.builds(
    lambda n: {"max_completion_tokens": n, "min_tokens": min(n, 2)}, st.integers(1, 20)
)
BREAKS = st.lists(st.integers(0, 16), max_size=4)


@example(GreedyEngine(CHAT, ("Hello", " "), continuous_usage=True), {}, [3, 1], [])
@given(engines(), LIMITS, BREAKS, CUTS)
def test_what_the_client_gets_of_a_broken_stream_is_what_an_unbroken_one_says(engine, limits, breaks, cuts):
    if engine.path == COMPLETIONS:
        limits = {"max_tokens": limits.get("max_tokens")} if "max_tokens" in limits else {}
    body = request(engine.path, **limits)
    whole = told(b"".join(engine.stream(encode(body))))
    got = told(passed(engine, body, breaks, cuts))
    assert (got.text, got.reasons, got.usage) == (whole.text, whole.reasons, whole.usage)
    assert (got.roles, got.done) == (whole.roles, 1)
    assert len(got.ids) == 1


@given(engines(ANY_TOKENS, 3), BREAKS, CUTS)
def test_no_text_is_lost_or_repeated_however_tokens_are_put_into_events(engine, breaks, cuts):
    body = request(engine.path, max_tokens=1000)
    got = told(passed(engine, body, breaks, cuts))
    assert got.text == "".join(engine.tokens)
    assert got.usage["total_tokens"] == got.usage["prompt_tokens"] + got.usage["completion_tokens"]
    assert (got.reasons, got.done) == (["stop"], 1)


# What can be resumed, and what cannot

TEXT = GreedyEngine(CHAT, ("A", " b", " c", " d", " e"))


def broken(path: str = CHAT, events: list[bytes] | None = None, **fields: object) -> Continuation:
    """Return the continuation of a stream that broke after some events: the first two tokens if none are given."""
    body = request(path, **fields)
    continuation = continuation_of(path, body)
    assert continuation is not None
    engine = GreedyEngine(path, TEXT.tokens)
    for event in engine.stream(encode(request(path)))[: 3 if path == CHAT else 2] if events is None else events:
        continuation.note(event)
    return continuation


def resumed(continuation: Continuation, path: str = CHAT, **fields: object) -> dict[str, object]:
    body = continuation.resume(encode(request(path, **fields)))
    assert body is not None
    return json.loads(body)


def chunk(reason: str | None = None, **delta: object) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return b"data: %b\n\n" % encode({"id": "x", "created": 1, "model": "m", "choices": [choice]})


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2}, {"best_of": 3}, {"use_beam_search": True}, {"logprobs": True}, {"logprobs": 0}, {"top_logprobs": 3},
        {"prompt_logprobs": 1}, {"return_token_ids": True}, {"echo": True}, {"suffix": "x"}, {"prompt_embeds": "x"},
        {"truncate_prompt_tokens": 9}, {"include_stop_str_in_output": True}, {"structured_outputs": {"regex": "a"}},
        {"guided_json": {}}, {"guided_regex": "a"}, {"guided_choice": ["a"]}, {"guided_grammar": "a"},
        {"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_schema", "json_schema": {}}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", PATHS)
def test_a_request_for_more_than_one_plain_text_cannot_be_resumed(path, fields):
    assert continuation_of(path, request(path, **fields)) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1}, {"n": None}, {"logprobs": None}, {"logprobs": False}, {"top_logprobs": 0}, {"suffix": None},
        {"response_format": {"type": "text"}}, {"response_format": None}, {"tools": []}, {"stop": ["x"]},
    ],
)  # fmt: skip
def test_a_request_that_says_what_is_so_anyhow_can_be_resumed(fields):
    assert continuation_of(CHAT, request(CHAT, **fields)) is not None


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/audio/transcriptions"])
def test_other_paths_cannot_be_resumed(path):
    assert Continuation.of(path, {}) is None


@pytest.mark.parametrize("prompt", [[1, 2], [[1], [2]], [], None, 5])
def test_a_prompt_of_tokens_cannot_be_resumed(prompt):
    assert continuation_of(COMPLETIONS, {"prompt": prompt}) is None


def test_several_prompts_cannot_be_resumed():
    body = {"prompt": ["a", "b"]}
    continuation = continuation_of(COMPLETIONS, body)
    continuation.note(GreedyEngine(COMPLETIONS, ("A",)).stream(encode(request(COMPLETIONS)))[0])
    assert continuation.resume(encode(body)) is None


@pytest.mark.parametrize(
    "delta",
    [
        {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}, {"function_call": {"name": "f"}},
        {"refusal": "I can't"}, {"audio": {"data": "x"}}, {"reasoning": "Hm"}, {"reasoning_content": "Hm"},
        {"content": [{"type": "text", "text": "a"}]}, {"content": 5},
    ],
)  # fmt: skip
def test_an_answer_that_began_something_beside_text_cannot_be_resumed(delta):
    continuation = broken(events=[chunk(role="assistant", content=""), chunk(**delta)])
    assert continuation.resume(encode(request(CHAT))) is None
    assert continuation.finish() is None


@pytest.mark.parametrize(
    "event", [b"data: {\n\n", b'data: {"choices": 5}\n\n', chunk(content="b").replace(b'"index": 0', b'"index": 1')]
)
def test_an_answer_that_is_not_understood_cannot_be_resumed(event):
    assert broken(events=[chunk(content="a"), event]).resume(encode(request(CHAT))) is None


def test_text_that_is_longer_than_what_is_kept_cannot_be_resumed():
    long = [chunk(role="assistant", content=""), *[chunk(content="word " * 2000) for _ in range(30)]]
    assert broken(events=long).resume(encode(request(CHAT))) is None
    assert broken(events=long[:20]).resume(encode(request(CHAT))) is not None


# The next request


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_that_broke_before_its_text_is_asked_for_again_as_it_was(path):
    body = b'{ "model" : "m", "prompt": "x", "messages": [] }'
    assert continuation_of(path, request(path)).resume(body) is body
    if path == CHAT:
        assert broken(events=[chunk(role="assistant", content="")]).resume(body) is body


def test_the_text_becomes_a_partial_message_and_the_rest_of_the_request_stays():
    asked = resumed(broken(), temperature=0, tools=[{"type": "function"}], seed=5)
    assert asked == request(
        CHAT,
        temperature=0,
        tools=[{"type": "function"}],
        seed=5,
        continue_final_message=True,
        add_generation_prompt=False,
    ) | {"messages": [*request(CHAT)["messages"], {"role": "assistant", "content": "A b"}]}


@pytest.mark.parametrize("prompt", ["P ", ["P "]])
def test_the_text_is_appended_to_a_prompt_with_all_its_white_space(prompt):
    body = {"model": "m", "prompt": prompt, "max_tokens": 9}
    continuation = continuation_of(COMPLETIONS, body)
    for event in GreedyEngine(COMPLETIONS, ("a", " \n", "b")).stream(encode(request(COMPLETIONS)))[:2]:
        continuation.note(event)
    assert json.loads(continuation.resume(encode(body))) == {"model": "m", "prompt": "P a \n", "max_tokens": 7}


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({"max_tokens": 10}, {"max_tokens": 8}),
        ({"max_completion_tokens": 10, "max_tokens": 2}, {"max_completion_tokens": 8, "max_tokens": 1}),
        ({"max_tokens": None}, {"max_tokens": None}),
        ({"max_tokens": 10, "min_tokens": 5}, {"max_tokens": 8, "min_tokens": 3}),
        ({"max_tokens": 10, "min_tokens": 1}, {"max_tokens": 8, "min_tokens": 0}),
    ],
)
def test_the_tokens_that_were_spent_are_taken_off_what_may_and_must_be_generated(asked, left):
    body = resumed(broken(**asked), **asked)
    assert {name: body[name] for name in asked} == left


def test_a_completion_that_says_nothing_of_its_length_has_what_is_left_of_sixteen_tokens():
    assert resumed(broken(COMPLETIONS), COMPLETIONS)["max_tokens"] == 14


@pytest.mark.parametrize(
    ("content", "longer"),
    [
        ("It is ", "It is A b"),
        (None, "A b"),
        ([{"type": "text", "text": "It is "}], [{"type": "text", "text": "It is A b"}]),
    ],
)
def test_a_message_that_the_client_had_continued_gets_longer(content, longer):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    fields = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert resumed(broken(**fields), **fields)["messages"] == [messages[0], {"role": "assistant", "content": longer}]


def test_a_message_that_ends_in_a_picture_cannot_be_continued():
    messages = [{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    fields = {"messages": messages, "continue_final_message": True}
    assert broken(**fields).resume(encode(request(CHAT, **fields))) is None


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_that_is_over_goes_along_under_the_name_it_came_with(name):
    continuation = broken(events=[chunk(role="assistant", content=""), chunk(**{name: "Hm"}), chunk(content="\n\nA")])
    assert resumed(continuation)["messages"][-1] == {"role": "assistant", name: "Hm", "content": "\n\nA"}


def test_what_an_engine_takes_for_reasoning_in_the_middle_of_the_answer_is_answer():
    splice = broken().splice()
    got = told(splice.feed(chunk(role="assistant", content="")) + splice.feed(chunk(reasoning=" c")))
    assert (got.text, got.roles) == (" c", 0)


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"messages": 5}', b'{"messages": [], "max_tokens": "many"}'])
def test_a_body_that_is_not_understood_is_not_sent_on(body):
    assert broken().resume(body) is None


# White space


@pytest.mark.parametrize(
    ("said_again", "client_sees"),
    [
        (("\n", "\nB"), "A\n\nB"),
        (("\n\n\nB",), "A\n\n\nB"),
        (("B",), "A\n\nB"),
        ((" B",), "A\n\n B"),
        (("\n", "B"), "A\n\nB"),
    ],
)
def test_white_space_at_the_end_is_said_once(said_again, client_sees):
    continuation = broken(events=[chunk(content="A"), chunk(content="\n\n")])
    assert resumed(continuation)["messages"][-1]["content"] == "A"
    splice = continuation.splice()
    assert "A\n\n" + told(b"".join(splice.feed(chunk(content=text)) for text in said_again)).text == client_sees


def test_white_space_that_is_all_of_the_text_is_said_once_by_an_engine_that_starts_anew():
    continuation = broken(events=[chunk(content="\n")])
    body = encode(request(CHAT))
    assert continuation.resume(body) is body
    assert continuation.splice().feed(chunk(content="\n")) == b""


# The end of the stream


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_that_has_all_its_tokens_is_finished_for_its_length(path):
    engine = GreedyEngine(path, TEXT.tokens, ends_apart=True, continuous_usage=True)
    fields = {"max_tokens": 2}
    events = engine.stream(encode(request(path, **fields)))
    continuation = broken(path, events[:-3], **fields)
    assert continuation.resume(encode(request(path, **fields))) is None
    end = continuation.finish()
    assert told(b"".join(events[:-3]) + end) == told(b"".join(events))


def test_usage_that_nobody_told_is_not_made_up():
    continuation = broken(max_tokens=2)
    assert told(continuation.finish()).usage is None


@pytest.mark.parametrize("events", [1, 2, 3])
@pytest.mark.parametrize("path", PATHS)
def test_an_answer_whose_engine_said_why_it_ended_is_only_closed(path, events):
    stream = GreedyEngine(path, TEXT.tokens, continuous_usage=True).stream(encode(request(path)))
    got = stream[: len(stream) - 3 + events]
    continuation = broken(path, got)
    assert continuation.resume(encode(request(path))) is None
    assert told(b"".join(got) + continuation.finish()) == told(b"".join(stream))


def test_an_answer_that_is_not_whole_is_not_finished():
    assert broken(max_tokens=3).finish() is None
    assert continuation_of(CHAT, request(CHAT)).finish() is None


# The second stream


def test_what_the_first_stream_did_not_say_of_itself_is_as_the_second_says_it():
    continuation = broken(events=[b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'])
    assert told(continuation.splice().feed(chunk(content="b").replace(b'"x"', b'"y"'))).ids == {("x", 1, "m")}


def test_what_is_no_chunk_passes_as_it_is():
    splice = broken().splice()
    for event in (b'data: {"error":{"message":"x"}}\n\n', b": ping\n\n", b"data: [DONE]\n\n", b"data: {\n\n"):
        assert splice.feed(event) == event


def test_half_an_event_of_a_stream_that_breaks_again_does_not_pass():
    splice = broken().splice()
    assert splice.feed(chunk(content=" c")[:30]) + splice.broken() == b""


def test_no_more_tokens_of_the_prompt_are_cached_than_it_has():
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 9, "x": 1}}
    event = b"data: %b\n\n" % encode({"choices": [], "usage": usage})
    got = json.loads(broken().splice().feed(event)[6:])["usage"]
    assert got["prompt_tokens_details"] == {"cached_tokens": QUESTION_TOKENS, "x": 1}
    assert (got["prompt_tokens"], got["completion_tokens"], got["total_tokens"]) == (QUESTION_TOKENS, 5, 12)


@given(st.lists(ANY_TOKENS, max_size=150), st.sampled_from(PATHS))
def test_text_that_is_read_while_it_passes_is_the_text_that_is_read_at_the_end(tokens, path):
    padding = " ".join("x" * 50 for _ in range(9))
    stream = GreedyEngine(path, tuple(t + padding for t in tokens)).stream(encode(request(path, max_tokens=1000)))
    at_once, by_events = broken(path, [b"".join(stream[:-3])]), broken(path, stream[:-3])
    body = encode(request(path, max_tokens=1000))
    assert at_once.resume(body) == by_events.resume(body)


@given(st.binary(max_size=200))
def test_any_bytes_are_taken(data):
    continuation = broken(events=[data])
    continuation.resume(encode(request(CHAT)))
    continuation.splice().feed(data)
    continuation.finish()
    assert "Continuation" in repr(continuation)
