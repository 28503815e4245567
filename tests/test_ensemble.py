"""What a client gets that asks several models at once."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest

from proxy.config import Config, EndpointSettings, ModelSettings, Timeouts
from proxy.cost import Price
from proxy.ensembles.settings import EnsembleSettings
from tests.fakes.one_worker import DONE, EVENTS, JSON, ROLE, Proxy, event, proxying, text_of
from tests.fakes.scripted_upstream import Play, ScriptedUpstream, Step, eventually, ok, upstream

Story = Callable[[Proxy, dict[str, ScriptedUpstream]], Awaitable[None]]
PATIENT = Timeouts(connect=5.0, first_byte=20.0, between_bytes=20.0)


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
            council = EnsembleSettings(**{"members": members, "timeout": 5.0, **settings})
            proxy = await stack.enter_async_context(proxying(Config(models=models, ensembles={"council": council})))
            await story(proxy, upstreams)
            await eventually(lambda: proxy.running() == 0)
            assert proxy.in_flight() == 0

    asyncio.run(asyncio.wait_for(tell(), 30))


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
        assert [t["answer"] for t in told["answers"]] == ["The capital is Paris.", "Paris is the capital.", "I like trains."]

    ensemble(story, THREE)
