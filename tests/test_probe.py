"""What servers can do is found out by asking them, however they say no."""

import asyncio
import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.spec import FleetStatus
from proxy import registry
from proxy.capabilities import Capabilities, Finding
from proxy.config import Config, EndpointSettings, ModelSettings, Secret
from proxy.errors import ProbeFailed
from proxy.probe import STEPS, context, probe, streams
from proxy.probe.asking import Said
from proxy.prompts.adapters import AdapterSettings
from proxy.registry import Endpoint
from proxy.transport.local import LocalTransport
from tests.fakes.able_server import AbleServer, able_server

KEYS = (
    "choices", "message", "delta", "content", "tool_calls", "logprobs", "finish_reason", "usage", "prompt_tokens",
    "completion_tokens", "data", "id", "max_model_len", "meta", "version", "error",
)  # fmt: skip


def endpoint(address: str, adapter: AdapterSettings | None = None, **settings: Any) -> Endpoint:
    only = EndpointSettings(base_url=f"{address}/v1", **{"model": "there", **settings})
    config = Config(models={"m": ModelSettings(endpoints=(only,), adapter=adapter)})
    return registry.build(config, FleetStatus(version=0)).resolve("m").endpoints[0]


def asked(
    lines: list[str] | None = None, spend: int = 0, configured: dict[str, Any] | None = None, **server: Any
) -> tuple[Finding, AbleServer]:
    async def story() -> tuple[Finding, AbleServer]:
        async with able_server(**server) as able:
            there = endpoint(able.address, **(configured or {}))
            transport = LocalTransport(there.address)
            try:
                say = (lines if lines is not None else []).append
                return await probe(there, transport, say, spend=spend), able
            finally:
                await transport.close()

    return asyncio.run(story())


def capabilities(**server: Any) -> Capabilities:
    return asked(**server)[0].capabilities


def test_a_server_that_does_everything_is_found_to():
    found, _ = asked(says_context=True, context=4096)
    speed = found.capabilities.tokens_per_second
    assert found.model == "there" and found.version == "9.1"
    assert found.capabilities == Capabilities(
        json_mode=True, json_schema=True, tools=True, logprobs=True, system_role=True, stream_usage=True,
        continues=True, context_length=4096, modalities=("text", "image"), instruction_score=1.0,
        tokens_per_second=speed,
    )  # fmt: skip


FIELDS = {
    "system_role": "system_role", "json_object": "json_mode", "json_schema": "json_schema", "tools": "tools",
    "logprobs": "logprobs", "stream_usage": "stream_usage", "continues": "continues",
}  # fmt: skip


@pytest.mark.parametrize("way", ["refuses", "ignores", "breaks"])
@pytest.mark.parametrize("feature", FIELDS)
def test_what_a_server_does_not_do_is_found_however_it_says_so(feature, way):
    found = capabilities(ways={feature: way})
    assert {name for name in FIELDS.values() if getattr(found, name) is not True} == {FIELDS[feature]}
    assert getattr(found, FIELDS[feature]) is False


@pytest.mark.parametrize("way", ["refuses", "ignores", "breaks"])
def test_a_model_without_eyes_takes_text_only(way):
    assert capabilities(ways={"images": way}).modalities == ("text",)


def test_a_model_that_obeys_nothing_may_still_be_told_by_a_system_message_and_made_to_call_tools():
    found = capabilities(obedient=False)
    assert found.system_role is True and found.tools is True
    assert found.instruction_score == 0.0


def test_a_server_that_counts_nothing_is_judged_by_what_it_says():
    assert capabilities(counts=False).system_role is True
    assert capabilities(counts=False, ways={"system_role": "ignores"}).system_role is None
    assert capabilities(counts=False, ways={"images": "ignores"}).modalities == ("text",)


@pytest.mark.parametrize(
    "server",
    [{"tells_limit": True}, {"tells_limit": False}, {"cuts_prompts": True}],
    ids=["says it in its error", "says no more than no", "cuts what is longer"],
)
def test_the_context_length_is_tried_out_where_nobody_says_it(server):
    found, able = asked(context=3000, spend=100_000, **server)
    assert 0.97 * 3000 <= found.capabilities.context_length <= 3000
    assert len(able.requests) < 45


def test_trying_out_the_context_length_stays_within_its_budget():
    lines: list[str] = []
    found, able = asked(lines, context=10_000_000, spend=20_000)
    longest = [
        len(r["messages"][0]["content"].split()) for r in able.requests if r["messages"][0]["content"][:4] == "a a "
    ]
    assert found.capabilities.context_length is None
    assert sum(longest) <= 20_000 and max(longest) >= 4096
    assert any("trying more would cost too much" in line for line in lines)


def test_without_a_budget_no_long_prompt_is_sent():
    _, able = asked(spend=0)
    assert max(len(str(request["messages"])) for request in able.requests) < 4000


def test_each_step_is_told_as_it_is_done():
    lines: list[str] = []
    asked(lines, ways={"tools": "refuses"}, models=("there", "other"))
    assert lines[0] == "models: there, other"
    assert "chat: yes, version 9.1" in lines
    assert "tools: no" in lines and "json schema: yes" in lines and "context length: unknown" in lines


