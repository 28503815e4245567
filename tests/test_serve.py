"""`polyvox serve` as its users meet it: real processes and sockets, simulator engines, the OpenAI SDK."""

import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import psutil
import pytest
from openai import OpenAI

from benchmarks.ports import free_port
from tests.serving import Server, answers, command, eventually, serve, start, stop, wait_until_ready

FAST = {"time_to_first_token": 0.0, "time_per_token": 0.0, "tokens": 8}
SLOW = {"time_to_first_token": 0.0, "time_per_token": 0.05, "tokens": 2000}
KEY = "sk-sentinel-client"
UPSTREAM_KEY = "sk-sentinel-upstream"


def simulator(**settings: object) -> dict[str, dict[str, object]]:
    return {"engine": {"simulator": {**FAST, **settings}, "restart": {"first_delay": 0.1}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Fast and slow simulators, one that does not start in time, and endpoints: one that lives, one that does not."""
    port = free_port()
    lives = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": UPSTREAM_KEY, "model": "remote-name"}
    configuration = {
        "server": {"port": 0, "api_keys": [KEY], "max_body_bytes": 65536, "workers": 2},
        "models": {
            "fast": simulator(),
            "slow": simulator(**SLOW),
            "twice": {"engine": {"simulator": FAST, "replicas": 2}},
            "never": {"engine": {"simulator": {**FAST, "startup": 3600}, "autostart": False}},
            "remote": {"endpoints": [lives]},
            "nowhere": {"endpoints": [{"base_url": f"http://127.0.0.1:{free_port()}/v1"}]},
        },
        "aliases": {"gpt-4o": "fast", "org/name": "slow"},
    }
    upstream = psutil.Popen(
        [sys.executable, "-m", "engines.simulator", "--model", "remote-name", "--port", str(port),
         "--time-to-first-token", "0", "--time-per-token", "0", "--tokens", "8"]
    )  # fmt: skip
    with httpx2.Client(timeout=60) as probe:
        eventually(lambda: answers(probe, f"http://127.0.0.1:{port}/health"))
    try:
        running = start(configuration, folder)
        eventually(lambda: _states(running) == {*EVERY_READY, "never/0 stopped"}, message=running.log)
        yield running
        stop(running)
    finally:
        upstream.terminate()
        upstream.wait()


EVERY_READY = {"fast/0 ready", "slow/0 ready", "twice/0 ready", "twice/1 ready"}


def load(server: Server, model: str) -> None:
    """Have the engine of a model start."""
    transport = httpx2.HTTPTransport(uds=str(server.paths.control_socket))
    with httpx2.Client(transport=transport, timeout=60) as client:
        client.post("http://control/engines/load", json={"model": model}).raise_for_status()


def _states(server: Server) -> set[str]:
    try:
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(server.paths.control_socket)), timeout=60) as client:
            return {f"{e['id']} {e['state']}" for e in client.get("http://control/fleet").json()["engines"]}
    except httpx2.TransportError:
        assert server.process.poll() is None, server.log()
        return set()


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=server.base_url, headers=headers, timeout=60) as client:
        yield client


ASK = [{"role": "user", "content": "What is the capital of France?"}]


def received(server: Server, model: str) -> dict[str, object]:
    """Return the last request for a model that reached the engine of `model`."""
    with server.engine_client(model) as engine:
        return engine.get("/simulator/requests").json()[-1]


# Answers


def test_a_chat_is_answered_by_the_model_that_was_named(sdk: OpenAI):
    answer = sdk.chat.completions.create(model="fast", messages=ASK)
    assert answer.model == "fast"
    assert answer.choices[0].finish_reason


def test_an_alias_is_answered_under_its_own_name_plain_and_streamed(sdk: OpenAI):
    assert sdk.chat.completions.create(model="gpt-4o", messages=ASK).model == "gpt-4o"
    chunks = list(sdk.chat.completions.create(model="gpt-4o", messages=ASK, stream=True))
    assert {chunk.model for chunk in chunks} == {"gpt-4o"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/responses", {"input": "hi", "stream": True}),
        ("/v1/messages", {"messages": ASK, "max_tokens": 5}),
        ("/v1/messages?beta=true", {"messages": ASK, "max_tokens": 5, "stream": True}),
        ("/v1/embeddings", {"input": "hi"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}),
        ("/tokenize", {"prompt": "hi"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_every_path_reaches_the_engine_and_answers_under_the_alias(http: httpx2.Client, server: Server, path, body):
    answer = http.post(path, json={"model": "gpt-4o", **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-polyvox-model"] == "fast"
    assert answer.headers["x-polyvox-endpoint"] == "fast/0"
    assert '"fast"' not in answer.text


def test_the_events_of_a_streamed_response_stay_whole_under_an_alias(sdk: OpenAI):
    events = list(sdk.responses.create(model="gpt-4o", input="hi", stream=True))
    wrapped = [event.response.model for event in events if hasattr(event, "response")]
    assert len(wrapped) >= 2
    assert set(wrapped) == {"gpt-4o"}


def test_a_form_reaches_the_engine_with_its_file(http: httpx2.Client):
    answer = http.post("/v1/audio/transcriptions", data={"model": "gpt-4o"}, files={"file": ("a.wav", b"x" * 1000)})
    assert answer.status_code == 200
    assert "1000" in answer.text


def test_a_body_reaches_the_engine_as_it_was_sent(http: httpx2.Client, server: Server):
    body = b'{ "model":"fast",  "messages":[{"role":"user","content":"\\u00e9"}], "unknown_field": {"a":[1,2.50]} }'
    http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    salted = str(received(server, "fast")["body"]).encode()
    assert re.sub(rb'"cache_salt":"[0-9a-f]{64}",', b"", salted) == body


def test_a_stream_is_passed_byte_for_byte(http: httpx2.Client, server: Server):
    body = {"model": "fast", "messages": ASK, "stream": True, "seed": 1}
    ids = {"x-request-id": "same"}
    through = http.post("/v1/chat/completions", json=body, headers=ids)
    with server.engine_client("fast") as engine:
        direct = engine.post("/v1/chat/completions", json=body, headers=ids)
    stable = [_without_ids(answer.text) for answer in (through, direct)]
    assert stable[0] == stable[1]
    assert through.headers["content-type"] == direct.headers["content-type"]


def _without_ids(text: str) -> str:
    return re.sub(r'"id":"[^"]*"|"created":\d+', "", text)


def test_an_answer_of_the_engine_that_is_an_error_passes_too(sdk: OpenAI):
    with pytest.raises(openai.BadRequestError):
        sdk.chat.completions.create(model="fast", messages="no list")  # type: ignore[arg-type]


def test_a_model_of_somebody_else_is_asked_by_its_own_name_with_its_own_key(sdk: OpenAI, http: httpx2.Client):
    answer = sdk.chat.completions.with_raw_response.create(model="remote", messages=ASK)
    assert answer.parse().model == "remote"
    assert answer.headers["x-polyvox-endpoint"] == "remote/0"


def test_replicas_share_the_requests(http: httpx2.Client):
    # Of two that are equally good one is taken by chance.
    answers = [http.post("/v1/completions", json={"model": "twice", "prompt": "x"}) for _ in range(40)]
    assert {a.headers["x-polyvox-endpoint"] for a in answers} == {"twice/0", "twice/1"}


# Headers


def test_a_request_id_is_taken_from_the_client_or_made(http: httpx2.Client, server: Server):
    given = http.post("/v1/completions", json={"model": "fast", "prompt": "x"}, headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    made = {http.post("/v1/completions", json={"model": "fast", "prompt": "x"}).headers["x-request-id"] for _ in "12"}
    assert len(made) == 2


def test_a_request_id_that_could_break_a_log_is_not_taken(http: httpx2.Client):
    answer = http.get("/v1/models", headers={"x-request-id": "a" * 1000})
    assert answer.headers["x-request-id"] != "a" * 1000


def test_the_key_of_the_client_never_reaches_an_engine(http: httpx2.Client, server: Server):
    http.post("/v1/completions", json={"model": "fast", "prompt": "x"}, headers={"x-api-key": KEY, "cookie": "c=1"})
    headers = json.dumps(received(server, "fast")["headers"])
    for hidden in (KEY, "cookie", "x-api-key"):
        assert hidden not in headers


# Errors: one for each typed exception of the SDK


def test_an_unknown_model_is_not_found_with_what_comes_close(sdk: OpenAI):
    with pytest.raises(openai.NotFoundError, match="Did you mean 'fast'") as caught:
        sdk.chat.completions.create(model="fas", messages=ASK)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("body", [b"{", b'{"model": 5, "messages": []}', b'{"messages": []}', b"[]", b"\xff"])
def test_a_body_that_cannot_be_read_is_a_bad_request(http: httpx2.Client, body):
    answer = http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_bad_request_is_the_typed_exception_of_the_sdk(sdk: OpenAI):
    with pytest.raises(openai.BadRequestError, match="model"):
        sdk.chat.completions.create(model=None, messages=ASK)  # type: ignore[call-overload]


def test_a_wrong_key_is_an_authentication_error(server: Server):
    with OpenAI(base_url=f"{server.base_url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as caught:
            stranger.chat.completions.create(model="fast", messages=ASK)
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/fast", "/tokenize", "/nope"])
def test_nothing_but_health_is_shown_without_a_key(server: Server, path):
    assert httpx2.get(server.base_url + path, timeout=60).status_code == 401


def test_health_and_ready_need_no_key(server: Server):
    assert httpx2.get(server.base_url + "/health", timeout=60).json() == {"status": "ok"}
    assert httpx2.get(server.base_url + "/ready", timeout=60).json()["status"] == "ready"


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/chat/completions"), ("POST", "/v1/models")])
def test_a_wrong_method_says_which_is_right(http: httpx2.Client, method, path):
    answer = http.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] in ("GET", "POST")
    assert answer.json()["error"]["code"] == "method_not_supported"


def test_a_wrong_path_is_not_found_and_names_the_right_one(http: httpx2.Client):
    answer = http.post("/v1/chat/completion", json={})
    assert answer.status_code == 404
    assert "/v1/chat/completions" in answer.json()["error"]["message"]


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_that_is_too_large_is_refused_with_the_limit(http: httpx2.Client, chunked):
    content = iter([b"x" * 40000] * 2) if chunked else b"x" * 80000
    answer = http.post("/v1/chat/completions", content=content)
    assert answer.status_code == 413
    assert "65536" in answer.json()["error"]["message"]


def test_the_errors_of_the_messages_api_are_read_by_both_kinds_of_clients(http: httpx2.Client):
    answer = http.post("/v1/messages", json={"model": "nope"}).json()
    assert answer["type"] == "error"
    assert answer["error"]["type"]
    assert answer["error"]["code"] == "model_not_found"


def test_an_endpoint_that_cannot_be_reached_is_a_bad_gateway_without_its_address(sdk: OpenAI):
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.chat.completions.create(model="nowhere", messages=ASK)
    assert caught.value.status_code == 502
    assert "127.0.0.1" not in str(caught.value)


def test_an_engine_that_is_stopped_is_unavailable_with_retry_after(http: httpx2.Client):
    answer = http.post("/v1/completions", json={"model": "never", "prompt": "x"})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "model_not_available"


def test_a_stream_that_breaks_ends_in_an_error_and_never_in_done(http: httpx2.Client, server: Server):
    with server.engine_client("fast") as engine:
        engine.post("/simulator/faults", json={"cut_after": 3}).raise_for_status()
    answer = http.post("/v1/chat/completions", json={"model": "fast", "messages": ASK, "stream": True})
    assert answer.status_code == 200
    assert "[DONE]" not in answer.text
    last = answer.text.strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "upstream_error"


# Models


def test_models_and_aliases_are_listed_with_context_length_and_state(sdk: OpenAI):
    listed = {model.id: model.model_dump() for model in sdk.models.list()}
    ours = {"fast", "slow", "twice", "never", "remote", "nowhere", "gpt-4o", "org/name"}
    assert set(listed) == ours | {"auto", "auto:cheap", "auto:best", "auto:fast"}
    assert listed["fast"]["state"] == "ready"
    assert listed["fast"]["max_model_len"] == 32768
    assert listed["gpt-4o"]["root"] == "fast"
    assert listed["never"]["state"] == "stopped"


@pytest.mark.parametrize("name", ["fast", "gpt-4o", "org/name"])
def test_one_model_can_be_retrieved_also_with_a_slash_in_its_name(sdk: OpenAI, name):
    assert sdk.models.retrieve(name).id == name


def test_a_model_that_is_not_there_cannot_be_retrieved(sdk: OpenAI):
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("nope")


# Clients that go away


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_the_generation(server: Server, stream):
    body = json.dumps({"model": "slow", "messages": ASK, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    with socket.create_connection(("127.0.0.1", int(server.base_url.rsplit(":", 1)[1]))) as client:
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        eventually(lambda: server.gauge("slow", "vllm:num_requests_running") == 1)
        if stream:
            assert b"data: " in client.recv(65536) + client.recv(65536)
    eventually(lambda: server.gauge("slow", "vllm:num_requests_running") == 0)


def test_a_hundred_clients_are_served_at_once(http: httpx2.Client, server: Server):
    statuses = []

    def ask() -> None:
        answer = httpx2.post(
            server.base_url + "/v1/chat/completions",
            json={"model": "gpt-4o", "messages": ASK, "stream": True},
            headers={"authorization": f"Bearer {KEY}"},
            timeout=60,
        )
        statuses.append((answer.status_code, answer.text.strip().endswith("[DONE]")))

    threads = [threading.Thread(target=ask) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [(200, True)] * 100


# Workers


def test_ctrl_c_on_a_terminal_reaches_the_parent_alone(server: Server):
    ours = os.getpgid(server.process.pid)
    children = server.process.children()
    assert len(children) > 2
    assert [command(p) for p in children if os.getpgid(p.pid) == ours] == []


def test_a_worker_that_dies_is_replaced_and_engines_do_not_notice(server: Server, http: httpx2.Client):
    def workers() -> set[int]:
        return {p.pid for p in server.process.children() if "proxy.worker" in command(p)}

    engines = {e.id: e.pid for e in server.fleet().values()}
    before = workers()
    assert len(before) == 2
    psutil.Process(min(before)).kill()
    eventually(lambda: len(workers()) == 2 and workers() != before)
    eventually(lambda: answers(http, "/v1/models"))
    assert {e.id: e.pid for e in server.fleet().values()} == engines


# Secrets


def test_no_secret_is_in_what_the_server_shows(server: Server, http: httpx2.Client, folder: Path):
    shown = [http.get(path).text for path in ("/v1/models", "/ready", "/health", "/nope")]
    shown += [http.post("/v1/completions", json={"model": m}).text for m in ("remote", "nowhere", "nope", "never")]
    shown += _what_a_server_says_to_the_confused(server, http)
    shown += [repr(server.fleet()), server.log()]
    shown += [file.read_text(errors="replace") for file in server.paths.logs.glob("*.log")]
    for p in (server.process, *server.process.children(recursive=True)):
        shown += [command(p), json.dumps(p.environ())]
    assert not [text for text in shown if KEY in text or UPSTREAM_KEY in text]


def _what_a_server_says_to_the_confused(server: Server, http: httpx2.Client) -> list[str]:
    """Return answers to requests that carry the key where it does not belong, and that break something."""
    answers = [
        http.post(f"/v1/{KEY[:3]}", json={"model": "fast"}),
        http.post("/v1/completions", content=b'{"model": "fast", "n": 10000}'),
        http.post("/v1/completions", json={"model": "fast", "prompt": "x", "chat_template": "x"}),
        http.post("/v1/completions", content=b"{" * 100),
        http.get("/metrics"),
        httpx2.get(server.base_url + "/v1/models", headers={"x-api-key": "wrong"}, timeout=60),
    ]
    with server.engine_client("fast") as engine:
        engine.post("/simulator/faults", json={"error": 500}).raise_for_status()
        answers += [http.post("/v1/completions", json={"model": "fast", "prompt": "x"}), engine.get("/metrics")]
        answers.append(engine.get("/simulator/requests"))  # what reached the engine
    return [answer.text + str(answer.headers) for answer in answers]


# Starting and stopping


def test_a_request_waits_for_an_engine_that_is_starting(tmp_path: Path):
    late = simulator(startup=1.5)
    late["engine"]["autostart"] = False
    running = start({"models": {"late": late}}, tmp_path)
    try:
        with httpx2.Client(base_url=running.base_url, timeout=60) as client:
            eventually(lambda: answers(client, "/health"), message=running.log)
            assert client.get("/ready").status_code == 503
            load(running, "late")
            eventually(lambda: client.get("/ready").json()["models"]["late"]["state"] != "stopped")
            assert client.post("/v1/completions", json={"model": "late", "prompt": "x"}).status_code == 200
            assert client.get("/ready").status_code == 200
    finally:
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0, running.log()


def test_why_an_engine_failed_is_told_to_its_owner_and_not_to_clients(tmp_path: Path):
    configuration = {
        "models": {"lost": {"engine": {"weights": "/no/such/folder", "devices": "cpu", "dtype": "float32"}}}
    }
    running = start(configuration, tmp_path)
    try:
        eventually(lambda: "lost/0 failed" in _states(running), message=running.log)
        with httpx2.Client(base_url=running.base_url, timeout=60) as client:
            eventually(lambda: client.get("/ready").json()["models"]["lost"]["state"] == "failed")
            shown = client.get("/ready").text + client.post("/v1/completions", json={"model": "lost"}).text
        assert "there is no folder /no/such/folder" in running.fleet()["lost"].detail
        assert "/no/such" not in shown
        assert "model_not_available" in shown
    finally:
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0, running.log()


def test_a_request_that_waits_too_long_is_told_to_come_back(tmp_path: Path):
    configuration = {"models": {"late": simulator(startup=3600)}, "server": {"start_wait": 0.1}}
    running = start(configuration, tmp_path)
    try:
        with httpx2.Client(base_url=running.base_url, timeout=60) as client:
            eventually(lambda: answers(client, "/health"), message=running.log)
            answer = client.post("/v1/completions", json={"model": "late", "prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")
        assert int(answer.headers["retry-after"]) > 0
    finally:
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0, running.log()


def test_requests_in_flight_finish_when_the_server_is_told_to_stop(tmp_path: Path):
    configuration = {"models": {"slow": simulator(time_per_token=0.05, tokens=80)}}
    with serve(configuration, tmp_path) as running, httpx2.Client(base_url=running.base_url, timeout=60) as client:
        answers: list[httpx2.Response] = []

        def ask() -> None:
            body = {"model": "slow", "messages": ASK, "stream": True}
            answers.append(client.post("/v1/chat/completions", json=body))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: running.gauge("slow", "vllm:num_requests_running") == 4)
        footprint = running.footprint()
        running.process.send_signal(signal.SIGTERM)
        eventually(lambda: not _connects(running))
        for thread in threads:
            thread.join()
        assert running.process.wait(60) == 0
        assert footprint.alive() == []
    assert [(a.status_code, a.text.strip().endswith("[DONE]")) for a in answers] == [(200, True)] * 4


def _connects(server: Server) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", int(server.base_url.rsplit(":", 1)[1]))) == 0


def test_a_second_signal_ends_everything_at_once(tmp_path: Path):
    running = start({"models": {"slow": simulator(**SLOW)}}, tmp_path)
    wait_until_ready(running)
    footprint = running.footprint()
    ends: list[object] = []

    def ask() -> None:
        try:
            body = {"model": "slow", "prompt": "x", "max_tokens": 2000}
            ends.append(httpx2.post(running.base_url + "/v1/completions", json=body, timeout=60).status_code)
        except httpx2.TransportError as e:
            ends.append(type(e))

    thread = threading.Thread(target=ask)
    thread.start()
    eventually(lambda: running.gauge("slow", "vllm:num_requests_running") == 1)
    running.process.send_signal(signal.SIGINT)
    eventually(lambda: "stopping" in running.log())
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(60) == 0
    thread.join()
    assert len(ends) == 1
    assert ends[0] != 200
    assert footprint.alive() == []


def test_the_death_of_the_parent_leaves_no_process(tmp_path: Path):
    running = start({"models": {"fast": simulator()}, "server": {"workers": 2}}, tmp_path)
    wait_until_ready(running)
    footprint = running.footprint()
    running.process.kill()
    running.process.wait()
    eventually(lambda: footprint.alive() == [])
