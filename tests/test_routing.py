"""What a client sees of the router: who answers, what the engine gets, why, and what is refused."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from proxy.capabilities import Capabilities
from proxy.config import ApiKey, BreakerSettings, Config, EndpointSettings, ModelSettings, Secret, Server
from proxy.cost import Hosting, Price
from proxy.metrics import Metrics
from proxy.naming import AliasSettings
from proxy.routing import complexity
from proxy.routing.dispatch import speed_score
from proxy.routing.rules import RoutingSettings, Rule
from tests.fakes.one_worker import JSON, Proxy, document, events, proxying
from tests.fakes.scripted_upstream import Play, ScriptedUpstream, ok, upstream
from tests.test_fallback import streamed
from tests.test_metrics import finished

Upstreams = dict[str, ScriptedUpstream]
Story = Callable[[Proxy, Upstreams], Awaitable[None]]
FAILS = [b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n"]

TRAITS: dict[str, dict[str, Any]] = {
    "small": {"kind": "fast_cheap", "price": Price(0.1, 0.4), "speed_score": 9, "languages": ("en",), "context": 1000},
    "middle": {"kind": "balanced", "price": Price(1.0, 4.0), "region": "eu"},
    "large": {"kind": "advanced", "price": Price(5.0, 20.0), "modalities": ("text", "image"), "region": "us"},
}
ALIASES: dict[str, str | AliasSettings] = {
    "fast": AliasSettings(any_of=("middle", "small"), prefer="cost"),
    "legal": AliasSettings(model="middle", system="You are a lawyer.", defaults={"temperature": 0.2, "top_p": 0.9}),
    "smart": AliasSettings(model="auto", system="You are wise."),
    "gpt-4o": "auto:best",
}


def play(name: str) -> Play:
    return [ok(document(f"{name} says"), JSON)]


def tell(
    story: Story, plays: dict[str, Play] | None = None, more: dict[str, ModelSettings] | None = None, **settings: Any
) -> None:
    """Tell a story of three models, each of which says its name unless it plays something else."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            found = {name: await stack.enter_async_context(upstream((plays or {}).get(name) or play(name)))
                     for name in TRAITS}  # fmt: skip
            models = {
                name: ModelSettings(
                    endpoints=(EndpointSettings(base_url=f"{up.address}/v1"),),
                    breaker=BreakerSettings(failures=1), **TRAITS[name],
                )
                for name, up in found.items()
            }  # fmt: skip
            config = Config(**{"models": {**models, **(more or {})}, "aliases": ALIASES, **settings})
            await story(await stack.enter_async_context(proxying(config)), found)

    asyncio.run(asyncio.wait_for(run(), 60))


