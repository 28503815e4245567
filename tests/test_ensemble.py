"""What a client gets that asks several models at once."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest

from proxy.config import ApiKey, Config, EndpointSettings, ModelSettings, Server, Timeouts
from proxy.cost import Price
from proxy.ensembles.settings import EnsembleSettings
from proxy.naming import AliasSettings
from tests.fakes.one_worker import DONE, EVENTS, JSON, ROLE, Proxy, event, proxying, text_of
from tests.fakes.scripted_upstream import Play, ScriptedUpstream, Step, eventually, ok, upstream

Story = Callable[[Proxy, dict[str, ScriptedUpstream]], Awaitable[None]]
PATIENT = Timeouts(connect=60.0, first_byte=60.0, between_bytes=60.0)


def completion(text: str | None, *, finish: str = "stop", logprobs: list[float] | None = None, **message: Any) -> bytes:
    """A chat completion of vLLM's form that took 10 tokens and made 5."""
    told = None if logprobs is None else {"content": [{"token": "x", "logprob": p} for p in logprobs]}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "logprobs": told,
        "finish_reason": finish,
    }
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 7, "model": "m", "choices": [choice]}
    return json.dumps({**body, "usage": usage}, ensure_ascii=False).encode()


def says(text: str | None, **more: Any) -> Play:
    return [ok(completion(text, **more), JSON)]


SILENCE: Play = [Step.STALL]
BROKEN: Play = [ok(b"boom", status=b"500 Oh")]
REFUSAL: Play = [ok(b'{"error":{"message":"messages: too odd"}}', JSON, status=b"400 No")]


def ensemble(story: Story, plays: dict[str, Play | list[Play]], **settings: Any) -> None:
    """Tell a story of the ensemble `council` whose members play; `judge` and `writer` play but are no members."""

    async def tell() -> None:
        async with AsyncExitStack() as stack:
            upstreams = {}
            for name, play in plays.items():
                several = play if isinstance(play[0], list) else [play]
                upstreams[name] = await stack.enter_async_context(upstream(*several))
            models = {
                name: ModelSettings(
                    endpoints=(EndpointSettings(base_url=f"{u.address}/v1", continues=True),),
                    timeouts=PATIENT,
                    price=Price(input=100.0, output=1000.0),
                )
                for name, u in upstreams.items()
            }
            members = {name: 1.0 for name in plays if name not in ("judge", "writer")}
            council = EnsembleSettings(**{"members": members, "timeout": 60.0, **settings})
            proxy = await stack.enter_async_context(proxying(Config(models=models, ensembles={"council": council})))
            await story(proxy, upstreams)
            await eventually(lambda: proxy.running() == 0)
            assert proxy.in_flight() == 0

    asyncio.run(asyncio.wait_for(tell(), 120))


def patience(plays: dict[str, Play]) -> float:
    """Seconds in which whoever answers has surely done so: few only where somebody hangs."""
    return 1.0 if SILENCE in plays.values() else 60.0


def said(body: dict[str, Any]) -> str:
    return body["choices"][0]["message"]["content"]


def conditions(body: dict[str, Any]) -> dict[str, str]:
    return {told["member"]: told["status"] for told in body["ensemble"]["answers"]}


THREE = {"a": says("The capital is Paris."), "b": says("Paris is the capital."), "c": says("I like trains.")}


def test_members_that_agree_decide_and_the_answer_is_an_ordinary_completion():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        answer = await proxy.ask("council")
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert said(body) == "The capital is Paris."
        assert body["model"] == "council"
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["total_tokens"] == 45
        assert answer.headers["x-polyvox-model"] == "council"
        assert float(answer.headers["x-polyvox-cost"]) == pytest.approx(3 * (10 * 100 + 5 * 1000) / 1e6)
        told = body["ensemble"]
        assert told["strategy"] == "consensus"
        assert told["chosen"] == "a"
        assert 0 < told["agreement_score"] < 1
        assert "paris" in told["common_themes"]
        assert told["answers"][1]["answer"] == "Paris is the capital."

    ensemble(story, THREE)


