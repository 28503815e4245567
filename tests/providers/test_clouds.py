"""`polyvox serve` in front of clouds, as users of the OpenAI SDK meet it: real processes and sockets."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from openai import OpenAI

from tests.fakes.clouds import Cloud, cloud
from tests.providers.test_anthropic_answer import END, MESSAGE, event, start, stop, text, thinking, tool
from tests.serving import Server, eventually
from tests.serving import start as serve

KEY = "sk-sentinel-client"
KEYS = {name: f"sk-sentinel-{name}" for name in ("anthropic", "azure", "openai", "echo")}
PLUGIN = Path(__file__).parent.parent / "plugin_example"
ASK = [{"role": "user", "content": "hi"}]
PICTURE = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture(scope="module")
def there() -> Iterator[Cloud]:
    with cloud() as running:
        yield running


def configuration(url: str) -> dict[str, object]:
    def model(provider: str, path: str = "", **settings: object) -> dict[str, object]:
        endpoint = {"provider": provider, "base_url": url + path, "api_key": KEYS[provider], "model": "there"}
        return {"endpoints": [{**endpoint, **settings}]}

    return {
        "server": {"api_keys": [KEY]},
        "models": {
            "claude": model("anthropic"),
            "azure": model("azure", api_version="2024-10-21"),
            "gpt": model("openai", "/v1"),
            "echo": model("echo", options={"region": "eu", "token": "sk-sentinel-option"}),
        },
    }


@pytest.fixture(scope="module")
def server(there: Cloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{PLUGIN}:{before}" if before else str(PLUGIN)
    try:
        running = serve(configuration(there.url), tmp_path_factory.mktemp("clouds"))
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    try:
        eventually(lambda: _healthy(running), message=running.log)
        yield running
        assert "sentinel" not in running.log()
        assert "Traceback" not in running.log()
    finally:
        if running.process.poll() is None:
            running.process.terminate()
            running.process.wait(60)


def _healthy(server: Server) -> bool:
    assert server.process.poll() is None, server.log()
    try:
        return httpx2.get(server.base_url + "/health", timeout=60).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.base_url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client


# Anthropic


def test_a_chat_is_answered_by_claude(sdk: OpenAI, there: Cloud):
    there.document({**MESSAGE, "content": [{"type": "text", "text": "Paris"}], "stop_reason": "end_turn"})
    answer = sdk.chat.completions.create(model="claude", messages=[{"role": "system", "content": "brief"}, *ASK])
    assert (answer.model, answer.choices[0].message.content, answer.choices[0].finish_reason) == (
        "claude", "Paris", "stop",
    )  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 15
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    path, headers, body = there.last()
    assert (path, body["model"], body["system"]) == ("/v1/messages", "there", [{"type": "text", "text": "brief"}])
    assert headers["x-api-key"] == KEYS["anthropic"]
    assert "authorization" not in headers


@pytest.mark.parametrize("asks_usage", [True, False])
def test_a_stream_of_claude_is_a_stream_of_openai(sdk: OpenAI, there: Cloud, asks_usage: bool):
    there.stream(*map(event, [start(), {"type": "ping"}, *thinking(0, "hm"), *text(1, "Pa", "ris"), stop(), END]))
    options: dict[str, object] = {"stream_options": {"include_usage": True}} if asks_usage else {}
    got = list(sdk.chat.completions.create(model="claude", messages=ASK, stream=True, **options))  # type: ignore[call-overload]
    assert {c.model for c in got} == {"claude"}
    said = [c.choices[0] for c in got if c.choices]
    assert "".join(c.delta.content or "" for c in said) == "Paris"
    assert "".join(getattr(c.delta, "reasoning_content", None) or "" for c in said) == "hm"
    assert [c.finish_reason for c in said if c.finish_reason] == ["stop"]
    assert [c.usage.total_tokens for c in got if c.usage] == ([22] if asks_usage else [])


def test_a_tool_is_called_and_its_result_goes_back(sdk: OpenAI, there: Cloud):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    there.stream(*map(event, [start(), *tool(0, "f", '{"a":', "1}"), *tool(1, "g"), stop("tool_use"), END]))
    with sdk.chat.completions.stream(model="claude", messages=ASK, tools=tools) as stream:  # type: ignore[arg-type]
        message = stream.get_final_completion().choices[0].message
    calls = message.tool_calls or []
    assert [(c.id, c.function.name, c.function.arguments) for c in calls] == [
        ("toolu_0", "f", '{"a":1}'), ("toolu_1", "g", "{}"),
    ]  # fmt: skip
    results = [{"role": "tool", "tool_call_id": c.id, "content": "42"} for c in calls]
    there.document({**MESSAGE, "content": [{"type": "text", "text": "ok"}], "stop_reason": "end_turn"})
    sdk.chat.completions.create(model="claude", messages=[*ASK, message.model_dump(), *results], tools=tools)  # type: ignore[list-item]
    turns = there.last()[2]["messages"]
    assert [block["type"] for turn in turns for block in turn["content"]] == [
        "text", "tool_use", "tool_use", "tool_result", "tool_result",
    ]  # fmt: skip


def test_a_picture_reaches_claude(sdk: OpenAI, there: Cloud):
    there.document({**MESSAGE, "content": [{"type": "text", "text": "a cat"}], "stop_reason": "end_turn"})
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": PICTURE}}]
    sdk.chat.completions.create(model="claude", messages=[{"role": "user", "content": content}])  # type: ignore[list-item]
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    assert there.last()[2]["messages"][0]["content"][1] == {"type": "image", "source": source}


@pytest.mark.parametrize(
    ("status", "kind", "raised", "told"),
    [
        (400, "invalid_request_error", openai.BadRequestError, 400),
        (404, "not_found_error", openai.NotFoundError, 404),
        (413, "request_too_large", openai.APIStatusError, 413),
        (429, "rate_limit_error", openai.RateLimitError, 429),
        (401, "authentication_error", openai.InternalServerError, 502),
        (402, "billing_error", openai.InternalServerError, 502),
        (403, "permission_error", openai.InternalServerError, 502),
        (500, "api_error", openai.InternalServerError, 500),
        (529, "overloaded_error", openai.InternalServerError, 503),
    ],
)
def test_an_error_of_claude_is_one_of_openai_with_its_status(sdk: OpenAI, there: Cloud, status, kind, raised, told):
    said = {"type": kind, "message": f"refused {KEYS['anthropic']}"}
    there.document({"type": "error", "error": said}, status, retry_after="7")
    with pytest.raises(raised) as caught:
        sdk.chat.completions.create(model="claude", messages=ASK)
    assert caught.value.status_code == told
    assert "sentinel" not in str(caught.value)
    assert caught.value.body["type"]
    if told in (429, 500, 503):
        assert caught.value.response.headers["retry-after"] == "7"


def test_what_claude_cannot_be_told_is_refused_by_name(sdk: OpenAI, there: Cloud):
    before = len(there.asked)
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model="claude", messages=ASK, n=2)
    assert caught.value.param == "n"
    assert len(there.asked) == before


@pytest.mark.parametrize("cut", [True, False])
def test_a_stream_of_claude_that_ends_early_ends_in_an_error(sdk: OpenAI, there: Cloud, cut: bool):
    there.stream(*map(event, [start(), *text(0, "Pa", "ris")]), cut=cut)
    said = ""
    with pytest.raises(openai.APIError):
        for chunk in sdk.chat.completions.create(model="claude", messages=ASK, stream=True):
            assert chunk.choices[0].finish_reason is None
            said += chunk.choices[0].delta.content or ""
    assert said == "Paris"


def test_an_error_event_of_claude_ends_the_stream_without_done(http: httpx2.Client, there: Cloud):
    failed = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    there.stream(*map(event, [start(), *text(0, "Pa"), failed]))
    answer = http.post("/v1/chat/completions", json={"model": "claude", "messages": ASK, "stream": True})
    assert "[DONE]" not in answer.text
    assert json.loads(answer.text.strip().rpartition("data: ")[2])["error"]["code"] == "upstream_error"


def test_an_answer_that_is_no_message_is_a_bad_gateway(sdk: OpenAI, there: Cloud):
    there.document({"hello": "world"})
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.chat.completions.create(model="claude", messages=ASK)
    assert caught.value.status_code == 502


def test_claudes_own_api_passes_as_it_is_with_our_key(http: httpx2.Client, there: Cloud):
    said = {**MESSAGE, "content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn", "new": {"a": 1}}
    there.document(said, anthropic_organization_id="org")
    body = {"model": "claude", "max_tokens": 5, "messages": ASK, "thinking": {"type": "adaptive"}}
    answer = http.post("/v1/messages?beta=true", json=body, headers={"anthropic-beta": "x"})
    assert answer.json() == said
    assert "anthropic-organization-id" not in answer.headers
    path, headers, sent = there.last()
    assert (path, sent) == ("/v1/messages?beta=true", {**body, "model": "there"})
    assert (headers["x-api-key"], headers["anthropic-beta"]) == (KEYS["anthropic"], "x")


def test_what_claude_used_is_in_the_metrics(http: httpx2.Client, there: Cloud):
    def tokens() -> float:
        lines = http.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith("polyvox_prompt_tokens_total{") and '"claude"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    before = tokens()
    there.stream(*map(event, [start(), *text(0, "Pa"), stop(), END]))
    http.post("/v1/chat/completions", json={"model": "claude", "messages": ASK, "stream": True})
    assert tokens() - before == 15


# Azure, OpenAI


def test_a_chat_is_answered_by_a_deployment(sdk: OpenAI, there: Cloud):
    choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
    there.document({"id": "x", "object": "chat.completion", "created": 1, "model": "gpt-4o", "choices": [choice]})
    answer = sdk.chat.completions.create(model="azure", messages=ASK)
    assert (answer.model, answer.choices[0].message.content) == ("azure", "hi")
    path, headers, body = there.last()
    assert path == "/openai/deployments/there/chat/completions?api-version=2024-10-21"
    assert (headers["api-key"], body["messages"]) == (KEYS["azure"], ASK)
    assert "authorization" not in headers


def test_when_azure_says_wait_the_client_is_told(sdk: OpenAI, there: Cloud):
    there.document({"error": {"code": "429", "message": "slow down"}}, 429, retry_after="3", retry_after_ms="2500")
    with pytest.raises(openai.RateLimitError) as caught:
        sdk.chat.completions.create(model="azure", messages=ASK)
    assert caught.value.response.headers["retry-after-ms"] == "2500"


@pytest.mark.parametrize(
    ("model", "path", "provider"),
    [("azure", "/v1/messages", "azure"), ("claude", "/v1/embeddings", "anthropic"), ("echo", "/tokenize", "echo")],
)
def test_a_path_that_a_provider_has_not_is_refused_by_name(http: httpx2.Client, model, path, provider):
    answer = http.post(path, json={"model": model, "input": "x"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404, "path_not_served")
    assert path in error["message"]
    assert provider in error["message"]


@pytest.mark.parametrize(("path", "code"), [("/v1/messages", "path_not_served"), ("/v1/chat/completions", "theirs")])
def test_a_server_that_lacks_what_only_vllm_has_is_named(http: httpx2.Client, there: Cloud, path, code):
    there.document({"error": {"message": "no such thing", "code": "theirs"}}, 404)
    answer = http.post(path, json={"model": "gpt", "messages": ASK, "max_tokens": 5})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)


# Plugins


def test_a_provider_of_others_answers(sdk: OpenAI, there: Cloud):
    there.document("said there")
    answer = sdk.completions.create(model="echo", prompt="what is asked")
    assert (answer.model, answer.choices[0].text) == ("echo", '"said there"')
    path, headers, body = there.asked[-1]
    assert (path, headers["x-echo-key"], body) == ("/echo/eu", KEYS["echo"], b"what is asked")


def test_a_provider_of_others_refuses_what_it_cannot_express(sdk: OpenAI):
    with pytest.raises(openai.BadRequestError, match="suffix: provider echo has none"):
        sdk.completions.create(model="echo", prompt="x", suffix="y")


def check(folder: Path, endpoint: str) -> "subprocess.CompletedProcess[str]":
    """Run `polyvox check` where the plugin is installed; the endpoint is on line 4."""
    file = folder / "c.yaml"
    file.write_text(f"models:\n  m:\n    endpoints:\n    - {endpoint}\n")
    environ = {**os.environ, "PYTHONPATH": str(PLUGIN), "COLUMNS": "200", "OPTION": "sk-sentinel-option"}
    command = [sys.executable, "-m", "proxy", "check", str(file), "--state-dir", str(folder / "state")]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)


@pytest.mark.parametrize("options", ["{region: '${OPTION}'}", "{region: a, token: sk-sentinel-option}"])
def test_check_shows_the_provider_and_no_secret(tmp_path: Path, options):
    base_url = "https://x/${OPTION}" if "OPTION" in options else "https://x/sk-sentinel-option"
    done = check(tmp_path, f"{{base_url: '{base_url}', provider: echo, options: {options}}}")
    assert done.returncode == 0, done.stderr
    assert "echo" in done.stdout
    assert "sentinel" not in done.stdout


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("{base_url: 'https://x', provider: antropic}",
         ["c.yaml:4: models.m.endpoints[0].provider: ", "did you mean 'anthropic'?",
          "openai, azure, anthropic, completions, broken, echo"]),
        ("{base_url: 'https://x', provider: broken}", ["endpoints[0].provider: polyvox-echo", "ModuleNotFoundError"]),
        ("{base_url: 'https://x', provider: echo}", ["endpoints[0].options: ", "`region`"]),
        ("{base_url: 'https://x', provider: echo, options: {region: a, '${OPTION}': 1}}", ["unknown field"]),
        ("{base_url: 'https://x', provider: azure}", ["endpoints[0].api_version: is needed"]),
        ("{base_url: 'https://x', provider: anthropic, options: {max_tokens: 0}}", ["endpoints[0].options: ", ">= 1"]),
        ("{base_url: 'https://x', options: {a: 1}}", ["endpoints[0].options: provider openai takes none"]),
        ("{base_url: 'https://x', provider: azure, api_version: 'a b'}", ["endpoints[0].api_version: "]),
        ("{base_url: 'https://x', provider: '${OPTION}'}", ["endpoints[0].provider: there is no provider"]),
    ],
)  # fmt: skip
def test_check_refuses_a_provider_or_setting_that_cannot_be_used_with_its_line(tmp_path: Path, endpoint, said):
    done = check(tmp_path, endpoint)
    assert done.returncode == 2, done.stdout
    for part in said:
        assert part in done.stderr
    assert "sentinel" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_provider_that_nobody_names_is_not_imported(tmp_path: Path):
    done = check(tmp_path, "{base_url: 'https://x'}")
    assert done.returncode == 0, done.stderr