def asks(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def sent(up: ScriptedUpstream) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(up.requests[-1].body)
    return found


async def explained(proxy: Proxy, headers: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
    answer = await proxy.client.post("/v1/route", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize(
    ("name", "fields", "who"),
    [
        ("auto", {}, "middle"),
        ("auto", {"routing": {"complexity": "simple", "budget_limit": 1}}, "small"),
        ("auto", {"routing": {"complexity": "complex"}}, "large"),
        ("auto:cheap", {}, "small"),
        ("auto:best", {}, "large"),
        ("auto:fast", {}, "small"),
        ("gpt-4o", {}, "large"),
        ("fast", {}, "small"),
        ("fast", {"messages": asks("Как дела?")}, "middle"),
        ("fast", {"max_tokens": 1001}, "middle"),
        ("fast", {"routing": {"requirements": {"region": "eu"}}}, "middle"),
        ("fast", {"routing": {"prefer": "quality"}}, "middle"),
        ("legal", {}, "middle"),
        ("smart", {"routing": {"prefer": "cost"}}, "small"),
        ("small", {}, "small"),
    ],
)
def test_the_model_that_suits_a_request_answers_it(name: str, fields: dict[str, Any], who: str) -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        answer = await proxy.ask(name, **fields)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-polyvox-model"] == who
        assert answer.json()["choices"][0]["message"]["content"] == f"{who} says"
        assert answer.json()["model"] == name
        assert "routing" not in sent(upstreams[who])
        assert sent(upstreams[who])["model"] == who
        assert "x-polyvox-route" not in answer.headers

    tell(story)


def test_a_picture_goes_to_a_model_that_takes_pictures() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        answer = await proxy.ask("auto:cheap", messages=[{"role": "user", "content": [part]}])
        assert answer.headers["x-polyvox-model"] == "large"

    tell(story)


def test_headers_route_as_the_body_does_and_stay_here() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        body = {"model": "auto", "messages": asks("hi")}
        headers = {"x-polyvox-complexity": "simple", "x-polyvox-budget": "1", "x-polyvox-explain": "1"}
        answer = await proxy.client.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.headers["x-polyvox-model"] == "small"
        why = json.loads(answer.headers["x-polyvox-route"])
        assert why["reason"] == "simple general within 1 USD: cheapest"
        assert [c["model"] for c in why["candidates"]] == ["small", "middle", "large"]
        assert why["fallbacks"] == ["middle", "large"]
        assert not [name for name, _ in upstreams["small"].requests[0].headers if name.startswith(b"x-polyvox")]

    tell(story)


def test_a_stream_says_why_as_well() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        body = {"model": "auto", "messages": asks("hi"), "stream": True}
        answer = await proxy.client.post("/v1/chat/completions", json=body, headers={"x-polyvox-explain": "1"})
        assert answer.text.endswith("data: [DONE]\n\n")
        assert json.loads(answer.headers["x-polyvox-route"])["task"] == "general"

    tell(story, {"middle": streamed(*events("hi"))})


def test_when_the_first_model_fails_the_next_of_the_plan_answers_then_those_of_the_chains() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        body = {"messages": asks("Write a haiku about rain"), "routing": {"complexity": "medium"}}
        answer = await proxy.ask("fast", **body)
        assert answer.headers["x-polyvox-model"] == "large"
        assert answer.headers["x-polyvox-fallback-level"] == "2"
        assert (await explained(proxy, model="fast", **body))["fallbacks"][-1] == "large"

    tell(story, {"small": FAILS, "middle": FAILS}, fallbacks={"task:creative": ("small", "large")})


def test_where_no_model_of_a_group_suits_its_chain_may() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        answer = await proxy.ask("fast", routing={"requirements": {"region": "us"}})
        assert answer.headers["x-polyvox-model"] == "large"
        why = await explained(proxy, model="fast", prompt="hi", routing={"requirements": {"region": "us"}})
        assert (why["model"], why["fallbacks"]) == ("large", [])

    tell(story, fallbacks={"fast": ("large",)})


def test_a_model_whose_api_has_not_the_path_is_passed_over() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        body = {"model": "any", "input": "hi"}
        answer = await proxy.client.post("/v1/embeddings", json=body)
        assert answer.headers["x-polyvox-model"] == "middle"

    claude = ModelSettings(
        endpoints=(EndpointSettings(base_url="http://127.0.0.1:9", provider="anthropic", api_key=Secret("k")),)
    )
    aliases = {"any": AliasSettings(any_of=("claude", "middle"), prefer="order")}
    tell(story, more={"claude": claude}, aliases=aliases)


def test_a_chain_does_not_lead_to_a_model_that_misses_a_requirement() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        routing = {"requirements": {"region": "eu"}}
        assert (await proxy.ask("fast", routing=routing)).status_code >= 500
        assert not upstreams["large"].requests

    tell(story, {"middle": FAILS}, fallbacks={"fast": ("large",)})


def test_a_model_whose_breaker_is_open_goes_last() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        assert (await proxy.ask("small")).status_code >= 500
        why = await explained(proxy, model="auto:cheap", messages=asks("hi"))
        assert [c["model"] for c in why["candidates"]] == ["middle", "large", "small"]
        assert why["candidates"][-1]["health"] == "down"

    tell(story, {"small": FAILS})


def test_when_nothing_can_serve_it_each_candidate_is_named_with_what_it_lacks() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        answer = await proxy.ask("auto", routing={"requirements": {"region": "mars"}}, max_tokens=2000)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["type"], error["code"], error["param"]) == (
            "invalid_request_error", "no_suitable_model", "model"
        )  # fmt: skip
        assert "small: region: nobody says where it runs" in error["message"]
        assert "middle: region: it is in eu, not mars" in error["message"]
        assert "large: region: it is in us, not mars" in error["message"]
        assert not any(up.requests for up in upstreams.values())

    tell(story)


def test_requirements_hold_for_a_model_that_is_asked_for_by_name_as_well() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        answer = await proxy.ask("large", routing={"budget_limit": 0.000001})
        assert answer.status_code == 400
        assert "large: budget_limit: it costs about" in answer.json()["error"]["message"]
        answer = await proxy.ask("large", routing={"budget_limit": 1})
        assert answer.status_code == 200
        assert "routing" not in sent(upstreams["large"])

    tell(story)


@pytest.mark.parametrize(
    ("header", "value", "said"),
    [
        ("x-polyvox-task", "lgal", "there is no task 'lgal'; did you mean 'legal'?"),
        ("x-polyvox-languages", "ru, JA", "expected a code of ISO 639 in small letters"),
        ("x-polyvox-region", "e u", "expected a name of 1 to 64 letters"),
        ("x-polyvox-prefer", "cheap", "none of balanced, cost, order, quality, speed"),
        ("x-polyvox-explain", "2", "none of 1, 0"),
    ],
)
def test_a_header_that_is_no_wish_is_refused_by_its_name(header: str, value: str, said: str) -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        body = {"model": "auto", "messages": asks("hi")}
        answer = await proxy.client.post("/v1/chat/completions", json=body, headers={header: value})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_routing", header)
        assert said in error["message"]

    tell(story)


@pytest.mark.parametrize("name", ["large", "large-too"])
def test_headers_hold_for_a_model_that_is_asked_for_by_name_as_well(name: str) -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        body = {"model": name, "messages": asks("hi")}
        refused = await proxy.client.post("/v1/chat/completions", json=body, headers={"x-polyvox-region": "eu"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_suitable_model")
        assert not upstreams["large"].requests
        answer = await proxy.client.post("/v1/chat/completions", json=body, headers={"x-polyvox-explain": "1"})
        assert [c["model"] for c in json.loads(answer.headers["x-polyvox-route"])["candidates"]] == ["large"]

    tell(story, aliases={"large-too": "large"})


def test_where_only_a_chain_suits_the_reason_says_so() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        why = await explained(proxy, model="large", prompt="hi", routing={"requirements": {"region": "eu"}})
        assert why["model"] == "middle"
        assert why["reason"].endswith("none of the candidates can serve it, middle stands in")

    tell(story, fallbacks={"large": ("middle",)})


@pytest.mark.parametrize("routing", [{"complexty": 1}, {"task_type": "lgal"}, 5, {"complexity": "hard"}])
def test_wishes_that_are_none_are_refused_by_field(routing: Any) -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        for name in ("auto", "small"):
            answer = await proxy.ask(name, routing=routing)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_routing")
            assert answer.json()["error"]["param"].startswith("routing")
        assert not any(up.requests for up in upstreams.values())

    tell(story)


def test_a_preset_puts_its_prompt_and_defaults_in() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        await proxy.ask("legal", top_p=0.5)
        body = sent(upstreams["middle"])
        assert body["messages"] == [{"role": "system", "content": "You are a lawyer."}, *asks("hi")]
        assert (body["temperature"], body["top_p"], body["model"]) == (0.2, 0.5, "middle")

    tell(story)


def test_fields_that_a_model_refuses_are_what_drops_it() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        answer = await proxy.ask("fast", priority=-5)
        assert answer.status_code == 400
        assert "small: priority: not taken by this model" in answer.json()["error"]["message"]

    tell(story)


def test_a_rule_and_a_pattern_of_the_configuration_count() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        why = await explained(proxy, prompt="A recipe for borscht")
        assert (why["task"], why["prefer"], why["model"]) == ("cooking", "cost", "small")
        assert (await explained(proxy, prompt="hello"))["prefer"] == "balanced"

    tell(story, tasks={"cooking": ("recipe",)}, rules=(Rule(task="cooking", prefer="cost"),))


def test_a_decision_is_explained_without_being_run() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        why = await explained(proxy, {"x-polyvox-task": "legal"}, messages=asks("Как дела?"), max_tokens=50)
        assert (why["asked"], why["model"], why["task"], why["max_tokens"]) == ("auto", "middle", "legal", 50)
        assert why["requirements"] == {"languages": ["ru"]}
        dropped = [c for c in why["candidates"] if c["dropped"]]
        assert [(c["model"], c["dropped"], c["score"]) for c in dropped] == [
            ("small", "languages: it has no ru, only en", None)
        ]
        first = why["candidates"][0]
        assert first["score"] > why["candidates"][1]["score"]
        assert first["usd"] > 0
        assert not any(up.requests for up in upstreams.values())

    tell(story)


def test_a_decision_that_nothing_can_serve_is_explained_too() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        why = await explained(proxy, prompt="hi", routing={"requirements": {"region": "mars"}})
        assert why["model"] is None
        assert len([c for c in why["candidates"] if c["dropped"]]) == 3

    tell(story)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{}", 400, "give one of messages, input, prompt"),
        (b"[]", 400, "The body"),
        (b'{"prompt": "hi", "model": "zzz"}', 404, "does not exist"),
        (b'{"prompt": "hi", "routing": 5}', 400, "routing: expected"),
    ],
)
def test_what_cannot_be_explained_is_refused(body: bytes, status: int, said: str) -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        answer = await proxy.client.post("/v1/route", content=body)
        assert answer.status_code == status
        assert said in answer.json()["error"]["message"]

    tell(story)


@pytest.mark.parametrize(("threshold", "level"), [(0.01, "complex"), (0.99, "medium")])
def test_a_threshold_that_was_fitted_says_what_is_complex(tmp_path: Path, threshold: float, level: str) -> None:
    fitted = msgspec.structs.replace(complexity.shipped().coefficients, threshold=threshold)
    file = tmp_path / f"{threshold}.json"
    file.write_bytes(msgspec.json.encode(fitted))

    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        assert (await explained(proxy, prompt="Write a haiku about autumn"))["level"] == level

    tell(story, routing=RoutingSettings(complexity_model=str(file)))


# Keys for some models only

BOUND = {"authorization": "Bearer bound"}
SERVER = Server(api_keys=(ApiKey("free"), ApiKey("bound", ("small", "legal"))))


async def ask_as(proxy: Proxy, name: str, **fields: Any) -> httpx2.Response:
    body = {"model": name, "messages": asks("hi"), **fields}
    return await proxy.client.post("/v1/chat/completions", json=body, headers=BOUND)


def test_a_key_for_some_models_finds_no_other() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        listed = await proxy.client.get("/v1/models", headers=BOUND)
        names = [card["id"] for card in listed.json()["data"]]
        assert names == ["small", "fast", "legal", "smart", "gpt-4o", "auto", "auto:cheap", "auto:best", "auto:fast"]
        assert (await proxy.client.get("/v1/models/large", headers=BOUND)).status_code == 404
        for name in ("middle", "large"):
            answer = await ask_as(proxy, name)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert (await ask_as(proxy, "small")).status_code == 200
        assert (await ask_as(proxy, "legal")).headers["x-polyvox-model"] == "middle"
        free = await proxy.client.get("/v1/models", headers={"authorization": "Bearer free"})
        assert "large" in [card["id"] for card in free.json()["data"]]

    tell(story, server=SERVER)


def test_the_router_chooses_among_the_models_of_a_key_and_names_no_other() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        assert (await ask_as(proxy, "auto:best")).headers["x-polyvox-model"] == "small"
        refused = await ask_as(proxy, "auto", routing={"requirements": {"region": "eu"}})
        assert "middle" not in refused.text
        why = await proxy.client.post("/v1/route", json={"prompt": "hi"}, headers=BOUND)
        assert [c["model"] for c in why.json()["candidates"]] == ["small"]

    tell(story, server=SERVER)


def test_no_chain_leads_a_key_to_a_model_that_is_not_its_own() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        assert (await ask_as(proxy, "small")).status_code >= 500
        assert (await ask_as(proxy, "auto")).status_code >= 500
        assert not upstreams["large"].requests

    tell(story, {"small": FAILS}, server=SERVER, fallbacks={"small": ("large",), "auto": ("large",)})


# What is learned

LONG = "The quick brown fox jumps over the lazy dog and runs away from the hunter. " * 20


def counting(prompt_tokens: int) -> Play:
    answer = json.loads(document("ok"))
    answer["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": 2, "total_tokens": prompt_tokens + 2}
    return [ok(json.dumps(answer).encode(), JSON)]


def test_the_estimate_of_a_prompt_is_corrected_by_what_the_model_has_counted() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        body = {"messages": asks(LONG), "routing": {"prefer": "cost"}, "max_tokens": 10}
        assert (await explained(proxy, model="fast", **body))["model"] == "small"
        for _ in range(40):
            await proxy.ask("fast", **body)
        why = await explained(proxy, model="fast", **body)
        assert why["model"] == "middle"
        assert "small: context:" in f"small: {why['candidates'][-1]['dropped']}"

    tell(story, {"small": counting(1500)})


def test_a_local_engine_whose_hosting_is_known_is_not_taken_to_be_free() -> None:
    from engines.spec import EngineSettings
    from proxy.prices import Prices

    model = ModelSettings(engine=EngineSettings(weights="a/b"), hosting=Hosting(2.1))
    idle = Prices(Config(models={"m": model})).dearest("m", 10)
    assert idle is not None
    assert idle.output > 1
    busy = Prices(Config(models={"m": model}), lambda *_: (10.0, 40_000.0)).dearest("m", 10)
    assert busy is not None
    assert 0 < busy.output < idle.output
    unpriced = ModelSettings(engine=EngineSettings(weights="a/b"))
    assert Prices(Config(models={"m": unpriced})).dearest("m", 10) is None


def test_what_a_server_was_found_not_to_do_drops_its_model_and_its_speed_counts_until_traffic_tells() -> None:
    async def story(proxy: Proxy, upstreams: Upstreams) -> None:
        can = Capabilities(tools=False, tokens_per_second=100.0)
        registry = proxy.live.current
        small = msgspec.structs.replace(registry.models["middle"], capabilities=can)
        proxy.live.replace(msgspec.structs.replace(registry, models={**registry.models, "middle": small}))
        why = await explained(proxy, prompt="hi", tools=[{"type": "function"}])
        assert [(c["model"], c["dropped"]) for c in why["candidates"] if c["dropped"]] == [
            ("middle", "tools: its server does not do it")
        ]
        why = await explained(proxy, prompt="hi", routing={"requirements": {"speed": 6}})
        assert "middle" not in {c["model"] for c in why["candidates"] if c["dropped"]}

    tell(story)


def test_the_speed_of_streams_is_learned() -> None:
    metrics = Metrics(Config(models={"m": ModelSettings(endpoints=(EndpointSettings(base_url="http://x/v1"),))}))
    assert metrics.tokens_per_second("m") is None
    for seconds in (0.01, 0.03):
        metrics.finished(finished(model="m", endpoint="m/0", per_token=seconds))
    assert metrics.tokens_per_second("m") == pytest.approx(50)
    assert metrics.tokens_per_second("other") is None
    assert [speed_score(rate) for rate in (1, 5, 300, 1000)] == [0, 0, 10, 10]
    assert speed_score(50) < speed_score(100)
