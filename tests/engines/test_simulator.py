"""The simulator engine, as a process, through the HTTP surface that it shares with vLLM."""

import asyncio
import json
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from benchmarks.ports import free_port
from engines.health import Probe
from engines.simulator import simulator_command
from engines.spec import EngineSettings, EngineSpec, Simulation

DEADLINE = 60.0
TOKENS = 8
HI = {"model": "sim", "messages": [{"role": "user", "content": "say hi"}]}
QUICK = Simulation(time_to_first_token=0, time_per_token=0, tokens=TOKENS, max_model_len=100)
NEVER = Simulation(time_to_first_token=1000, tokens=TOKENS)


class Engine:
    """A running simulator and a client for it."""

    def __init__(self, process: "subprocess.Popen[bytes]", address: str) -> None:
        self.process = process
        self.address = address
        uds = address.removeprefix("unix:") if address.startswith("unix:") else None
        self.base = "http://engine" if uds else address
        transport = httpx2.HTTPTransport(uds=uds)
        self.client = httpx2.Client(transport=transport, base_url=self.base, timeout=DEADLINE)

    def post(self, path: str, document: object = HI) -> httpx2.Response:
        return self.client.post(path, json=document)

    def events(self, path: str, document: dict[str, object]) -> list[Any]:
        """The events of a stream, decoded but for [DONE]."""
        text = self.post(path, {**document, "stream": True}).text
        data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        return [event if event == "[DONE]" else json.loads(event) for event in data]

    def meter(self, name: str, label: str = "") -> float:
        page = self.client.get("/metrics").text
        return float(re.findall(rf"^vllm:{name}{{[^}}]*{label}[^}}]*}} (.*)$", page, re.MULTILINE)[0])

    def wait_until_it_answers(self) -> None:
        def healthy() -> bool:
            assert self.process.poll() is None, "the simulator ended"
            try:
                return self.client.get("/health").status_code == 200
            except httpx2.ConnectError:
                return False

        eventually(healthy)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


@contextmanager
def running(simulation: Simulation, address: str | None = None) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="pv-") as folder:
        address = address or f"unix:{Path(folder) / 'engine.sock'}"
        spec = EngineSpec(model="sim", replica=0, settings=EngineSettings(simulator=simulation))
        process = subprocess.Popen(simulator_command(spec, address), stdout=subprocess.PIPE)
        try:
            engine = Engine(process, address)
            engine.wait_until_it_answers()
            yield engine
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def quick_engine() -> Iterator[Engine]:
    with running(QUICK) as engine:
        yield engine


@pytest.fixture
def quick(quick_engine: Engine) -> Engine:
    """A simulator that takes no time, without faults to come."""
    quick_engine.client.delete("/simulator/faults")
    return quick_engine


@pytest.fixture(scope="module")
def never() -> Iterator[Engine]:
    """A simulator whose first token never comes."""
    with running(NEVER) as engine:
        yield engine


# What it says


def test_an_answer_says_that_it_is_simulated_under_the_served_name(quick: Engine) -> None:
    answer = quick.post("/v1/chat/completions").json()
    (choice,) = answer["choices"]
    assert answer["model"] == "sim"
    assert choice["message"]["content"] == "simulated token 1 simulated token 2 simulated token"
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": TOKENS, "total_tokens": 2 + TOKENS}


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens_is_kept(quick: Engine, limit: str) -> None:
    answer = quick.post("/v1/chat/completions", {**HI, limit: 2}).json()
    assert answer["choices"][0]["message"]["content"] == "simulated token"
    assert answer["choices"][0]["finish_reason"] == "length"


