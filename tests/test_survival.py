"""Streams and requests that outlive their engine: real processes of simulators, which are killed, stopped and cut."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.fakes.one_worker import text_of
from tests.serving import Server, command, eventually, serve

ASK = {"messages": [{"role": "user", "content": "tell me"}], "temperature": 0}
SPOKEN = 60
SLOW = {"time_to_first_token": 0.0, "time_per_token": 0.02, "tokens": SPOKEN}
QUICK = {"first_delay": 0.05, "max_delay": 0.2, "give_up_after": 1000}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    engine = {"simulator": SLOW, "restart": QUICK}
    times = {"connect": 1, "first_byte": 3, "between_bytes": 1, "first_token": 1}
    configuration = {
        "server": {"workers": 2},
        "cache": False,
        "models": {
            "twice": {"engine": {**engine, "replicas": 2}, "timeouts": times, "breaker": {"recovery": 1}},
            "cloud": {"engine": engine},
            "alone": {"engine": engine},
        },
        "fallbacks": {"twice": ["cloud"]},
    }
    with serve(configuration, tmp_path_factory.mktemp("survival")) as running:
        yield running


@pytest.fixture
def whole(server: Server) -> str:
    """What a stream says that nothing happens to."""
    answer = httpx2.post(
        server.base_url + "/v1/chat/completions", json={"model": "alone", "stream": True, **ASK}, timeout=60
    )
    text = text_of(answer.text)
    assert len(text.split()) == SPOKEN
    return text


def engine_of(server: Server, endpoint: str) -> psutil.Process:
    """Return the process that listens for an endpoint of the model `twice`."""
    name, replica = endpoint.split("/")
    found = [p for p in server.processes(name) if "engines.simulator" in command(p) and "--uds" in command(p)]
    (process,) = (p for p in found if re.search(rf"\b{replica}\.sock", command(p)))
    return process


def broken_in_the_middle(server: Server, number: signal.Signals) -> tuple[str, httpx2.Response, psutil.Process]:
    """Ask for a stream, send its engine a signal when it has begun to speak; return what the client gets."""
    body = {"model": "twice", "stream": True, **ASK}
    with httpx2.stream("POST", server.base_url + "/v1/chat/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        begun = [next(lines) for _ in range(10)]
        victim = engine_of(server, answer.headers["x-polyvox-endpoint"])
        victim.send_signal(number)
        return "\n".join([*begun, *lines]), answer, victim


def test_a_stream_whose_engine_is_killed_says_what_it_would_have_said(server: Server, whole: str):
    stream, _, _ = broken_in_the_middle(server, signal.SIGKILL)
    assert text_of(stream) == whole
    assert "error" not in stream


def test_a_stream_whose_engine_goes_silent_says_what_it_would_have_said(server: Server, whole: str):
    stream, _, stopped = broken_in_the_middle(server, signal.SIGSTOP)
    stopped.send_signal(signal.SIGCONT)
    assert text_of(stream) == whole


def test_a_stream_of_the_only_engine_ends_in_an_error(server: Server):
    with server.engine_client("alone") as engine:
        engine.post("/simulator/faults", json={"cut_after": 5}).raise_for_status()
    answer = httpx2.post(
        server.base_url + "/v1/chat/completions", json={"model": "alone", "stream": True, **ASK}, timeout=60
    )
    assert '"error"' in answer.text
    assert "[DONE]" not in answer.text


def test_no_client_sees_a_failure_while_engines_are_killed_stopped_and_cut(server: Server, whole: str):
    chance = random.Random(7)

    async def ask(client: httpx2.AsyncClient, number: int) -> str:
        body = {"model": "twice", "stream": number % 2 == 0, **ASK}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return text_of(answer.text) if body["stream"] else answer.json()["choices"][0]["message"]["content"]

    async def harm(asking: "asyncio.Future[list[str]]") -> None:
        while not asking.done():
            number = chance.choice((signal.SIGKILL, signal.SIGSTOP))
            try:
                victim = await asyncio.to_thread(engine_of, server, f"twice/{chance.randrange(2)}")
                victim.send_signal(number)
                await asyncio.wait((asking,), timeout=0.5)
                victim.send_signal(signal.SIGCONT)
            except (psutil.NoSuchProcess, ValueError):  # it is being started
                await asyncio.wait((asking,), timeout=0.1)

    async def story() -> list[str]:
        async with httpx2.AsyncClient(base_url=server.base_url, timeout=60) as client:

            async def several(offset: int) -> list[str]:
                return [await ask(client, offset + i) for i in range(5)]

            asking = asyncio.ensure_future(asyncio.gather(*map(several, range(8))))
            await harm(asking)
            return [text for texts in asking.result() for text in texts]

    texts = asyncio.run(story())
    assert len(texts) == 40
    assert set(texts) == {whole}
    eventually(lambda: _running(server) == 0)


def _running(server: Server) -> float:
    page = httpx2.get(server.base_url + "/metrics", timeout=60).text
    return sum(float(v) for v in re.findall(r"^polyvox_num_requests_running\{.*\} (\S+)$", page, re.MULTILINE))


def test_the_command_lists_every_endpoint_with_its_breaker(server: Server):
    def polyvox(*words: str) -> str:
        command = [sys.executable, "-m", "proxy", "endpoints", *words, "--state-dir", str(server.paths.logs.parent)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "COLUMNS": "200"}
        )
        return done.stdout

    listed = json.loads(polyvox("--json"))
    assert [c["endpoint"] for c in listed] == ["twice/0", "twice/1", "cloud/0", "alone/0"]
    assert all(sum(c["workers"].values()) == 2 for c in listed)
    assert sum(c["failed"] for c in listed if c["model"] == "twice") > 0
    assert all((c["next_trial"] is None) == (c["workers"]["open"] == 0) for c in listed)
    table = polyvox()
    assert re.search(r"^ENDPOINT +BREAKER +NEXT TRIAL +OPENED +FAILED", table)
    assert re.search(r"^alone/0 +closed +- +0 +1 *$", table, re.MULTILINE)


def test_without_a_server_the_command_says_so(tmp_path: Path):
    command = [sys.executable, "-m", "proxy", "endpoints", "--state-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert "no polyvox server answers" in done.stderr
