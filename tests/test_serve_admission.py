"""Limits, queues and deadlines as clients meet them: real processes and sockets, simulator engines, two workers."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from tests.scraping import Page
from tests.serving import Server, eventually, serve

SLOW = {"time_to_first_token": 0.0, "time_per_token": 0.05, "tokens": 2000}
FAST = {"time_to_first_token": 0.0, "time_per_token": 0.0, "tokens": 8}
ASK = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    configuration = {
        "server": {"port": 0, "workers": 2, "start_wait": 30},
        "models": {
            "one": {"engine": {"simulator": SLOW, "max_in_flight": 1}, "queue": {"size": 1, "timeout": 60}},
            "closed": {"engine": {"simulator": SLOW, "max_in_flight": 1}, "queue": {"size": 0}},
            "pair": {"engine": {"simulator": FAST, "replicas": 2}},
        },
    }
    with serve(configuration, tmp_path_factory.mktemp("admission")) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.base_url, timeout=60) as client:
        yield client


def chat(client: httpx2.Client, model: str, headers: dict[str, str] | None = None, **fields: object) -> httpx2.Response:
    body = {"model": model, "messages": ASK, **fields}
    return client.post("/v1/chat/completions", json=body, headers=headers)


def metric(client: httpx2.Client, name: str, **labels: str) -> float:
    return Page.of(client.get("/metrics").text).value(name, **labels)


class Held:
    """A stream that is not read on: it keeps its place at its engine until the block ends."""

    def __init__(self, server: Server, model: str) -> None:
        self._client = httpx2.Client(base_url=server.base_url, timeout=60)
        self._body = {"model": model, "messages": ASK, "stream": True}

    def __enter__(self) -> None:
        self._stream = self._client.stream("POST", "/v1/chat/completions", json=self._body)
        assert self._stream.__enter__().status_code == 200

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(None, None, None)
        self._client.close()


def test_a_request_waits_for_its_turn_and_is_answered(server: Server, http: httpx2.Client):
    with ThreadPoolExecutor(1) as pool, Held(server, "one"):
        waiting = pool.submit(chat, http, "one", max_tokens=1)
        eventually(lambda: metric(http, "polyvox_num_requests_waiting", model_name="one") == 1)
        assert not waiting.done()
    assert waiting.result(60).status_code == 200
    assert metric(http, "polyvox_num_requests_waiting", model_name="one") == 0


def test_one_too_many_is_told_when_to_come_back(server: Server, http: httpx2.Client):
    with Held(server, "closed"):
        refused = chat(http, "closed")
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1
    eventually(lambda: metric(http, "polyvox_num_requests_running", model_name="closed") == 0)


def test_a_client_that_leaves_the_queue_leaves_nothing_there(server: Server, http: httpx2.Client):
    with Held(server, "one"):
        body = json.dumps({"model": "one", "messages": ASK}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(server.base_url.split(":")[-1]))) as client:
            client.sendall(head.encode() + body)
            eventually(lambda: metric(http, "polyvox_num_requests_waiting", model_name="one") == 1)
        eventually(lambda: metric(http, "polyvox_num_requests_waiting", model_name="one") == 0)
    assert chat(http, "one", max_tokens=1).status_code == 200


def test_a_deadline_ends_the_wait_in_a_queue(server: Server, http: httpx2.Client):
    with Held(server, "one"):
        late = chat(http, "one", {"x-request-timeout": "0.2"})
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"


def test_a_deadline_ends_the_wait_for_an_answer(http: httpx2.Client):
    late = chat(http, "one", {"x-request-timeout": "0.3"})
    assert late.status_code == 504
    eventually(lambda: metric(http, "polyvox_num_requests_running", model_name="one") == 0)


def test_a_deadline_ends_a_stream_with_an_error_and_without_done(http: httpx2.Client):
    cut = chat(http, "one", {"x-request-timeout": "4"}, stream=True)
    assert cut.status_code == 200
    assert '"choices"' in cut.text
    assert '"deadline_exceeded"' in cut.text
    assert "[DONE]" not in cut.text


def test_a_deadline_that_is_far_changes_nothing(http: httpx2.Client):
    assert chat(http, "pair", {"x-request-timeout": "30"}).status_code == 200
    assert chat(http, "pair", {"x-request-timeout": "30"}, stream=True).text.endswith("data: [DONE]\n\n")


def test_a_deadline_that_is_none_is_refused_by_name(http: httpx2.Client):
    refused = chat(http, "pair", {"x-request-timeout": "soon"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "x-request-timeout"


def test_replicas_share_the_work_and_a_conversation_stays_where_it_began(http: httpx2.Client):
    turns = [{"role": "user", "content": "a long story " * 200}]
    used = set()
    for turn in range(6):
        answer = http.post("/v1/chat/completions", json={"model": "pair", "messages": turns, "stream": True})
        used.add(answer.headers["x-polyvox-endpoint"])
        turns += [{"role": "assistant", "content": f"and {turn}"}, {"role": "user", "content": "go on " * 20}]
    assert len(used) == 1
    texts = [f"{i} something else " * 200 for i in range(24)]
    with ThreadPoolExecutor(12) as pool:
        asked = pool.map(lambda text: chat(http, "pair", messages=[{"role": "user", "content": text}]), texts)
        assert {answer.headers["x-polyvox-endpoint"] for answer in asked} == {"pair/0", "pair/1"}