def test_as_many_choices_come_as_were_asked_for(quick: Engine) -> None:
    answer = quick.post("/v1/chat/completions", {**HI, "n": 3}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 3 * TOKENS


def test_a_stream_has_a_role_then_tokens_then_usage_then_done(quick: Engine) -> None:
    asked = {**HI, "max_tokens": 3, "stream_options": {"include_usage": True}}
    *chunks, usage, done = quick.events("/v1/chat/completions", asked)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"]["content"] for choice in choices[1:]] == ["simulated", " token", " 1"]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 5)
    assert done == "[DONE]"


def test_a_stream_has_no_usage_unless_asked(quick: Engine) -> None:
    events = quick.events("/v1/chat/completions", HI)
    assert not [event for event in events[:-1] if "usage" in event]


def test_a_stream_and_a_whole_answer_say_the_same(quick: Engine) -> None:
    events = quick.events("/v1/completions", {"model": "sim", "prompt": "a"})
    whole = quick.post("/v1/completions", {"model": "sim", "prompt": "a"}).json()
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == whole["choices"][0]["text"]


def test_an_answer_goes_on_where_a_partial_message_ends(quick: Engine) -> None:
    partial = {"role": "assistant", "content": "simulated token 1 simulated"}
    asked = {**HI, "messages": [*HI["messages"], partial], "continue_final_message": True}
    answer = quick.post("/v1/chat/completions", asked).json()
    assert answer["choices"][0]["message"]["content"] == " token 2 simulated token"


def test_the_openai_sdk_understands_every_generating_api(quick: Engine) -> None:
    sdk = openai.OpenAI(base_url=f"{quick.base}/v1", api_key="x", http_client=quick.client)
    messages: Any = HI["messages"]
    chat = sdk.chat.completions.create(model="sim", messages=messages, max_tokens=1)
    streamed = list(sdk.chat.completions.create(model="sim", messages=messages, max_tokens=1, stream=True))
    completion = sdk.completions.create(model="sim", prompt="a", max_tokens=1)
    response = sdk.responses.create(model="sim", input="a", max_output_tokens=1)
    last = list(sdk.responses.create(model="sim", input="a", max_output_tokens=1, stream=True))[-1]
    assert chat.choices[0].message.content == "simulated"
    assert [chunk.choices[0].delta.content for chunk in streamed] == ["", "simulated"]
    assert completion.choices[0].text == "simulated"
    assert response.output_text == "simulated"
    assert last.type == "response.completed"
    assert last.response.output_text == "simulated"


def test_the_messages_api_streams_its_own_events(quick: Engine) -> None:
    events = quick.events("/v1/messages", {**HI, "max_tokens": 2})
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[5]["delta"]["stop_reason"] == "max_tokens"
    whole = quick.post("/v1/messages", {**HI, "max_tokens": 2}).json()
    assert whole["content"] == [{"type": "text", "text": "simulated token"}]


def test_embeddings_depend_on_their_text_and_come_in_both_formats(quick: Engine) -> None:
    sdk = openai.OpenAI(base_url=f"{quick.base}/v1", api_key="x", http_client=quick.client)
    packed = [one.embedding for one in sdk.embeddings.create(model="sim", input=["a", "b", "a"]).data]
    plain = sdk.embeddings.create(model="sim", input="a", encoding_format="float").data[0].embedding
    assert packed[0] == packed[2] != packed[1]
    assert plain == pytest.approx(packed[0], rel=1e-6)


def test_rerank_gives_the_best_first(quick: Engine) -> None:
    asked = {"model": "sim", "query": "q", "documents": ["a", "b", "c"], "top_n": 2}
    results = quick.post("/v1/rerank", asked).json()["results"]
    scores = [result["relevance_score"] for result in results]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)


def test_score_pairs_one_text_with_each_of_the_others(quick: Engine) -> None:
    answer = quick.post("/v1/score", {"model": "sim", "text_1": "q", "text_2": ["a", "b"]}).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1]


def test_words_are_tokens(quick: Engine) -> None:
    counted = quick.post("/tokenize", {"model": "sim", "prompt": "one two one"}).json()
    assert (counted["count"], counted["max_model_len"]) == (3, 100)
    assert counted["tokens"][0] == counted["tokens"][2] != counted["tokens"][1]
    assert quick.post("/detokenize", {"model": "sim", "tokens": [1, 2]}).json() == {"prompt": "simulated token"}