def test_a_stream_of_a_chosen_answer_has_the_form_of_any_other_with_the_details_in_its_last_choice():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        answer = await proxy.ask("council", stream=True, stream_options={"include_usage": True, "include_cost": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert text_of(answer.text) == "The capital is Paris."
        chunks = chunks_of(answer.text)
        assert {(c["object"], c["model"], c["id"], c["created"]) for c in chunks} == {
            ("chat.completion.chunk", "council", "chatcmpl-1", 7)
        }
        assert chunks[-2]["ensemble"]["chosen"] == "a"
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["total_tokens"] == 45
        assert chunks[-1]["usage"]["cost"] == pytest.approx(0.018)
        assert all(b'"stream":' not in u.requests[0].body for u in upstreams.values())

    ensemble(story, THREE)


def test_a_stream_tells_usage_only_to_those_who_ask():
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        answer = await proxy.ask("council", stream=True)
        assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks_of(answer.text))

    ensemble(story, THREE)


def chunks_of(stream: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in stream.split("\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_a_member_that_fails_and_one_that_hangs_are_left_out():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        answer = await proxy.ask("council")
        body = answer.json()
        assert said(body) == "yes"
        assert conditions(body) == {"a": "answered", "b": "failed", "c": "late", "d": "answered"}
        errors = {told["member"]: told["error"] for told in body["ensemble"]["answers"] if "error" in told}
        assert errors == {"b": "The upstream failed with status 500.", "c": "It took longer than 1 s."}
        assert body["usage"]["total_tokens"] == 30
        await eventually(lambda: upstreams["c"].open == 0)
        page = proxy.page()
        assert page.value("polyvox_request_errors_total", model_name="c", error_type="gateway_timeout") == 1
        assert page.value("polyvox_request_errors_total", model_name="b", error_type="upstream_failed") == 1

    ensemble(story, {"a": says("yes"), "b": BROKEN, "c": SILENCE, "d": says("yes")}, timeout=1.0, quorum=2)


def test_a_member_that_is_late_harms_its_breaker_no_more_than_a_client_that_leaves():
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        for _ in range(6):
            await proxy.ask("council")
        assert proxy.state("b/0") == "closed"

    ensemble(story, {"a": says("yes"), "b": SILENCE}, timeout=0.05)


@pytest.mark.parametrize(
    ("plays", "status", "words"),
    [
        ({"a": says("yes"), "b": BROKEN, "c": SILENCE}, 503, ["needs 2 answers and has 1", "b: The upstream failed",
                                                             "c: It took longer than 1 s"]),
        ({"a": SILENCE, "b": SILENCE, "c": says("yes")}, 504, ["a: It took longer", "b: It took longer"]),
        ({"a": REFUSAL, "b": REFUSAL, "c": says("yes")}, 400, ["a: messages: too odd", "b: messages: too odd"]),
        ({"a": says("  "), "b": says(None), "c": says("yes")}, 503, ["a: The answer is empty"]),
        ({"a": [ok(b'{"choices":[]}', JSON)], "b": [ok(b"[]", JSON)], "c": says("yes")}, 503, ["no chat completion"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_too_few_answers_are_an_error_that_names_what_each_of_the_others_did(plays, status, words, stream):
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        answer = await proxy.ask("council", stream=stream)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert error["code"] == "quorum_not_met"
        assert all(word in error["message"] for word in words), error["message"]

    ensemble(story, plays, quorum=2, timeout=patience(plays))


def test_what_can_no_longer_reach_the_quorum_is_not_waited_for():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        answer = await proxy.ask("council")  # or the time of the test would be over
        assert answer.status_code == 503
        await eventually(lambda: upstreams["c"].open == 0)

    ensemble(story, {"a": REFUSAL, "b": BROKEN, "c": SILENCE}, quorum=2, timeout=1000.0)


def test_when_the_client_goes_all_members_are_cancelled():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        asking = asyncio.create_task(proxy.ask("council"))
        await eventually(lambda: all(u.requests for u in upstreams.values()))
        asking.cancel()
        await eventually(lambda: not any(u.open for u in upstreams.values()))

    ensemble(story, {"a": SILENCE, "b": SILENCE, "c": SILENCE})


def test_members_are_asked_at_the_same_time():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        asking = asyncio.create_task(proxy.ask("council"))
        await eventually(lambda: all(u.requests for u in upstreams.values()))  # none has been answered
        for u in upstreams.values():
            u.release()
        assert (await asking).status_code == 200

    waits = [Step.STALL, *says("x")]
    ensemble(story, {"a": waits, "b": waits, "c": waits})


def test_the_first_good_answer_is_taken_and_the_others_are_cancelled():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        answer = await proxy.ask("council")
        body = answer.json()
        assert said(body) == "here"
        assert body["ensemble"]["chosen"] == "c"
        assert conditions(body)["d"] == "not needed"
        assert body["usage"]["total_tokens"] >= 15
        await eventually(lambda: upstreams["d"].open == 0)

    plays = {"a": says("half an ans", finish="length"), "b": says(None, refusal="no"), "c": says("here"), "d": SILENCE}
    ensemble(story, plays, strategy="first")


def test_where_no_answer_is_good_the_first_that_says_anything_is_taken():
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        body = (await proxy.ask("council")).json()
        assert said(body) == "half an ans"
        assert body["ensemble"]["good"] is False

    ensemble(story, {"a": says("half an ans", finish="length"), "b": BROKEN}, strategy="first")


def test_tool_calls_and_reasoning_of_the_chosen_answer_survive_in_both_forms():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    other = {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
    plays = {
        "a": says(None, finish="tool_calls", tool_calls=[call], reasoning_content="hm"),
        "b": says(None, finish="tool_calls", tool_calls=[other]),
        "c": says("I do not know."),
    }

    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        tools = [{"type": "function", "function": {"name": "weather"}}]
        message = (await proxy.ask("council", tools=tools)).json()["choices"][0]["message"]
        assert message["tool_calls"] == [call]
        assert message["reasoning_content"] == "hm"
        chunks = chunks_of((await proxy.ask("council", tools=tools, stream=True)).text)
        delta = chunks[1]["choices"][0]["delta"]
        assert delta["tool_calls"] == [{"index": 0, **call}]
        assert delta["reasoning_content"] == "hm"
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        assert json.loads(upstreams["a"].requests[0].body)["tools"] == tools

    ensemble(story, plays, strategy="vote")


def test_votes_count_by_weight():
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        told = (await proxy.ask("council")).json()
        assert said(told) == "**1000**"
        assert told["ensemble"]["agreement_score"] == pytest.approx(2.5 / 4.4)

    plays = {"a": says("The answer is 1,000."), "b": says("**1000**"), "c": says("2000")}
    ensemble(story, plays, strategy="vote", members={"a": 1.0, "b": 1.5, "c": 1.9})


def test_answers_in_json_are_put_together_field_by_field():
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}

    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        body = (await proxy.ask("council", response_format=schema)).json()
        assert json.loads(said(body)) == {"name": "Ann", "age": 30}
        assert body["ensemble"]["fields"] == {"name": pytest.approx(2 / 3), "age": pytest.approx(2 / 3)}

    plays = {
        "a": says('{"name": "Ann", "age": 31}'),
        "b": says('{"name": "Bob", "age": 30}'),
        "c": says('{"name": "ann", "age": 30.0}'),
    }
    ensemble(story, plays, strategy="vote")


def test_the_surest_answer_is_taken_and_probabilities_that_nobody_asked_for_are_left_out():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        body = (await proxy.ask("council")).json()
        assert said(body) == "sure"
        assert body["choices"][0]["logprobs"] is None
        assert all(json.loads(u.requests[0].body)["logprobs"] is True for u in upstreams.values())
        asked = (await proxy.ask("council", logprobs=True)).json()
        assert asked["choices"][0]["logprobs"]["content"]

    plays = {"a": says("unsure", logprobs=[-2.0, -3.0]), "b": says("sure", logprobs=[-0.1]), "c": says("silent")}
    ensemble(story, plays, strategy="confidence", members={"a": 1.5, "b": 1.0, "c": 9.0})


def test_a_member_that_takes_no_wish_for_probabilities_is_asked_without():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        body = (await proxy.ask("council")).json()
        assert conditions(body) == {"a": "answered", "b": "answered"}
        assert "logprobs" not in json.loads(upstreams["a"].requests[1].body)
        assert "no member" in body["ensemble"]["fell_back"].lower()

    plays = {"a": [[*REFUSAL], [*says("one")]], "b": says("two")}
    ensemble(story, plays, strategy="confidence")


def test_a_judge_picks_among_the_answers_in_any_order():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        body = (await proxy.ask("council")).json()
        (request,) = upstreams["judge"].requests
        shown = json.loads(json.loads(request.body)["messages"][0]["content"].split("\n")[-3])
        assert shown["conversation"] == [{"role": "user", "text": "hi"}]
        assert sorted(a["text"] for a in shown["answers"]) == ["one", "three", "two"]
        second = next(a["text"] for a in shown["answers"] if a["number"] == 2)
        assert said(body) == second
        assert body["ensemble"]["judge"]["model"] == "judge"
        assert body["usage"]["total_tokens"] == 60

    plays = {"a": says("one"), "b": says("two"), "c": says("three"), "judge": says("2")}
    ensemble(story, plays, strategy="judge", judge="judge")


@pytest.mark.parametrize("play", [says("I like all of them."), BROKEN, SILENCE, says("7")])
def test_where_the_judge_is_of_no_help_agreement_decides_and_says_so(play):
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        body = (await proxy.ask("council")).json()
        assert said(body) == "The capital is Paris."
        assert "'judge'" in body["ensemble"]["fell_back"]
        assert body["ensemble"]["agreement_score"] > 0

    plays = {**THREE, "judge": play}
    ensemble(story, plays, strategy="judge", judge="judge", timeout=patience(plays))


def test_a_writer_makes_one_answer_of_all():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        body = (await proxy.ask("council", temperature=0.5)).json()
        assert said(body) == "written"
        assert body["model"] == "council"
        assert body["ensemble"]["chosen"] is None
        assert body["usage"]["total_tokens"] == 60
        sent = json.loads(upstreams["writer"].requests[0].body)
        assert sent["temperature"] == 0.5
        assert "The capital is Paris." in sent["messages"][0]["content"]

    ensemble(story, {**THREE, "writer": says("written")}, strategy="fuse", writer="writer")


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n" + EVENTS + b"\r\n\r\n"


def streamed(*parts: bytes | Step) -> Play:
    sent = [b"%x\r\n%b\r\n" % (len(part), part) if isinstance(part, bytes) else part for part in parts]
    return [HEAD, *sent]


LAST = event(finish="length")
USAGE = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"w","choices":[],"usage":{"prompt_tokens":1000,"completion_tokens":100,"total_tokens":1100}}\n\n'  # noqa: E501
END = b"0\r\n\r\n"


def test_what_is_written_is_streamed_as_it_comes_with_sums_at_its_end():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        body = {"model": "council", "stream": True, "messages": [], "stream_options": {"include_usage": True}}
        text = ""
        async with proxy.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for piece in answer.aiter_text():
                text += piece
                if "Hello" in text:
                    upstreams["writer"].release()
        assert text_of(text) == "Hello world"
        chunks = chunks_of(text)
        assert {c["model"] for c in chunks} == {"council"}
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        assert chunks[-2]["ensemble"]["writer"]["status"] == "answered"
        assert chunks[-2]["ensemble"]["answers"][2]["answer"] == "I like trains."
        assert chunks[-1]["usage"]["total_tokens"] == 45 + 1100
        assert text.count('"usage"') == 1 + 4  # of the sum, of each member, and of the writer

    written = streamed(ROLE, event(content="Hello"), Step.STALL, event(content=" world"), LAST, USAGE, DONE)
    ensemble(story, {**THREE, "writer": [*written, END]}, strategy="fuse", writer="writer")


def test_where_the_writer_fails_before_it_has_written_agreement_decides():
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        answer = await proxy.ask("council", stream=True)
        assert text_of(answer.text) == "The capital is Paris."
        assert "'writer'" in chunks_of(answer.text)[-1]["ensemble"]["fell_back"]

    for play in (BROKEN, SILENCE, REFUSAL, streamed(Step.RESET), says("no stream")):
        plays = {**THREE, "writer": play}
        ensemble(story, plays, strategy="fuse", writer="writer", timeout=patience(plays))


def test_what_breaks_while_it_is_written_ends_in_an_error_and_never_looks_whole():
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        answer = await proxy.ask("council", stream=True)
        assert "Hello" in answer.text
        assert "[DONE]" not in answer.text
        assert chunks_of(answer.text)[-1]["error"]["code"] == "upstream_error"
        assert proxy.page().value("polyvox_request_errors_total", model_name="council") == 1

    broken = streamed(ROLE, event(content="Hello"), Step.RESET)
    ensemble(story, {**THREE, "writer": broken}, strategy="fuse", writer="writer")


def test_a_client_that_leaves_what_is_written_ends_the_writing():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        body = {"model": "council", "stream": True, "messages": []}
        async with proxy.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for piece in answer.aiter_text():
                if "Hello" in piece:
                    break
        await eventually(lambda: upstreams["writer"].open == 0)

    written = streamed(ROLE, event(content="Hello"), Step.STALL)
    ensemble(story, {**THREE, "writer": written}, strategy="fuse", writer="writer")


@pytest.mark.parametrize(
    ("fields", "strategy", "param"),
    [({"n": 2}, "consensus", "n"), ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "fuse", "tools")],
)
def test_what_one_answer_of_several_cannot_be_is_refused_with_the_field(fields, strategy, param):
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        answer = await proxy.ask("council", **fields)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert not any(u.requests for u in upstreams.values())

    writer = {"writer": "writer"} if strategy == "fuse" else {}
    ensemble(story, {**THREE, "writer": says("x")}, strategy=strategy, **writer)


def test_an_ensemble_answers_chats_alone():
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        answer = await proxy.client.post("/v1/embeddings", json={"model": "council", "input": "x"})
        assert answer.status_code == 404
        assert "/v1/chat/completions" in answer.json()["error"]["message"]

    ensemble(story, THREE)


def test_what_no_member_may_be_asked_is_refused():
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        answer = await proxy.ask("council", chat_template="{{ x }}")
        assert answer.status_code == 400
        assert "chat_template" in answer.json()["error"]["message"]

    ensemble(story, THREE)


def test_each_member_is_accounted_and_the_ensemble_counts_as_a_request_of_its_own_without_tokens():
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        await proxy.ask("council")
        page = proxy.page()
        for name in THREE:
            assert page.value("polyvox_prompt_tokens_total", model_name=name) == 10
            assert page.value("polyvox_request_success_total", model_name=name) == 1
        assert page.value("polyvox_requests_total", model_name="council") == 1
        assert page.value("polyvox_prompt_tokens_total", model_name="council") == 0
        assert page.value("polyvox_cost_usd_total", model_name="council") == 0

    ensemble(story, THREE)


def test_the_list_of_models_has_ensembles():
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        listed = (await proxy.client.get("/v1/models")).json()["data"]
        (card,) = [card for card in listed if card["id"] == "council"]
        assert card["members"] == ["a", "b", "c"]
        assert card["state"] == "ready"
        assert (await proxy.client.get("/v1/models/council")).json() == card

    ensemble(story, THREE)


def test_the_time_that_a_client_gives_ends_what_its_members_do():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        proxy.client.headers["x-request-timeout"] = "0.2"
        answer = await proxy.ask("council")
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        await eventually(lambda: not any(u.open for u in upstreams.values()))

    ensemble(story, {"a": SILENCE, "b": SILENCE})


def test_the_time_that_a_client_gives_ends_what_is_written_in_an_error():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        proxy.client.headers["x-request-timeout"] = "4"
        answer = await proxy.ask("council", stream=True)
        assert chunks_of(answer.text)[-1]["error"]["code"] == "deadline_exceeded"
        assert "[DONE]" not in answer.text
        await eventually(lambda: upstreams["writer"].open == 0)

    written = streamed(ROLE, event(content="Hello"), Step.STALL)
    ensemble(story, {**THREE, "writer": written}, strategy="fuse", writer="writer")


# What members may be


def configured(
    story: Story, plays: dict[str, Play], regions: Mapping[str, str] | None = None, **configuration: Any
) -> None:
    """Tell a story of a whole configuration, whose models play."""

    async def tell() -> None:
        async with AsyncExitStack() as stack:
            upstreams = {name: await stack.enter_async_context(upstream(play)) for name, play in plays.items()}
            models = {
                name: ModelSettings(
                    endpoints=(EndpointSettings(base_url=f"{u.address}/v1"),),
                    timeouts=PATIENT,
                    region=(regions or {}).get(name),
                )
                for name, u in upstreams.items()
            }
            proxy = await stack.enter_async_context(proxying(Config(models=models, **configuration)))
            await story(proxy, upstreams)

    asyncio.run(asyncio.wait_for(tell(), 120))


def test_a_member_that_is_a_preset_has_its_system_prompt_and_the_others_have_not():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        body = (await proxy.ask("council", temperature=0.7)).json()
        assert conditions(body) == {"lawyer": "answered", "b": "answered"}
        sent = json.loads(upstreams["a"].requests[0].body)
        assert sent["messages"] == [
            {"role": "system", "content": "You are a lawyer."},
            {"role": "user", "content": "hi"},
        ]
        assert (sent["temperature"], sent["top_p"]) == (0.7, 0.9)
        assert len(json.loads(upstreams["b"].requests[0].body)["messages"]) == 1

    lawyer = AliasSettings(model="a", system="You are a lawyer.", defaults={"temperature": 0.1, "top_p": 0.9})
    council = EnsembleSettings(members={"lawyer": 1.0, "b": 1.0})
    configured(story, {"a": says("x"), "b": says("y")}, aliases={"lawyer": lawyer}, ensembles={"council": council})


def test_in_a_member_that_is_a_group_one_model_stands_in_for_another_but_no_chain_does():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        body = (await proxy.ask("council")).json()
        told = {t["member"]: (t["model"], t["status"]) for t in body["ensemble"]["answers"]}
        assert told == {"any": ("b", "answered"), "c": ("c", "failed")}
        assert not upstreams["d"].requests

    configured(
        story,
        {"a": BROKEN, "b": says("x"), "c": BROKEN, "d": says("y")},
        aliases={"any": AliasSettings(any_of=("a", "b"), prefer="order")},
        fallbacks={"c": ("d",)},
        ensembles={"council": EnsembleSettings(members={"any": 1.0, "c": 1.0})},
    )


def test_a_judge_has_its_chain():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        body = (await proxy.ask("council")).json()
        assert "fell_back" not in body["ensemble"]
        assert body["ensemble"]["judge"]["model"] == "d"

    configured(
        story,
        {"a": says("x"), "b": says("y"), "c": BROKEN, "d": says("1")},
        fallbacks={"c": ("d",)},
        ensembles={"council": EnsembleSettings(members={"a": 1.0, "b": 1.0}, strategy="judge", judge="c")},
    )


def test_members_that_are_not_what_a_request_requires_are_left_out():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        body = (await proxy.ask("council", routing={"requirements": {"region": "mars"}})).json()
        assert conditions(body) == {"any": "failed", "b": "failed", "c": "answered"}
        assert "routing" not in json.loads(upstreams["c"].requests[0].body)

    configured(
        story,
        {"a": says("x"), "b": says("y"), "c": says("z")},
        regions={"c": "mars"},
        aliases={"any": AliasSettings(any_of=("a",))},
        ensembles={"council": EnsembleSettings(members={"any": 1.0, "b": 1.0, "c": 1.0})},
    )


def test_a_key_for_some_models_may_ask_an_ensemble_that_it_names_or_whose_members_it_all_has():
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        async def status(key: str) -> int:
            proxy.client.headers["authorization"] = f"Bearer {key}"
            return (await proxy.ask("council")).status_code

        assert [await status(key) for key in ("by-name", "by-members", "one-member")] == [200, 200, 404]

    keys = {"by-name": ("council",), "by-members": ("a", "b"), "one-member": ("a",)}
    configured(
        story,
        {"a": says("x"), "b": says("y")},
        server=Server(api_keys=tuple(ApiKey(key, models) for key, models in keys.items())),
        ensembles={"council": EnsembleSettings(members={"a": 1.0, "b": 1.0})},
    )


def test_a_route_to_an_ensemble_is_explained_by_its_members():
    async def story(proxy: Proxy, _: dict[str, ScriptedUpstream]) -> None:
        answer = await proxy.client.post("/v1/route", json={"model": "council", "messages": []})
        assert answer.status_code == 400
        assert "a, b, c" in answer.json()["error"]["message"]

    ensemble(story, THREE)


def test_however_requests_end_nothing_of_them_is_left():
    async def story(proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        await proxy.ask("council")
        before = len(asyncio.all_tasks())
        for stream in (False, True) * 5:
            connections = upstreams["c"].connections
            asking = [asyncio.create_task(proxy.ask("council", stream=stream)) for _ in range(4)]
            await eventually(lambda: upstreams["c"].connections > connections)  # noqa: B023
            asking[0].cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        await eventually(lambda: proxy.running() == 0 and not upstreams["c"].open)
        await eventually(lambda: len(asyncio.all_tasks()) <= before + 8)  # connections of upstreams and clients
        assert proxy.in_flight() == 0

    written = [*streamed(ROLE, event(content="Hello"), LAST, DONE), END]
    plays = {"a": says("yes"), "b": BROKEN, "c": SILENCE, "writer": written}
    ensemble(story, plays, strategy="fuse", writer="writer", timeout=0.1)
