"""What a client sees of endpoints that fail: another one's answer, the rest of a stream from another, or an error."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import msgspec
import pytest

from benchmarks.ports import free_port
from proxy.config import BreakerSettings, Config, EndpointSettings, ModelSettings, RetrySettings, Timeouts
from proxy.failures import retry_after
from tests.fakes.one_worker import DONE, EVENTS, JSON, ROLE, Proxy, document, event, events, proxying, text_of
from tests.fakes.scripted_upstream import Play, ScriptedUpstream, Step, eventually, ok, upstream

SOON = Timeouts(connect=1.0, first_byte=0.5, between_bytes=0.5)  # for who is silent; others may need longer
PATIENT = Timeouts(connect=60.0, first_byte=60.0, between_bytes=60.0)
Story = Callable[[Proxy, ScriptedUpstream, ScriptedUpstream], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n" + EVENTS + b"\r\n\r\n"


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 120))


def piece(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def streamed(*parts: bytes, end: bool = True) -> list[bytes | Step]:
    """A play that streams parts, each in a chunk of its own."""
    return [HEAD, *map(piece, parts), *([b"0\r\n\r\n"] if end else [])]


def plain(text: str) -> list[bytes | Step]:
    return [ok(document(text), JSON)]


def either(stream: bool, *texts: str) -> list[bytes | Step]:
    return streamed(*events(*texts)) if stream else plain("".join(texts))


def said(answer: httpx2.Response) -> str:
    if answer.headers["content-type"].startswith("text/event-stream"):
        return text_of(answer.text)
    return answer.json()["choices"][0]["message"]["content"]


def endpoint(address: str, **settings: Any) -> EndpointSettings:
    return EndpointSettings(base_url=f"{address}/v1", **{"continues": True, **settings})


def model(*addresses: str, **settings: Any) -> ModelSettings:
    return ModelSettings(endpoints=tuple(map(endpoint, addresses)), **{"timeouts": PATIENT, **settings})


def two_models(first: Play | str, second: Play, story: Story, **settings: Any) -> None:
    """Tell a story of a model `m` whose endpoint plays one thing, and `n`, its fallback, that plays another."""

    async def tell() -> None:
        async with AsyncExitStack() as stack:
            b = await stack.enter_async_context(upstream(second))
            a = b if isinstance(first, str) else await stack.enter_async_context(upstream(first))
            address = first if isinstance(first, str) else a.address
            falls_silent = not isinstance(first, str) and bool({Step.STALL, Step.PING} & {*first})
            m = model(address, **{"timeouts": SOON if falls_silent else PATIENT, **settings})
            config = Config(models={"m": m, "n": model(b.address)}, fallbacks={"m": ("n",)})
            proxy = await stack.enter_async_context(proxying(config))
            await story(proxy, a, b)
            await eventually(lambda: proxy.running() == 0)
            assert proxy.in_flight() == 0

    run(tell())


# The wire matrix: nothing has been sent, so another endpoint answers.

REFUSED = "refused"
LENGTH = b"HTTP/1.1 200 OK\r\n" + JSON + b"\r\ncontent-length: 9\r\n\r\n"
BOOM = b'data: {"error":{"message":"boom","code":500}}\n\n'
FAULTS: dict[str, Play | str] = {
    "a refused connection": REFUSED,
    "a reset before the first byte": [Step.RESET],
    "an end before the first byte": [Step.CLOSE],
    "silence": [Step.STALL],
    "garbage": [b"\x16\x03\x01 this is not HTTP\r\n\r\n"],
    "half a head": [b"HTTP/1.1 200 OK\r\ncontent-", Step.CLOSE],
    "a status 500": [ok(b"boom", status=b"500 Oh")],
    "a status 503": [ok(b"boom", status=b"503 Busy")],
    "a status 429": [ok(b'{"error":{}}', JSON, b"retry-after: 5", status=b"429 Slow")],
    "a key that is not taken": [ok(b"no", status=b"401 No")],
    "a redirect": [ok(b"", b"location: http://x/", status=b"302 There")],
    "half of the first chunk": [HEAD, b'ff\r\ndata: {"choices"', Step.RESET],
}
OF_STREAMS: dict[str, Play] = {
    "a head and silence": [HEAD, Step.STALL],
    "a head and pings": [HEAD, Step.PING],
    "a head and a reset": [HEAD, Step.RESET],
    "half of the answer": [*streamed(ROLE[:20], end=False), Step.CLOSE],
    "an end without anything": streamed(),
    "an answer that is none": streamed(b"data: \x00\xff\n\n"),
    "an error inside a 200": streamed(BOOM, DONE),
}
OF_DOCUMENTS: dict[str, Play] = {
    "a head and silence": [LENGTH, Step.STALL],
    "a head and a reset": [LENGTH, Step.RESET],
    "half of the answer": [ok(document("x"), JSON)[:-9], Step.CLOSE],
    "an end without anything": [ok(b"", JSON)],
    "an answer that is none": [ok(b"<html>no</html>", JSON)],
    "an error inside a 200": [ok(b'{"error":{"message":"boom","code":500}}', JSON)],
    "silence without saying what comes": [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", Step.STALL],
}
BEFORE_ANYTHING = [
    pytest.param(play, stream, id=f"{name}-{'stream' if stream else 'plain'}")
    for stream, faults in ((True, FAULTS | OF_STREAMS), (False, FAULTS | OF_DOCUMENTS))
    for name, play in faults.items()
]


@pytest.mark.parametrize(("play", "stream"), BEFORE_ANYTHING)
def test_before_anything_was_sent_another_endpoint_answers(play, stream):
    first = f"http://127.0.0.1:{free_port()}" if play is REFUSED else play

    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        answer = await proxy.ask(stream=stream)
        assert answer.status_code == 200, answer.text
        assert said(answer) == "Grüße"
        headers = {name: answer.headers[f"x-polyvox-{name}"] for name in ("model", "fallback-level", "attempts")}
        assert headers == {"model": "n", "fallback-level": "1", "attempts": "2"}
        assert '"n"' not in answer.text

    two_models(first, either(stream, "Grü", "ße"), story)


# In the middle of a stream, another endpoint goes on.

BROKEN: dict[str, list[bytes | Step]] = {
    "a reset": [Step.RESET],
    "a clean end too early": [b"0\r\n\r\n"],
    "an end of the connection": [Step.CLOSE],
    "silence": [Step.STALL],
    "pings": [Step.PING],
    "garbage": [b"this is no chunk\r\n"],
    "half a chunk": [b"ff\r\n" + event(content="lost")[:40], Step.RESET],
    "half an event and a clean end": [piece(event(content="lost")[:40]), b"0\r\n\r\n"],
    "half of a character": [piece(event(content="é")[:-40]), Step.RESET],
    "an error event": [piece(b'data: {"error":{"message":"boom","code":500}}\n\n'), piece(DONE), b"0\r\n\r\n"],
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_stream_that_breaks_goes_on_elsewhere(fault):
    first = [*streamed(ROLE, event(content="One "), event(content="two"), end=False), *BROKEN[fault]]

    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        answer = await proxy.ask(stream=True, max_tokens=10)
        assert text_of(answer.text) == "One two three."
        resumed = json.loads(b.requests[0].body)
        assert resumed["messages"][-1] == {"role": "assistant", "content": "One two"}
        assert resumed["continue_final_message"] is True
        assert resumed["max_tokens"] == 8
        assert proxy.page().value("polyvox_streams_resumed_total", model_name="n") == 1

    two_models(first, streamed(*events(" three", ".")), story)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_stream_that_cannot_go_on_ends_in_an_error_and_never_in_done(fault):
    first = [*streamed(ROLE, event(content="One"), end=False), *BROKEN[fault]]

    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        answer = await proxy.ask(stream=True, response_format={"type": "json_object"})
        assert answer.status_code == 200
        assert "One" in answer.text
        assert "lost" not in answer.text
        assert "[DONE]" not in answer.text
        last = answer.text.strip().rpartition("\n")[2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] in ("upstream_error", "upstream_timeout")
        assert b.requests == []

    two_models(first, streamed(*events("never")), story)


def typed(kind: str, **fields: Any) -> bytes:
    """An event of /v1/messages or /v1/responses."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json.dumps({"type": kind, **fields}).encode())