def test_a_transcription_says_how_large_the_file_was(quick: Engine) -> None:
    files = {"file": ("a.wav", b"\r\n--\0" * 100)}
    answer = quick.client.post("/v1/audio/transcriptions", files=files, data={"model": "sim"})
    assert answer.json()["text"] == "simulated transcription of 500 bytes"


# What it refuses


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "param"),
    [
        ("/v1/chat/completions", {**HI, "model": "other"}, 404, "NotFoundError", "model"),
        ("/v1/embeddings", {"model": "other", "input": "a"}, 404, "NotFoundError", "model"),
        ("/v1/chat/completions", {"model": "sim"}, 400, "Bad Request", "body.messages"),
        ("/v1/chat/completions", {**HI, "messages": "hi"}, 400, "Bad Request", "body.messages"),
        ("/v1/chat/completions", {**HI, "max_tokens": "x"}, 400, "Bad Request", "body.max_tokens"),
        ("/v1/chat/completions", {**HI, "max_tokens": 101}, 400, "BadRequestError", "max_tokens"),
        ("/v1/chat/completions", {**HI, "max_tokens": -1}, 400, "BadRequestError", "max_tokens"),
        ("/v1/completions", {"prompt": "a " * 100}, 400, "BadRequestError", "input_tokens"),
        ("/v1/completions", {"model": "sim"}, 400, "BadRequestError", "prompt"),
        ("/v1/responses", {"model": "sim"}, 400, "Bad Request", "body.input"),
        ("/v1/chat/completions", [], 400, "Bad Request", "body"),
    ],
)
def test_errors_have_the_shape_of_vllms(
    quick: Engine, path: str, body: object, status: int, kind: str, param: str
) -> None:
    answer = quick.post(path, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"], error["param"]) == (status, status, kind, param)


def test_a_body_that_is_no_json_is_refused(quick: Engine) -> None:
    answer = quick.client.post("/v1/chat/completions", content=b"{bad")
    assert answer.status_code == 400
    assert "json_invalid" in answer.json()["error"]["message"]


def test_the_messages_api_has_errors_of_its_own_shape(quick: Engine) -> None:
    answer = quick.post("/v1/messages", {**HI, "model": "other", "max_tokens": 1})
    assert answer.status_code == 404
    assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", "NotFoundError")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/no", 404), ("GET", "/tokenize", 405)])
def test_other_paths_and_methods_are_refused(quick: Engine, method: str, path: str, status: int) -> None:
    assert quick.client.request(method, path).status_code == status


# How it is


@pytest.mark.parametrize("unix", [True, False])
def test_the_supervisor_finds_it_ready(unix: bool) -> None:
    async def ask(address: str) -> None:
        probe = Probe(address, "sim")
        card, answer = await probe.card(), await probe.look()
        await probe.aclose()
        assert card is not None
        assert (card.max_model_len, answer.answered, answer.dead) == (100, True, False)

    with running(QUICK, None if unix else f"http://127.0.0.1:{free_port()}") as engine:
        asyncio.run(ask(engine.address))


def test_the_meters_count_tokens_and_iterations(quick: Engine) -> None:
    def read() -> list[float]:
        names = ("generation_tokens_total", "prompt_tokens_total", "iteration_tokens_total_count")
        return [quick.meter(name) for name in (*names, "iteration_tokens_total_sum")]

    before = read()
    quick.post("/v1/chat/completions", {**HI, "n": 2})
    grown = [after - earlier for earlier, after in zip(before, read(), strict=True)]
    assert grown == [2 * TOKENS, 2, TOKENS, 2 * TOKENS + 2]
    assert quick.meter("num_requests_running") == quick.meter("kv_cache_usage_perc") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_the_generation(never: Engine, stream: bool) -> None:
    aborted = never.meter("request_success_total", "abort")
    body = json.dumps({**HI, "stream": stream}).encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(never.address.removeprefix("unix:"))
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        eventually(lambda: never.meter("num_requests_running") == 1)
    eventually(lambda: never.meter("num_requests_running") == 0)
    assert never.meter("request_success_total", "abort") == aborted + 1


