"""/metrics of a server with two workers, and streams whose usage only we asked for: real processes and sockets."""

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.scraping import Page
from tests.serving import Server, command, eventually, serve

KEY, ADMIN_KEY = "sk-sentinel-client", "sk-sentinel-admin"
FAST = {"time_to_first_token": 0.0, "time_per_token": 0.0, "tokens": 8}
SLOW = {"time_to_first_token": 0.0, "time_per_token": 0.05, "tokens": 2000}
ASK = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    configuration = {
        "server": {"api_keys": [KEY], "admin_keys": [ADMIN_KEY], "workers": 2},
        "models": {"fast": {"engine": {"simulator": FAST}}, "slow": {"engine": {"simulator": SLOW}}},
        "aliases": {"gpt-4o": "fast"},
    }
    with serve(configuration, tmp_path_factory.mktemp("metrics")) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=server.base_url, headers=headers, timeout=60) as client:
        yield client


def workers(server: Server) -> list[psutil.Process]:
    return [p for p in server.process.children() if "proxy.worker" in command(p)]


def scrape(server: Server) -> Page:
    """Return /metrics of whichever worker takes a new connection."""
    answer = httpx2.get(server.base_url + "/metrics", headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    assert answer.status_code == 200, answer.text
    return Page.of(answer.text)


def growth(server: Server, before: Page) -> Callable[..., float]:
    """Return a function that says by how much a figure has grown since a page."""
    return lambda name, **labels: scrape(server).value(name, **labels) - before.value(name, **labels)


def counted(grown: Callable[..., float], requests: int, **labels: str) -> None:
    """Wait until answers are counted: a worker does so once they are sent, when another may be asked already."""
    last = "polyvox_request_overhead_seconds_count"  # of the figures that it writes
    eventually(lambda: grown(last, **labels) >= requests)


def test_whichever_worker_answers_all_requests_are_summed(server: Server):
    before = scrape(server)
    for _ in range(24):  # each on a connection of its own, for either worker to take
        body = {"model": "fast", **ASK}
        answer = httpx2.post(
            server.base_url + "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60
        )
        assert answer.status_code == 200
    labels = {"model_name": "fast", "endpoint": "fast/0", "operation": "chat"}
    grown = growth(server, before)
    counted(grown, 24, **labels)
    assert [grown("polyvox_requests_total", **labels) for _ in range(8)] == [24] * 8
    assert grown("polyvox_request_success_total", **labels, finished_reason="stop") == 24
    assert grown("polyvox_prompt_tokens_total", **labels) == 24 * 6
    assert grown("polyvox_generation_tokens_total", **labels) == 24 * 8
    assert grown("polyvox_request_overhead_seconds_count", **labels) == 24


@pytest.mark.parametrize(
    ("path", "operation", "body"),
    [
        ("/v1/chat/completions", "chat", ASK),
        ("/v1/completions", "text_completion", {"prompt": "one two three four five six"}),
        ("/v1/responses", "responses", {"input": "one two three four five six"}),
        ("/v1/messages", "messages", {**ASK, "max_tokens": 20}),
    ],
)
@pytest.mark.parametrize("model", ["fast", "gpt-4o"])
@pytest.mark.parametrize("stream", [True, False])
def test_tokens_are_counted_whether_or_not_the_client_asks(server, http, path, operation, body, model, stream):
    labels = {"model_name": "fast", "endpoint": "fast/0", "operation": operation}
    grown = growth(server, scrape(server))
    answer = http.post(path, json={"model": model, "stream": stream, "max_tokens": 20, **body})
    assert answer.status_code == 200, answer.text
    counted(grown, 1, **labels)
    assert grown("polyvox_prompt_tokens_total", **labels) == 6
    assert grown("polyvox_generation_tokens_total", **labels) == 8
    assert grown("polyvox_request_success_total", **labels, finished_reason="stop") == 1
    assert grown("polyvox_time_to_first_token_seconds_count", **labels) == stream
    assert grown("polyvox_request_time_per_output_token_seconds_count", **labels) == stream


def test_tokens_of_embeddings_are_counted(server: Server, http: httpx2.Client):
    grown = growth(server, scrape(server))
    http.post("/v1/embeddings", json={"model": "fast", "input": ["one two", "three"]}).raise_for_status()
    counted(grown, 1, operation="embeddings")
    assert grown("polyvox_prompt_tokens_total", operation="embeddings") == 3


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", ASK), ("/v1/completions", {"prompt": "one two"})])
@pytest.mark.parametrize("options", [{}, {"n": 2}, {"stream_options": None}, {"stream_options": {}},
                                     {"stream_options": {"include_usage": False}}])  # fmt: skip
def test_a_stream_is_what_it_would_be_had_we_not_asked_for_its_usage(server, http, path, body, options):
    body = {"model": "fast", "stream": True, **body, **options}
    through, direct = _through_and_direct(server, http, path, body)
    assert _without_ids(through.content) == _without_ids(direct.content)
    assert b"usage" not in through.content
    with server.engine_client("fast") as engine:
        asked = json.loads(engine.get("/simulator/requests").json()[-2]["body"])
    assert asked["stream_options"]["include_usage"] is True


def test_a_client_that_asks_for_usage_gets_it(server: Server, http: httpx2.Client):
    body = {"model": "fast", "stream": True, **ASK, "stream_options": {"include_usage": True}}
    through, direct = _through_and_direct(server, http, "/v1/chat/completions", body)
    assert _without_ids(through.content) == _without_ids(direct.content)
    assert b'"completion_tokens":8' in through.content


def _through_and_direct(
    server: Server, http: httpx2.Client, path: str, body: dict[str, object]
) -> tuple[httpx2.Response, httpx2.Response]:
    through = http.post(path, json=body)
    with server.engine_client("fast") as engine:
        return through, engine.post(path, json=body)


def _without_ids(stream: bytes) -> bytes:
    return re.sub(rb'"id":"[^"]*"|"created":\d+', b"", stream)


# Errors and clients that go


def test_invented_models_make_no_series(server: Server, http: httpx2.Client):
    grown = growth(server, scrape(server))
    for i in range(200):
        assert http.post("/v1/completions", json={"model": f"invented-{i}", "prompt": "x"}).status_code == 404
        assert http.get(f"/v1/models/invented-{i}").status_code == 404
        assert http.get(f"/invented-{i}").status_code == 404
    page = scrape(server)
    assert {labels["model_name"] for labels in page.series("polyvox_requests_total")} <= {"fast", "slow", "unknown"}
    assert "invented" not in repr(page)
    unknown = {"model_name": "unknown", "endpoint": ""}
    eventually(lambda: grown("polyvox_request_errors_total", **unknown, error_type="unknown_model") == 400)
    eventually(lambda: grown("polyvox_request_errors_total", **unknown, error_type="unknown_path") == 200)


def test_errors_are_counted_by_type(server: Server, http: httpx2.Client):
    grown = growth(server, scrape(server))
    with server.engine_client("fast") as engine:
        for fault in ({"error": 500}, {"error": 429}, {"cut_after": 3}):
            engine.post("/simulator/faults", json=fault).raise_for_status()
            http.post("/v1/chat/completions", json={"model": "fast", "stream": True, **ASK})
    http.post("/v1/chat/completions", content=b"{")
    httpx2.post(server.base_url + "/v1/chat/completions", json={}, timeout=60)
    errors = {
        "upstream_failed": "fast", "upstream_4xx": "fast", "truncated_answer": "fast", "bad_request": "unknown",
        "wrong_key": "unknown",
    }  # fmt: skip
    for error, model in errors.items():
        labels = {"model_name": model, "operation": "chat", "error_type": error}
        eventually(lambda labels=labels: grown("polyvox_request_errors_total", **labels) == 1)


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go_are_counted_as_such_and_nothing_stays_under_way(server: Server, stream):
    grown = growth(server, scrape(server))
    body = json.dumps({"model": "slow", "stream": stream, **ASK, "max_tokens": 2000}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", int(server.base_url.split(":")[-1]))))
            client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            if stream:
                assert client.recv(65536)
        eventually(lambda: scrape(server).value("polyvox_num_requests_running", model_name="slow") == 4)
    eventually(lambda: scrape(server).value("polyvox_num_requests_running", model_name="slow") == 0)
    eventually(lambda: grown("polyvox_request_success_total", model_name="slow", finished_reason="abort") == 4)
    assert grown("polyvox_request_errors_total", model_name="slow") == 0


def test_a_worker_that_dies_leaves_its_counts_and_nothing_under_way(server: Server, http: httpx2.Client):
    before = scrape(server)

    def ask() -> None:
        body = {"model": "slow", "stream": True, **ASK, "max_tokens": 2000}
        with pytest.raises(httpx2.TransportError):
            httpx2.post(server.base_url + "/v1/chat/completions", json=body, headers=http.headers, timeout=60)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: scrape(server).value("polyvox_num_requests_running", model_name="slow") == 4)
    dying = workers(server)
    for process in dying:
        process.kill()
    for thread in threads:
        thread.join()
    eventually(lambda: len(workers(server)) == 2 and not set(workers(server)) & set(dying))
    # Each replacement clears what its predecessor had under way as it starts, and another may answer meanwhile.
    eventually(lambda: scrape(server).value("polyvox_num_requests_running") == 0)
    assert scrape(server).value("polyvox_requests_total", model_name="fast") == before.value(
        "polyvox_requests_total", model_name="fast"
    )


# Keys


def test_metrics_need_a_key_where_keys_are_set(server: Server):
    assert httpx2.get(server.base_url + "/metrics", timeout=60).status_code == 401


def test_metrics_are_public_where_the_configuration_says_so(tmp_path: Path):
    configuration = {
        "server": {"api_keys": [KEY], "metrics_public": True},
        "models": {"fast": {"engine": {"simulator": FAST}}},
    }
    with serve(configuration, tmp_path) as running:
        assert httpx2.get(running.base_url + "/metrics", timeout=60).status_code == 200
        assert httpx2.get(running.base_url + "/v1/models", timeout=60).status_code == 401


@pytest.mark.parametrize("path", ["/admin/", "/admin/keys", "/admin/%2e%2e/v1/models"])
def test_admin_paths_take_admin_keys_only(server: Server, path: str):
    def status(key: str) -> int:
        return httpx2.get(server.base_url + path, headers={"authorization": f"Bearer {key}"}, timeout=60).status_code

    assert [status(KEY), status("nope"), status(ADMIN_KEY)] == [401, 401, 404]


def test_no_key_is_in_the_metrics(server: Server):
    assert KEY not in repr(scrape(server))
    assert ADMIN_KEY not in repr(scrape(server))
