"""Real vLLM processes that crash, hang and are stopped under load: one of each kind."""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
import pytest
from openai import OpenAI

from tests.fakes.checkpoints import Checkpoints
from tests.serving import Footprint, Server, beginning, engine, eventually, stop, wait_until_ready

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300, func_only=True)]

MODEL = "tiny-llama"
RESTART_DEADLINE = 200.0  # seconds
LONG = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "max_tokens": 1900,  # some seconds
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture(scope="module", autouse=True)
def starting(checkpoints: Checkpoints) -> Iterator[Server]:
    """A server of its own, with one engine, which starts while the tests before the one that needs it wait."""
    configuration: dict[str, object] = {"cache": False, "models": {MODEL: {"engine": engine(checkpoints.llama, 2048)}}}
    with tempfile.TemporaryDirectory(prefix="polyvox-") as folder, beginning(configuration, Path(folder)) as server:
        yield server


@pytest.fixture
def alone(starting: Server) -> Server:
    """That server, ready, for a test that ends it."""
    wait_until_ready(starting)
    return starting


def stream(server: Server, begun: Callable[[], object] = lambda: None) -> str:
    """Return what came of a long stream until it ended or broke; `begun` is called at its first bytes."""
    received = ""
    try:
        with httpx2.stream("POST", f"{server.base_url}/v1/chat/completions", json=LONG, timeout=120) as answer:
            for text in answer.iter_text():
                received += text
                begun()
    except httpx2.TransportError as broken:
        return f"{received}\nbroken: {broken!r}"
    return received


def wait_until_restarted(server: Server, before: psutil.Process, restarts: int) -> None:
    """Wait until the old process is gone and the engine, restarted once more, is ready."""
    old = Footprint((before,), frozenset())
    eventually(lambda: not old.alive(), 60, lambda: f"{before} is still there\n{server.log()}")

    def ready() -> bool:
        now = server.fleet()[MODEL]
        return now.state == "ready" and now.restarts == restarts + 1

    eventually(ready, RESTART_DEADLINE, lambda: f"{server.fleet()[MODEL]}\n{server.log()}", pause=0.5)


def assert_answers(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Paris?"}], max_tokens=4, extra_body={"ignore_eos": True}
    )
    assert answer.usage
    assert answer.usage.completion_tokens == 4


def test_an_engine_whose_core_is_killed_is_started_again_and_answers(server: Server, client: OpenAI) -> None:
    core, restarts = server.core(MODEL), server.fleet()[MODEL].restarts
    core.kill()
    wait_until_restarted(server, core, restarts)
    assert_answers(client)


def test_an_engine_that_hangs_is_killed_started_again_and_answers(server: Server, client: OpenAI) -> None:
    core, restarts = server.core(MODEL), server.fleet()[MODEL].restarts
    with ThreadPoolExecutor(1) as pool:
        stopped: Future[None] = Future()
        asked = pool.submit(stream, server, lambda: stopped.done() or stopped.set_result(core.suspend()))
        stopped.result(60)
        wait_until_restarted(server, core, restarts)
        received = asked.result(60)
    assert "data: [DONE]" not in received, "a stream that was cut looks like a success"
    assert_answers(client)


def test_requests_in_flight_are_finished_when_the_server_is_stopped(alone: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        begun: list[Future[None]] = [Future() for _ in range(4)]
        asked = [pool.submit(stream, alone, lambda f=f: f.done() or f.set_result(None)) for f in begun]
        for future in begun:
            future.result(60)
        assert not any(future.done() for future in asked)
        stop(alone)
        answers = [future.result() for future in asked]
    assert all(answer.rstrip().endswith("data: [DONE]") for answer in answers)
    assert all('"finish_reason":"length"' in answer for answer in answers)