def test_what_was_received_can_be_seen(quick: Engine) -> None:
    quick.client.post("/v1/chat/completions?beta=true", json=HI, headers={"X-Test": "1"})
    received = quick.client.get("/simulator/requests").json()[-1]
    assert (received["method"], received["path"]) == ("POST", "/v1/chat/completions?beta=true")
    assert json.loads(received["body"]) == HI
    assert ["x-test", "1"] in received["headers"]


def test_nobody_can_connect_before_the_startup_time_is_over() -> None:
    before = time.monotonic()
    with running(Simulation(startup=0.5)):
        assert time.monotonic() - before >= 0.5


def test_sigterm_ends_it_without_an_error() -> None:
    with running(NEVER) as engine:
        engine.process.terminate()
        assert engine.process.wait(DEADLINE) == 0


# Faults


def test_ordered_errors_meet_the_next_requests_and_no_more(quick: Engine) -> None:
    quick.post("/simulator/faults", {"error": 503, "requests": 2})
    answers = [quick.post("/v1/chat/completions") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503, 503, 200]
    assert answers[0].json()["error"]["type"] == "ServiceUnavailableError"


@pytest.mark.parametrize("stream", [True, False])
def test_a_cut_ends_the_connection_in_the_middle_of_the_answer(quick: Engine, stream: bool) -> None:
    quick.post("/simulator/faults", {"cut_after": 2})
    with pytest.raises(httpx2.RemoteProtocolError, match="peer closed connection"):
        quick.post("/v1/chat/completions", {**HI, "stream": stream})


def test_a_hung_engine_is_healthy_and_stands_still(quick: Engine) -> None:
    quick.post("/simulator/faults", {"hang": True})
    with quick.client.stream("POST", "/v1/chat/completions", json={**HI, "stream": True}):
        iterations = quick.meter("iteration_tokens_total_count")
        with pytest.raises(httpx2.ReadTimeout):
            quick.client.post("/v1/chat/completions", json=HI, timeout=0.1)
        assert quick.client.get("/health").status_code == 200
        assert quick.meter("num_requests_running") >= 1
        assert quick.meter("iteration_tokens_total_count") == iterations
    eventually(lambda: quick.meter("num_requests_running") == 0)
    assert quick.post("/v1/chat/completions").status_code == 200


def test_a_crash_ends_the_process_with_the_ordered_status() -> None:
    with running(QUICK) as engine:
        engine.post("/simulator/faults", {"exit": 7})
        with pytest.raises(httpx2.RemoteProtocolError):
            engine.post("/v1/chat/completions")
        assert engine.process.wait(DEADLINE) == 7


def test_a_slow_request_takes_a_multiple_of_the_time() -> None:
    with running(Simulation(time_to_first_token=0.001, time_per_token=0, tokens=1)) as engine:
        engine.post("/simulator/faults", {"slow": 1_000_000.0})
        with pytest.raises(httpx2.ReadTimeout):
            engine.client.post("/v1/chat/completions", json=HI, timeout=0.1)
        eventually(lambda: engine.meter("request_success_total", "abort") == 1)
        assert engine.post("/v1/chat/completions").status_code == 200


def test_faults_by_chance_are_the_same_for_the_same_seed() -> None:
    def outcomes(seed: int) -> list[int]:
        simulation = Simulation(time_to_first_token=0, time_per_token=0, error_rate=0.5, seed=seed)
        with running(simulation) as engine:
            return [engine.post("/v1/chat/completions").status_code for _ in range(20)]

    first = outcomes(1)
    assert set(first) == {200, 500}
    assert outcomes(1) == first != outcomes(2)


def test_a_fault_with_an_unknown_key_is_refused(quick: Engine) -> None:
    answer = quick.post("/simulator/faults", {"hangs": True})
    assert answer.status_code == 400
    assert "hangs" in answer.json()["detail"]


def test_the_command_line_takes_the_context_length_of_the_model() -> None:
    settings = EngineSettings(simulator=Simulation(max_model_len=5), max_model_len=7)
    command = simulator_command(EngineSpec("sim", 0, settings), "http://127.0.0.1:9")
    assert command[command.index("--max-model-len") + 1] == "7"
    assert command[command.index("--port") + 1] == "9"
