"""Routing by a whole server with engines of its own: what clients, the SDK and the command see."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx2
import openai
import pytest

from tests.serving import Server, serve
from tests.test_serve_metrics import FAST

KEY, BOUND = "sk-for-everything", "sk-for-the-small-one"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    engine = {"engine": {"simulator": FAST}}
    configuration = {
        "server": {"api_keys": [{"key": BOUND, "models": ["small"]}, KEY], "workers": 2},
        "models": {
            "small": {**engine, "kind": "fast_cheap", "price": {"input": 0.1, "output": 0.4}, "region": "eu"},
            "large": {**engine, "kind": "advanced", "hosting": {"usd_per_hour": 36.0}},
        },
        "aliases": {"legal": {"model": "large", "system": "You are a lawyer.", "defaults": {"max_tokens": 3}}},
        "tasks": {"cooking": ["recipe"]},
    }
    with serve(configuration, tmp_path_factory.mktemp("routing")) as running:
        yield running


@pytest.fixture
def route(server: Server) -> Run:
    def run(*words: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        state = str(server.output.parent / "state")
        environment = {**os.environ, "COLUMNS": "200", "POLYVOX_STATE_DIR": state, "POLYVOX_API_KEY": KEY, **environ}
        command = [sys.executable, "-m", "proxy", "route", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)

    return run


def test_the_sdk_routes_with_extra_body(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY)
    for complexity, who in (("complex", "large"), ("simple", "small")):
        answer = client.chat.completions.with_raw_response.create(
            model="auto",
            messages=[{"role": "user", "content": "hi"}],
            extra_body={"routing": {"complexity": complexity, "budget_limit": 5}},
        )
        assert answer.headers["x-polyvox-model"] == who
        assert answer.parse().model == "auto"


def test_a_preset_limits_the_answer_where_the_client_does_not(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY)
    answer = client.chat.completions.create(model="legal", messages=[{"role": "user", "content": "hi"}])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_a_key_for_one_model_lists_and_gets_no_other_from_any_worker(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=BOUND)
    assert "large" not in [model.id for model in client.models.list()]
    for _ in range(6):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="large", messages=[{"role": "user", "content": "hi"}])


def test_the_command_explains_a_decision_of_the_running_server(route: Run) -> None:
    done = route("Is this recipe any good?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("small  (")
    assert "cooking" in done.stdout.splitlines()[0]
    for part in ("MODEL", "SCORE", "DROPPED", "large", "if it fails: large"):
        assert part in done.stdout


@pytest.mark.parametrize(
    "words",
    [("--model", "auto:best", "hi"), ("hi", "--model", "auto:best"), ("--task", "code", "--model", "auto:best", "hi")],
)
def test_the_command_asks_for_a_name(route: Run, words: tuple[str, ...]) -> None:
    done = route(*words, "--json")
    assert done.returncode == 0, done.stderr
    explained = json.loads(done.stdout)
    assert (explained["asked"], explained["model"], explained["prefer"]) == ("auto:best", "large", "quality")


def test_the_command_takes_what_a_request_may_say(route: Run) -> None:
    words = ("--task", "legal", "--complexity", "0.9", "--budget", "5", "--region", "eu", "--prefer", "speed")
    explained = json.loads(route("hi", *words, "--json").stdout)
    assert (explained["task"], explained["level"], explained["budget_limit"]) == ("legal", "complex", 5)
    assert (explained["prefer"], explained["requirements"]["region"]) == ("speed", "eu")
    assert [c["model"] for c in explained["candidates"] if c["dropped"]] == ["large"]


def test_the_command_says_what_the_server_refuses(route: Run) -> None:
    done = route("hi", "--task", "coking")
    assert done.returncode == 1
    assert "did you mean 'cooking'" in done.stderr
    assert "Incorrect API key" in route("hi", POLYVOX_API_KEY="wrong").stderr


def test_the_command_finds_a_key_in_the_configuration(route: Run, server: Server) -> None:
    done = route("hi", "--config", str(server.output.parent / "polyvox.yaml"), POLYVOX_API_KEY="")
    assert done.returncode == 0, done.stderr


def test_without_a_server_the_command_says_so(route: Run, tmp_path: object) -> None:
    done = route("hi", POLYVOX_STATE_DIR=str(tmp_path))
    assert done.returncode == 3
    assert route("hi", "--url", "http://127.0.0.1:9").returncode == 3


def test_a_price_is_worked_out_from_what_the_engine_does(server: Server) -> None:
    headers = {"authorization": f"Bearer {KEY}"}

    def price() -> float:
        body = {"prompt": "hi", "max_tokens": 100}
        explained = httpx2.post(f"{server.base_url}/v1/route", json=body, headers=headers, timeout=60).json()
        return next(float(c["usd"]) for c in explained["candidates"] if c["model"] == "large")

    before = price()
    assert before > 0
    body = {"model": "large", "messages": [{"role": "user", "content": "hi"}]}
    httpx2.post(f"{server.base_url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert price() != before