def test_one_question_is_asked_at_a_time_and_all_are_small():
    _, able = asked()
    assert able.most_at_once == 1
    assert len(able.requests) < 30
    assert max(request["max_tokens"] for request in able.requests) <= 96


def test_a_model_that_wants_other_limits_is_asked_in_its_way():
    found, able = asked(temperature=False)
    assert found.capabilities.tools is True
    assert all("temperature" not in request for request in able.requests[1:])


def test_the_adapter_of_a_model_keeps_its_ranges_and_hides_nothing():
    adapter = AdapterSettings(temperature=(0.5, 1.0), merge_system=True)
    found, able = asked(configured={"adapter": adapter}, ways={"system_role": "refuses"})
    assert found.capabilities.system_role is False
    assert {request["temperature"] for request in able.requests} == {0.5}


def test_a_model_that_does_not_chat_is_asked_nothing_more():
    found, able = asked(chats=False, says_context=True, context=512)
    assert found.capabilities == Capabilities(context_length=512)
    assert able.requests == []


@pytest.mark.parametrize(
    ("server", "said"),
    [({"key": "other"}, "status 401: Incorrect API key"), ({"chats": False, "models": ("x",)}, "status 404")],
)
def test_a_server_that_does_not_answer_us_is_told_with_its_reason(server, said):
    with pytest.raises(ProbeFailed) as caught:
        asked(**server)
    assert said in str(caught.value) and "m/0" in str(caught.value)


def test_nobody_at_the_address_is_told_with_the_reason():
    async def story() -> None:
        transport = LocalTransport("http://127.0.0.1:1")
        await probe(endpoint("http://127.0.0.1:1"), transport)

    with pytest.raises(ProbeFailed, match="ConnectFailed"):
        asyncio.run(story())


def piece(at: float, text: str) -> tuple[float, dict[str, Any]]:
    return at, {"choices": [{"index": 0, "delta": {"content": text}}]}


def test_speed_is_that_of_the_tokens_after_the_first():
    events = [piece(10 + i / 10, "two tokens") for i in range(11)]
    usage = (11.2, {"choices": [], "usage": {"completion_tokens": 21}})
    assert streams.speed(Said(200, events=tuple(events))) == 10.0
    assert streams.speed(Said(200, events=(*events, usage))) == 20.0
    assert streams.speed(Said(200, events=tuple(events[:3]))) is None
    assert streams.speed(Said(200, events=tuple(piece(1.0, "x") for _ in range(20)))) is None


@pytest.mark.parametrize("text", ["", "short", "one two three", "la la la la la la la la la la la la la la", "x" * 99])
def test_a_text_is_cut_only_where_its_rest_is_unlike_its_beginning(text):
    assert streams.where_to_cut(text) is None


def test_a_text_is_cut_before_a_word_near_its_middle():
    text = "One day a river met a stone, and neither would move for the other."
    cut = streams.where_to_cut(text)
    assert text[cut] == " " and text[cut - 1] != " " and abs(cut - len(text) / 2) < 8


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
bodies = st.dictionaries(st.sampled_from(KEYS), json_values, max_size=5)


class Anything:
    """Answers whatever it is asked with what it was given, in turn."""

    def __init__(self, answers: list[Said]) -> None:
        self._answers = itertools.cycle(answers)
        self.endpoint = endpoint("http://127.0.0.1:1")

    async def chat(self, *messages: object, **fields: object) -> Said:
        return next(self._answers)

    async def get(self, path: str) -> Said:
        return next(self._answers)


@settings(max_examples=300)
@given(
    st.lists(
        st.builds(
            Said, st.sampled_from([0, 200, 200, 400, 500]), bodies, st.tuples(st.tuples(st.floats(0, 9), bodies))
        ),
        min_size=1,
        max_size=4,
    )
)
def test_whatever_a_server_answers_something_is_found(answers):
    async def story() -> None:
        facts: dict[str, object] = {}
        for step in STEPS:
            facts |= await step(Anything(answers))
        msgspec.convert(facts, Capabilities)
        await context.listed(Anything(answers))
        await context.tried_out(Anything(answers), 10_000, lambda line: None)

    asyncio.run(story())


@pytest.mark.parametrize("counted", [0, -5, 1, 9, True, None])
def test_a_server_that_counts_nonsense_does_not_lead_on_for_ever(counted):
    answer = Said(200, {"usage": {"prompt_tokens": counted}})
    assert asyncio.run(context.tried_out(Anything([answer]), 100_000, lambda line: None)) is None


def test_a_server_that_is_too_busy_is_asked_again_when_it_says():
    found, able = asked(too_busy=2)
    assert found.capabilities.system_role is True
    assert len(able.requests) > 2


def test_the_key_goes_to_the_server_and_into_no_line():
    lines: list[str] = []
    found, _ = asked(lines, configured={"api_key": Secret("sk-secret")}, key="sk-secret")
    assert found.capabilities.tools is True
    assert "sk-secret" not in "\n".join(lines)