MESSAGE = [
    typed("message_start", message={"id": "msg_1", "model": "m", "content": [], "usage": {"input_tokens": 1}}),
    typed("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "One"}),
]
RESPONSE = [
    typed("response.created", sequence_number=0, response={"id": "resp_1", "model": "m", "status": "in_progress"}),
    typed("response.output_text.delta", sequence_number=7, delta="One"),
]


# What ends a stream that has been sent in part for sure; an error event may be seen before it is.
CUT_OFF = sorted(BROKEN.keys() - {"an error event"})


def last_event(stream: str) -> tuple[str, dict[str, Any]]:
    name, data = stream.strip().rpartition("\n\n")[2].split("\n")
    return name, json.loads(data.removeprefix("data: "))


@pytest.mark.parametrize("fault", CUT_OFF)
def test_a_broken_stream_of_messages_ends_in_an_error_of_that_api(fault):
    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        body = {"model": "m", "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        answer = await proxy.client.post("/v1/messages", json=body)
        name, told = last_event(answer.text)
        assert (name, told["type"]) == ("event: error", "error")
        assert told["error"]["type"] in ("api_error", "timeout_error")
        assert answer.text.count('"error"') == 2
        assert "message_stop" not in answer.text
        assert "One" in answer.text

    two_models([*streamed(*MESSAGE, end=False), *BROKEN[fault]], plain("never"), story)


@pytest.mark.parametrize("fault", CUT_OFF)
def test_a_broken_stream_of_responses_ends_in_an_error_of_that_api(fault):
    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        answer = await proxy.client.post("/v1/responses", json={"model": "m", "input": "hi", "stream": True})
        name, told = last_event(answer.text)
        assert (name, told["type"], told["sequence_number"]) == ("event: error", "error", 8)
        assert told["code"] in ("upstream_error", "upstream_timeout")
        assert told["error"]["message"] == told["message"]  # OpenAI's SDK raises it
        assert "response.completed" not in answer.text
        assert "One" in answer.text

    two_models([*streamed(*RESPONSE, end=False), *BROKEN[fault]], plain("never"), story)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_an_error_told_at_first_by_a_stream_of_another_api_is_answered_elsewhere(path):
    whole = {
        "/v1/messages": [*MESSAGE, typed("message_delta", delta={"stop_reason": "end_turn"}), typed("message_stop")],
        "/v1/responses": [*RESPONSE, typed("response.completed", response={"id": "resp_1", "status": "completed"})],
    }[path]
    overloaded = typed("error", error={"type": "overloaded_error", "message": "Overloaded"})

    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        body = {"model": "m", "input": "hi", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        answer = await proxy.client.post(path, json=body)
        assert answer.headers["x-polyvox-model"] == "n"
        assert "Overloaded" not in answer.text
        assert "One" in answer.text

    two_models(streamed(overloaded), streamed(*whole), story)


@pytest.mark.parametrize(
    ("status", "kind"), [(b"404 No", "not_found_error"), (b"500 Oh", "api_error"), (b"529 No", "overloaded_error")]
)
def test_errors_of_messages_have_the_types_of_that_api(status, kind):
    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        answer = await proxy.client.post("/v1/messages", json={"model": "m", "messages": []})
        assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", kind)

    two_models([ok(b"{}", JSON, status=status)], [ok(b"{}", JSON, status=status)], story)


def test_a_chat_is_not_resumed_where_an_endpoint_cannot_continue():
    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        answer = await proxy.ask("m", stream=True)
        assert '"error"' in answer.text
        assert "[DONE]" not in answer.text
        assert b.requests == []

    async def tell() -> None:
        async with (
            upstream([*streamed(ROLE, event(content="a"), end=False), Step.RESET]) as a,
            upstream(plain("b")) as b,
        ):
            n = ModelSettings(endpoints=(endpoint(b.address, continues=False),))
            config = Config(models={"m": model(a.address), "n": n}, fallbacks={"m": ("n",)})
            async with proxying(config) as proxy:
                await story(proxy, a, b)

    run(tell())


@pytest.mark.parametrize("chain", [(), ("n",)])
def test_nor_does_it_begin_anew_at_the_endpoint_where_it_broke(chain: tuple[str, ...]):
    async def tell() -> None:
        first = [*streamed(ROLE, event(content="a"), end=False), Step.RESET]
        async with upstream(first, streamed(*events("never"))) as a, upstream(streamed(*events("never"))) as b:
            m, n = (ModelSettings(endpoints=(endpoint(up.address, continues=False),)) for up in (a, b))
            config = Config(models={"m": m, "n": n}, fallbacks={"m": chain} if chain else {})
            async with proxying(config) as proxy:
                answer = await proxy.ask("m", stream=True)
                assert '"error"' in answer.text
                assert "never" not in answer.text
                assert (len(a.requests), len(b.requests)) == (1, 0)

    run(tell())


def test_a_stream_whose_answer_is_whole_is_ended_by_us():
    first = [*streamed(*events("all of it")[:-1], end=False), Step.RESET]

    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        answer = await proxy.ask(stream=True)
        assert text_of(answer.text) == "all of it"
        assert b.requests == []

    two_models(first, streamed(*events("never")), story)


def test_a_stream_that_breaks_again_and_again_goes_on_between_two_replicas():
    plays = [
        [*streamed(ROLE, event(content="a"), end=False), Step.RESET],
        [*streamed(ROLE, event(content="b"), end=False), Step.RESET],
        [*streamed(ROLE, event(content="c"), end=False), Step.CLOSE],
        streamed(*events("d")),
    ]

    async def tell() -> None:
        async with upstream(plays[0], plays[2]) as a, upstream(plays[1], plays[3]) as b:
            config = Config(models={"m": model(a.address, b.address, balance="round_robin")})
            async with proxying(config) as proxy:
                answer = await proxy.ask(stream=True)
                assert text_of(answer.text) == "abcd"

    run(tell())


def test_a_stream_that_is_cut_at_the_only_endpoint_that_works_goes_on_there():
    plays = [
        [*streamed(ROLE, event(content="a"), end=False), Step.RESET],
        [*streamed(ROLE, event(content="b"), end=False), Step.CLOSE],
        streamed(*events("c")),
    ]

    async def tell() -> None:
        async with upstream(*plays) as b:
            models = {"m": model(f"http://127.0.0.1:{free_port()}"), "n": model(b.address)}
            async with proxying(Config(models=models, fallbacks={"m": ("n",)})) as proxy:
                answer = await proxy.ask(stream=True)
                assert text_of(answer.text) == "abc"

    run(tell())


def test_a_stream_that_is_cut_at_once_wherever_it_goes_on_ends_in_an_error():
    plays = [[*streamed(ROLE, event(content="a"), end=False), Step.RESET], *[[HEAD, Step.RESET]] * 20]

    async def tell() -> None:
        async with upstream(*plays) as b:
            models = {"m": model(f"http://127.0.0.1:{free_port()}"), "n": model(b.address)}
            async with proxying(Config(models=models, fallbacks={"m": ("n",)})) as proxy:
                answer = await proxy.ask(stream=True)
                assert '"error"' in answer.text
                assert "[DONE]" not in answer.text
                assert len(b.requests) <= 3

    run(tell())


@pytest.mark.parametrize("stream", [True, False])
def test_bytes_that_come_one_by_one_make_the_same_answer(stream):
    whole = b"".join(part for part in either(stream, "Grü", "ße 😀") if isinstance(part, bytes))
    sliced: Play = [whole[i : i + 1] for i in range(len(whole))]

    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        answer = await proxy.ask(stream=stream)
        assert said(answer) == "Grüße 😀"
        assert answer.headers["x-polyvox-attempts"] == "1"

    two_models(sliced, either(stream, "never"), story, timeouts=Timeouts())


def test_no_byte_is_sent_before_the_first_token():
    """vLLM sends the head of a stream before it has a slot for it."""

    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        asking = asyncio.create_task(proxy.ask(stream=True))
        await eventually(lambda: bool(a.requests))
        answer = await asking
        assert said(answer) == "b"
        assert proxy.page().value("polyvox_attempt_failures_total", error_type="first_token_timeout") == 1

    pings = [piece(b": ping\n\n"), *[b""] * 20] * 500
    two_models([HEAD, *pings, Step.STALL], streamed(*events("b")), story, timeouts=Timeouts(first_token=0.01))


def test_what_comes_before_the_first_token_is_held_up_to_a_limit():
    word = b'data: {"note":"' + b"x" * 65_000 + b'"}\n\n'

    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        async with proxy.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.headers["x-polyvox-endpoint"] == "m/0"
            assert await anext(answer.aiter_bytes(len(word))) == word

    two_models([HEAD, *[piece(word)] * 16, Step.STALL], streamed(*events("b")), story)


# What is retried, what is not, and what the client is told


def test_a_client_error_goes_straight_back():
    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        answer = await proxy.ask()
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "no such field")
        assert answer.headers["x-polyvox-attempts"] == "1"
        assert b.requests == []
        assert proxy.state("m/0") == "closed"

    refusal = b'{"error":{"message":"no such field"}}'
    two_models([ok(refusal, JSON, status=b"400 Bad")], plain("never"), story)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_error_told_inside_of_a_200_is_an_error_with_its_status(stream):
    told = b'{"error":{"message":"no","code":422}}'

    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        answer = await proxy.ask(stream=stream)
        assert (answer.status_code, answer.json()["error"]["message"]) == (422, "no")
        assert b.requests == []

    two_models(streamed(b"data: %b\n\n" % told, DONE) if stream else [ok(told, JSON)], plain("never"), story)


def test_a_response_that_failed_passes_as_it_is():
    told = {"id": "resp_1", "object": "response", "status": "failed", "error": {"code": "x", "message": "no"}}

    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        answer = await proxy.client.post("/v1/responses", json={"model": "m", "input": "hi"})
        assert (answer.status_code, answer.json()) == (200, told)

    two_models([ok(json.dumps(told).encode(), JSON)], plain("never"), story)


@pytest.mark.parametrize("stream", [True, False])
def test_what_went_wrong_first_is_told_if_nothing_helps(stream):
    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        answer = await proxy.ask(stream=stream)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
        assert answer.headers["x-polyvox-attempts"] == "2"

    two_models([ok(b"", b"retry-after: 7", status=b"529 Overloaded")], [ok(b"", status=b"500 Oh")], story)


def test_too_many_requests_everywhere_is_told_as_the_first_endpoint_said_it():
    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        answer = await proxy.ask()
        assert (answer.status_code, answer.json(), answer.headers["retry-after"]) == (429, {"a": 1}, "3")

    two_models([ok(b'{"a":1}', JSON, b"retry-after: 3", status=b"429 No")], [ok(b"", status=b"500 Oh")], story)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"7", 7),
        (b"0", 0),
        (b"Sun, 21 Nov 2027 07:28:00 GMT", 2),
        (b"Sun, 21 Nov 2027 07:27:00 GMT", 0),
        (b"9" * 40, 604800),
        (b"Fri, 31 Dec 9999 23:59:59 GMT", 604800),
        (b"soon", None),
        (b"", None),
        (b"9" * 5000, None),
        (b"Sun, 21 Nov 99999999999 07:28:00 GMT", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(value, seconds):
    assert retry_after([(b"retry-after", value)], lambda: 1826782078.5) == seconds


@pytest.mark.parametrize("status", [b"429 Slow", b"503 Busy", b"529 Overloaded"])
@pytest.mark.parametrize("when", [b"30", b"Fri, 31 Dec 9999 23:59:59 GMT"])
def test_an_endpoint_that_wants_a_rest_is_not_asked_and_its_breaker_stays_closed(status, when):
    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        for _ in range(10):
            assert (await proxy.ask()).json()["model"] == "m"
        assert (len(a.requests), len(b.requests)) == (1, 10)
        assert proxy.state("m/0") == "closed"

    two_models([ok(b"{}", JSON, b"retry-after: " + when, status=status)], plain("b"), story)


def test_an_endpoint_that_wants_a_rest_is_asked_where_there_is_no_other():
    async def tell() -> None:
        limited = [ok(b'{"its":"words"}', JSON, b"retry-after: 30", status=b"429 Slow")]
        async with upstream(limited) as a, proxying(Config(models={"m": model(a.address)})) as proxy:
            answers = [await proxy.ask() for _ in range(3)]
            assert [(r.status_code, r.json(), r.headers["retry-after"]) for r in answers] == [
                (429, {"its": "words"}, "30")
            ] * 3
            assert proxy.state("m/0") == "closed"

    run(tell())


def test_the_same_endpoint_is_asked_once_more_where_the_trouble_may_pass():
    async def tell() -> None:
        async with (
            upstream([Step.RESET], plain("second")) as a,
            proxying(Config(models={"m": model(a.address)})) as proxy,
        ):
            answer = await proxy.ask()
            assert said(answer) == "second"
            assert answer.headers["x-polyvox-attempts"] == "2"

    run(tell())


def test_further_attempts_are_a_share_of_the_traffic():
    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        statuses = [(await proxy.ask()).status_code for _ in range(20)]
        assert statuses.count(200) == 5
        assert (len(a.requests), len(b.requests)) == (20, 5)

    two_models(
        [ok(b"", status=b"500 Oh")], plain("b"), story,
        retries=RetrySettings(share=0.25, per_second=0),
        breaker=BreakerSettings(failures=99, error_rate=1.0, minimum=99),
    )  # fmt: skip


def test_replicas_come_before_other_models():
    async def tell() -> None:
        async with upstream([ok(b"", status=b"500 Oh")]) as bad, upstream(plain("replica")) as good:
            models = {"m": model(bad.address, good.address, balance="round_robin"), "n": model(good.address)}
            async with proxying(Config(models=models, fallbacks={"m": ("n",)})) as proxy:
                answers = [await proxy.ask() for _ in range(4)]
                assert {a.headers["x-polyvox-model"] for a in answers} == {"m"}
                assert {a.headers["x-polyvox-fallback-level"] for a in answers} == {"0"}
                assert bad.requests

    run(tell())


@pytest.mark.parametrize("asked", ["m", "alias", "own"])
def test_an_alias_has_the_chain_of_its_model_unless_it_has_one_of_its_own(asked):
    async def tell() -> None:
        async with upstream([Step.RESET]) as a, upstream(plain("n")) as n, upstream(plain("o")) as o:
            config = Config(
                models={"m": model(a.address), "n": model(n.address), "o": model(o.address)},
                aliases={"alias": "m", "own": "m", "other": "o"},
                fallbacks={"m": ("n",), "own": ("other",)},
            )
            async with proxying(config) as proxy:
                answer = await proxy.ask(asked)
                assert said(answer) == ("o" if asked == "own" else "n")
                assert answer.json()["model"] == asked

    run(tell())


def test_a_field_that_a_model_of_the_chain_does_not_allow_keeps_the_request_from_it():
    async def tell() -> None:
        async with upstream([ok(b"", status=b"500 Oh")]) as a, upstream(plain("n")) as n:
            config = Config(
                models={"m": model(a.address, allow=("chat_template",)), "n": model(n.address)}, fallbacks={"m": ("n",)}
            )
            async with proxying(config) as proxy:
                assert (await proxy.ask(chat_template="x")).status_code == 500
                assert n.requests == []

    run(tell())


# Breakers


def test_an_endpoint_that_fails_is_no_longer_asked_and_again_when_it_is_back():
    async def tell() -> None:
        fails = [ok(b"", status=b"500 Oh")]
        async with upstream(*[fails] * 6, plain("back")) as a, upstream(plain("n")) as n:
            breaker = BreakerSettings(failures=5, recovery=3600)
            config = Config(
                models={"m": model(a.address, breaker=breaker), "n": model(n.address)}, fallbacks={"m": ("n",)}
            )
            async with proxying(config) as proxy:
                for _ in range(5):
                    assert said(await proxy.ask()) == "n"
                assert proxy.page().value("polyvox_breakers", endpoint="m/0", state="open") == 1
                straight = await proxy.ask()
                assert (straight.headers["x-polyvox-attempts"], straight.headers["x-polyvox-fallback-level"]) == (
                    "1",
                    "1",
                )
                # The sixth play fails a health check, the seventh passes one.
                await eventually(lambda: proxy.state("m/0") == "half_open")
                assert said(await proxy.ask()) == "back"
                assert proxy.state("m/0") == "closed"
                page = proxy.page()
                moves = {s: page.value("polyvox_breaker_transitions_total", endpoint="m/0", state=s) for s in
                         ("open", "half_open", "closed")}  # fmt: skip
                assert moves == {"open": 1, "half_open": 1, "closed": 1}

    run(tell())


def test_a_request_that_fails_again_and_again_at_an_endpoint_is_one_failure_to_its_breaker():
    async def tell() -> None:
        async with upstream([Step.RESET]) as a:
            breaker = BreakerSettings(failures=3, recovery=3600)
            async with proxying(Config(models={"m": model(a.address, breaker=breaker)})) as proxy:
                told = [await proxy.ask() for _ in range(3)]
                assert [answer.headers["x-polyvox-attempts"] for answer in told] == ["4", "4", "1"]
                assert proxy.state("m/0") == "open"

    run(tell())


def test_an_endpoint_alone_that_fails_is_said_to_be_unavailable_with_when_to_come_back():
    async def tell() -> None:
        async with AsyncExitStack() as stack:
            a = await stack.enter_async_context(upstream([ok(b"", status=b"500 Oh")]))
            async with proxying(Config(models={"m": model(a.address, breaker=BreakerSettings(failures=2))})) as proxy:
                assert [(await proxy.ask()).status_code for _ in range(2)] == [500, 500]
                told = await proxy.ask()
                assert (told.status_code, told.json()["error"]["code"]) == (503, "model_not_available")
                assert 1 <= int(told.headers["retry-after"]) <= 72

    run(tell())


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go_away_open_no_breaker_and_end_what_they_asked_for(stream):
    async def tell() -> None:
        play: Play = [*streamed(ROLE, event(content="a"), end=False), Step.STALL] if stream else [Step.STALL]
        async with upstream(play) as a:
            config = Config(models={"m": model(a.address, breaker=BreakerSettings(failures=1), timeouts=Timeouts())})
            async with proxying(config) as proxy:
                for i in range(3):
                    asking = asyncio.create_task(proxy.ask(stream=stream))
                    await eventually(lambda: len(a.requests) == i + 1)  # noqa: B023
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)
                    await eventually(lambda: a.open == 0)
                assert proxy.state("m/0") == "closed"
                assert proxy.running() == 0

    run(tell())


def test_a_client_that_goes_away_while_we_wait_to_try_again_leaves_nothing():
    async def tell() -> None:
        async with upstream([Step.RESET]) as a, proxying(Config(models={"m": model(a.address)})) as proxy:
            proxy.endpoints.chance = lambda: 1e6  # so many times as long as usual
            asking = asyncio.create_task(proxy.ask())
            await eventually(lambda: proxy.page().value("polyvox_attempt_failures_total") == 1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await eventually(lambda: proxy.page().value("polyvox_requests_total") == 1)
            assert len(a.requests) == 1
            assert proxy.page().value("polyvox_request_success_total", finished_reason="abort") == 1

    run(tell())


# Contexts that are too short, engines that are not ready

TOO_LONG = [ok(b'{"error":{"message":"too long"}}', JSON, status=b"400 Bad")]


def with_models(proxy: Proxy, **changed: dict[str, Any]) -> None:
    """Change what the registry says of models."""
    models = {
        name: msgspec.structs.replace(model, **changed.get(name, {}))
        for name, model in proxy.live.current.models.items()
    }
    proxy.live.replace(msgspec.structs.replace(proxy.live.current, models=models))


@pytest.mark.parametrize(
    ("words", "contexts", "answer"),
    [
        (2000, (1000, 8000), "longer"),  # too long for the first by its length: the second is longer
        (2000, (1000, None), "longer"),  # nobody knows how long the second is
        (2000, (1000, 1000), 400),  # the second is no longer
        (2000, (1000, 900), 400),
        (10, (1000, 8000), 400),  # short enough: something else is wrong
        (2000, (None, 8000), 400),  # nobody knows whether it is too long
    ],
)
def test_a_prompt_that_is_too_long_goes_to_a_model_with_a_longer_context(words, contexts, answer):
    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        with_models(proxy, m={"context_length": contexts[0]}, n={"context_length": contexts[1]})
        got = await proxy.ask(messages=[{"role": "user", "content": "word " * words}])
        if answer == 400:
            assert (got.status_code, got.json()["error"]["message"]) == (400, "too long")
        else:
            assert said(got) == answer
        assert len(a.requests) == 1
        assert proxy.state("m/0") == "closed"

    two_models(TOO_LONG, plain("longer"), story)


def test_a_model_of_the_chain_that_is_surely_too_short_is_passed_over():
    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        with_models(proxy, n={"context_length": 100})
        got = await proxy.ask(messages=[{"role": "user", "content": "word " * 2000}])
        assert got.status_code == 500
        assert b.requests == []

    two_models([ok(b"", status=b"500 Oh")], plain("never"), story)


@pytest.mark.parametrize("state", ["starting", "failed", "stopped"])
def test_an_engine_that_is_not_ready_is_not_waited_for_where_another_model_is(state):
    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        with_models(proxy, m={"endpoints": (), "state": state})
        got = await proxy.ask()
        assert said(got) == "n"
        assert (got.headers["x-polyvox-attempts"], got.headers["x-polyvox-fallback-level"]) == ("1", "1")

    two_models(plain("never"), plain("n"), story)


def test_an_engine_that_starts_is_waited_for_where_nothing_else_answers():
    async def story(proxy: Proxy, a: ScriptedUpstream, b: ScriptedUpstream) -> None:
        ready = proxy.live.current.models["m"]
        with_models(proxy, m={"endpoints": (), "state": "starting"})
        asking = asyncio.create_task(proxy.ask())
        await eventually(lambda: len(b.requests) == 2)
        await eventually(lambda: len(proxy.live._waiting) == 1)
        with_models(proxy, m={"endpoints": ready.endpoints, "state": "ready"})
        assert said(await asking) == "ready at last"

    two_models(plain("ready at last"), [Step.RESET], story)


def test_an_engine_that_was_started_again_has_no_past():
    async def tell() -> None:
        async with AsyncExitStack() as stack:
            a = await stack.enter_async_context(upstream([ok(b"", status=b"500 Oh")], plain("fresh")))
            async with proxying(Config(models={"m": model(a.address, breaker=BreakerSettings(failures=1))})) as proxy:
                assert [(await proxy.ask()).status_code for _ in range(2)] == [500, 503]
                again = [msgspec.structs.replace(e, since=5.0) for e in proxy.live.current.models["m"].endpoints]
                with_models(proxy, m={"endpoints": tuple(again)})
                assert said(await proxy.ask()) == "fresh"

    run(tell())


# Models that are full.


def test_a_request_that_finds_its_model_full_goes_along_the_chain_at_once():
    async def tell() -> None:
        async with upstream([Step.STALL, *plain("late")]) as a, upstream(plain("spare")) as b:
            full = ModelSettings(endpoints=(endpoint(a.address, max_in_flight=1),))
            async with proxying(Config(models={"m": full, "n": model(b.address)}, fallbacks={"m": ("n",)})) as proxy:
                first = asyncio.create_task(proxy.ask())
                await eventually(lambda: len(a.requests) == 1)
                other = await proxy.ask()
                assert (said(other), other.headers["x-polyvox-model"]) == ("spare", "n")
                assert other.headers["x-polyvox-fallback-level"] == "1"
                a.release()
                assert said(await first) == "late"

    run(tell())


def test_where_the_chain_is_full_as_well_a_request_waits_for_its_own_model():
    async def tell() -> None:
        late, spare = plain("late"), plain("spare")
        async with upstream([Step.STALL, *late], late) as a, upstream([Step.STALL, *spare]) as b:
            places = (("m", a.address), ("n", b.address))
            models = {name: ModelSettings(endpoints=(endpoint(at, max_in_flight=1),)) for name, at in places}
            async with proxying(Config(models=models, fallbacks={"m": ("n",)})) as proxy:
                asking = [asyncio.create_task(proxy.ask()) for _ in range(3)]
                await eventually(lambda: len(a.requests) == len(b.requests) == 1)
                await eventually(lambda: proxy.page().value("polyvox_num_requests_waiting") == 1)
                a.release()
                await eventually(lambda: len(a.requests) == 2)
                b.release()
                assert sorted([said(await asked) for asked in asking]) == ["late", "late", "spare"]

    run(tell())
