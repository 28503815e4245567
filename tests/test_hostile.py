"""What a hostile client, or a hostile upstream, cannot do to a running server."""

import contextlib
import http.server
import json
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.serving import Server, eventually, serve, start

KEY, OTHER = "sk-sentinel-one", "sk-sentinel-two"
UPSTREAM_KEY = "sk-sentinel-upstream"
FAST = {"time_to_first_token": 0.0, "time_per_token": 0.0, "tokens": 4}
ASK = [{"role": "user", "content": "hi"}]
AUTH = f"authorization: Bearer {KEY}\r\n"


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the user asks for, and tells all it knows."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        status = int(json.loads(body)["user"])
        told = f"Traceback /usr/lib/secret.py at 10.1.2.3: {self.headers['authorization']}".encode()
        self.send_response(status)
        self.send_header("content-type", "text/plain")
        self.send_header("content-length", str(len(told)))
        self.send_header("location", "http://10.1.2.3/internal")
        self.send_header("set-cookie", "session=upstream")
        self.send_header("x-polyvox-endpoint", "forged")
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: object) -> None:
        pass


class Upstreams(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A connection that is given up is no failure of the test."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    upstream = Upstreams(("127.0.0.1", 0), Upstream)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    endpoint = {"base_url": f"http://127.0.0.1:{upstream.server_port}/v1", "api_key": UPSTREAM_KEY}
    configuration = {
        "server": {"api_keys": [KEY, OTHER], "media_domains": ["img.example.com"]},
        "limits": {"n": 2, "messages": 50},
        "models": {
            "fast": {"engine": {"simulator": FAST}},
            "open": {"engine": {"simulator": FAST}, "allow": ["chat_template"]},
            "remote": {"endpoints": [endpoint]},
        },
        "aliases": {"alias": "fast"},
    }
    with serve(configuration, tmp_path_factory.mktemp("hostile")) as running:
        yield running
    upstream.shutdown()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.base_url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as c:
        yield c


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.base_url.rsplit(":", 1)[1])), timeout=60)


def read_all(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            data += chunk
    return data


def exchange(server: Server, request: bytes) -> bytes:
    with connect(server) as connection:
        connection.sendall(request)
        return read_all(connection)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def received(server: Server, model: str) -> list[dict[str, str]]:
    with server.engine_client(model) as engine:
        return engine.get("/simulator/requests").json()


# Keys

PATHS = [
    "/v1/models", "//v1/models", "/v1/../v1/models", "/health/../v1/models", "/health/..%2fv1/models", "/v1/models/",
    "/%76%31/models", "/v1/models;x", "/V1/MODELS", "/v1/models?key=1", "/v1/./models", "/health%2f..%2fv1%2fmodels",
    "/v1/models%00", "/v1/chat/completions", "/metrics", "/tokenize", "/docs", "/schema", "/openapi.json", "/",
    "/v1/models/fast", "/health/x", "/healthz", "/ready/x", "/v1/health", "http://localhost/v1/models",
    "http://127.0.0.1:1/health/../v1/models",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS", "HEAD", "DELETE"])
@pytest.mark.parametrize("target", PATHS)
def test_no_spelling_of_a_path_and_no_method_gets_past_the_key(server: Server, method, target):
    forged = (
        "x-forwarded-for: 127.0.0.1\r\nx-forwarded-host: localhost\r\nx-original-url: /health\r\nx-real-ip: ::1\r\n"
    )
    host = "host: localhost\r\nconnection: close\r\n"
    answer = exchange(server, f"{method} {target} HTTP/1.1\r\n{host}{forged}content-length: 0\r\n\r\n".encode())
    assert status_of(answer) == 401
    assert b"fast" not in answer


@pytest.mark.parametrize(
    "value",
    [b"Bearer ' OR 1=1 --", b'Bearer "', b"Bearer \xff\xfe", b"Bearer " + b"k" * 65536, b"Bearer", b"", b"Basic eDp5",
     b"Bearer sk-sentinel-on", b"Bearer sk-sentinel-one1", b"Bearer {{7*7}}", b"Bearer null", b"Bearer undefined"],
)  # fmt: skip
def test_every_wrong_key_gets_the_same_answer(server: Server, value):
    head = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: same\r\n"
    answers = [exchange(server, head + b"authorization: " + v + b"\r\n\r\n") for v in (value, b"Bearer wrong")]
    first, second = (answer.split(b"\r\n\r\n", 1)[1] for answer in answers)
    assert [status_of(answer) for answer in answers] == [401, 401]
    assert first == second


def test_a_key_with_a_nul_is_not_http(server: Server):
    assert status_of(exchange(server, b"GET / HTTP/1.1\r\nhost: x\r\nauthorization: Bearer a\x00b\r\n\r\n")) == 400


def test_a_wrong_key_is_refused_before_the_body_is_read(server: Server):
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer no\r\ncontent-length: 30000000\r\n\r\n"
    )
    with connect(server) as connection:
        connection.sendall(head)
        assert status_of(connection.recv(65536)) == 401


def test_a_key_in_a_trailer_is_no_key(server: Server):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    body = b'{"model":"fast","prompt":"x"}'
    answer = exchange(server, head + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, AUTH.encode()))
    assert status_of(answer) == 401


# Smuggling

POST = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{AUTH}".encode()
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
MALFORMED = {
    "a length and a coding": POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a coding and a length": POST + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"content-length: 4\r\ncontent-length: 5\r\n\r\naaaa",
    "the same length twice": POST + b"content-length: 4\r\ncontent-length: 4\r\n\r\naaaa",
    "a list of lengths": POST + b"content-length: 4, 4\r\n\r\naaaa",
    "a length with a sign": POST + b"content-length: +4\r\n\r\naaaa",
    "a negative length": POST + b"content-length: -4\r\n\r\naaaa",
    "a length beyond all numbers": POST + b"content-length: 99999999999999999999999\r\n\r\n",
    "an unknown coding": POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two codings": POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a coding twice": POST + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a coding in HTTP/1.0": POST.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a negative chunk": CHUNKED + b"-1\r\n\r\n",
    "a chunk in hex with a prefix": CHUNKED + b"0x4\r\naaaa\r\n0\r\n\r\n",
    "a chunk beyond all numbers": CHUNKED + b"fffffffffffffffff\r\na",
    "a chunk that is longer than it says": CHUNKED + b"2\r\naaaa\r\n0\r\n\r\n",
    "a chunk ended by a line feed": CHUNKED + b"4\naaaa\r\n0\r\n\r\n",
    "a folded header": POST + b"x-a: b\r\n c\r\n\r\n",
    "a space before a colon": POST + b"content-length : 4\r\n\r\naaaa",
    "a header without a name": POST + b": a\r\n\r\n",
    "a header without a colon": POST + b"abc\r\n\r\n",
    "a lone line feed in a header": POST + b"x-a: b\ncontent-length: 4\r\n\r\n",
    "a lone carriage return in a header": POST + b"x-a: b\rcontent-length: 4\r\n\r\n",
    "a NUL in a header": POST + b"x-a: \x00\r\n\r\n",
    "line feeds only": POST.replace(b"\r\n", b"\n") + b"\n",
    "two hosts": POST + b"host: y\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/2 without asking": b"GET /health HTTP/2.0\r\nhost: x\r\n\r\n",
    "HTTP/2's greeting": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100a1010000"),
    "a target that is no path": b"GET v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    "a tunnel": b"CONNECT 10.0.0.1:443 HTTP/1.1\r\nhost: x\r\n\r\n",
    "an unknown method": b"GETS /health HTTP/1.1\r\nhost: x\r\n\r\n",
    "a space in the target": b"GET /health HTTP/1.1 HTTP/1.1\r\nhost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_could_be_read_in_two_ways_is_refused_and_the_connection_ended(server: Server, name):
    smuggled = f"GET /v1/models HTTP/1.1\r\nhost: x\r\n{AUTH}\r\n".encode()
    answer = exchange(server, MALFORMED[name] + smuggled)
    assert status_of(answer) == 400
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"fast" not in answer
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["type"] == "invalid_request_error"


def test_a_broken_chunk_after_a_good_beginning_reaches_no_engine(server: Server):
    before = len(received(server, "fast"))
    answer = exchange(server, CHUNKED + b'1d\r\n{"model":"fast","prompt":"x"}\r\nzz\r\n')
    assert status_of(answer) == 400
    assert len(received(server, "fast")) == before


def test_a_header_cannot_be_put_into_what_reaches_an_engine(server: Server, client: httpx2.Client):
    injected = "a\tb%0d%0ax-injected: 1"
    client.post("/v1/completions?x=%0d%0ax-injected:1", json={"model": "fast", "prompt": "x"},
                headers={"traceparent": injected, "x-injected": "1", "connection": "x-request-id"})  # fmt: skip
    assert "x-injected" not in [name for name, _ in received(server, "fast")[-1]["headers"]]


def test_an_endless_head_is_refused(server: Server):
    with connect(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x-a: " + b"y" * 400_000)
        assert status_of(read_all(connection)) == 431


def test_an_upgrade_is_not_taken_and_nothing_behind_it_is_read(server: Server):
    upgrade = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
    answer = exchange(server, upgrade + f"GET /v1/models HTTP/1.1\r\nhost: x\r\n{AUTH}\r\n".encode())
    assert status_of(answer) == 200
    assert b"fast" not in answer


# Bombs and forbidden fields


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 1000}, "n"),
        ({"messages": ASK * 51}, "messages"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"api_base": "http://10.0.0.1"}, "api_base"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://[::1]/"}}]}]},
         "image_url"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", ["fast", "alias"])
def test_what_is_refused_never_reaches_the_engine(server: Server, client: httpx2.Client, fields, param, model):
    before = len(received(server, "fast"))
    answer = client.post("/v1/chat/completions", json={"model": model, "messages": ASK, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert len(received(server, "fast")) == before
    assert client.post("/v1/chat/completions", json={"model": model, "messages": ASK}).status_code == 200


def test_a_model_may_allow_a_field(client: httpx2.Client):
    body = {"model": "open", "messages": ASK, "chat_template": "{{ 1 }}"}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_a_body_nested_too_deeply_is_refused(client: httpx2.Client):
    for depth in (200, 100_000):
        body = b'{"model":"fast","messages":[],"x":' + b"[" * depth + b"]" * depth + b"}"
        assert client.post("/v1/chat/completions", content=body).status_code == 400


# Tenants


def salt(server: Server) -> str:
    return json.loads(received(server, "fast")[-1]["body"])["cache_salt"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
                                  "/v1/embeddings", "/v1/rerank", "/v1/score"])  # fmt: skip
def test_each_key_has_its_own_part_of_the_cache_and_cannot_choose_anothers(server: Server, path):
    body = {"model": "fast", "messages": ASK, "prompt": "x", "input": "x", "max_tokens": 4, "query": "x",
            "documents": ["x"], "text_1": "x", "text_2": "y"}  # fmt: skip
    salts = []
    for key, extra in ((KEY, {}), (OTHER, {}), (KEY, {})):
        told = {"x-api-key": key, "cache-control": "no-store"}  # each of them is to reach the engine
        httpx2.post(server.base_url + path, json={**body, **extra}, headers=told, timeout=60)
        salts.append(salt(server))
    httpx2.post(server.base_url + path, json={**body, "cache_salt": salts[0]}, headers={"x-api-key": OTHER}, timeout=60)
    assert salts[0] == salts[2] != salts[1]
    assert salt(server) not in salts
    assert salt(server).startswith(salts[1])
    assert KEY not in salts[0]


def test_requests_that_take_no_salt_get_none(server: Server, client: httpx2.Client):
    client.post("/tokenize", json={"model": "fast", "prompt": "x"})
    assert "cache_salt" not in received(server, "fast")[-1]["body"]


# A hostile upstream


@pytest.mark.parametrize(
    ("status", "told"), [(500, 500), (503, 503), (599, 599), (301, 502), (307, 502), (401, 502), (403, 502), (400, 400)]
)
def test_an_error_of_an_upstream_tells_no_path_address_or_key(client: httpx2.Client, status, told):
    body = {"model": "remote", "messages": ASK, "user": str(status)}
    answer = client.post("/v1/chat/completions", json=body, follow_redirects=False)
    assert answer.status_code == told
    shown = answer.text + str(answer.headers)
    assert UPSTREAM_KEY not in shown
    for header in ("location", "set-cookie"):
        assert header not in answer.headers
    assert answer.headers.get("x-polyvox-endpoint") in (None, "remote/0")
    if told != 400:
        assert "Traceback" not in shown
        assert "10.1.2.3" not in shown
        assert answer.json()["error"]["type"] == "server_error"


def test_an_internal_error_of_an_engine_of_ours_is_told_without_its_words(server: Server, client: httpx2.Client):
    with server.engine_client("fast") as engine:
        engine.post("/simulator/faults", json={"error": 500}).raise_for_status()
    answer = client.post("/v1/chat/completions", json={"model": "fast", "messages": ASK})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "upstream_error")


def test_none_of_this_is_in_the_log_with_a_key_or_a_traceback(server: Server):
    assert "sk-sentinel" not in server.log()
    assert "Traceback" not in server.log()


# Slow clients


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    timeouts = {"head_timeout": 1.0, "body_timeout": 1.0}
    configuration = {"server": {"api_keys": [KEY], **timeouts}, "models": {"fast": {"engine": {"simulator": FAST}}}}
    with serve(configuration, tmp_path_factory.mktemp("impatient")) as running:
        yield running


def trickle(connection: socket.socket, first: bytes) -> bytes:
    """Send a byte again and again until there is an answer; return all of it."""
    connection.sendall(first)
    connection.settimeout(0.05)
    with contextlib.suppress(ConnectionError):
        for _ in range(400):
            connection.sendall(b"a")
            with contextlib.suppress(TimeoutError):
                if begun := connection.recv(65536):
                    return begun + read_all(connection)
                return b""
    raise AssertionError("the server never lost its patience")


def test_a_head_that_comes_a_byte_at_a_time_is_timed_out(impatient: Server):
    with connect(impatient) as connection:
        answer = trickle(connection, b"GET /health HTTP/1.1\r\nhost: ")
    assert status_of(answer) == 408
    assert b"server.head_timeout" in answer


@pytest.mark.parametrize("framing", [b"content-length: 100000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\nfffff\r\n"])
def test_a_body_that_comes_a_byte_at_a_time_is_timed_out(impatient: Server, framing):
    with connect(impatient) as connection:
        answer = trickle(connection, POST + framing)
    assert status_of(answer) == 408
    assert b"server.body_timeout" in answer
    assert not received(impatient, "fast")


def test_a_client_that_sends_nothing_is_hung_up_on_without_a_word(impatient: Server):
    with connect(impatient) as connection:
        assert read_all(connection) == b""


def test_a_second_head_that_comes_slowly_is_timed_out_too(impatient: Server):
    with connect(impatient) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert status_of(connection.recv(65536)) == 200
        assert status_of(trickle(connection, b"GET /he")) == 408


def test_an_answer_may_take_longer_than_a_request(tmp_path: Path):
    engine = {"simulator": {"time_to_first_token": 0.0, "time_per_token": 0.1, "tokens": 20}}
    server = {"head_timeout": 0.5, "body_timeout": 0.5}
    with (
        serve({"server": server, "models": {"slow": {"engine": engine}}}, tmp_path) as running,
        httpx2.Client(base_url=running.base_url, timeout=60) as client,
    ):
        for _ in "12":
            body = {"model": "slow", "prompt": "x", "stream": True}
            assert client.post("/v1/completions", json=body).text.rstrip().endswith("[DONE]")


def test_a_thousand_idle_connections_do_not_stop_others(server: Server, client: httpx2.Client):
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with contextlib.ExitStack() as stack:
        for i in range(1000):
            idle = stack.enter_context(connect(server))
            idle.sendall(b"" if i % 2 else b"POST /v1/completions HTTP/1.1\r\n")
        for _ in range(10):
            answer = client.post("/v1/chat/completions", json={"model": "fast", "messages": ASK})
            assert answer.status_code == 200


def test_new_clients_take_the_places_of_idle_ones_when_all_are_taken(tmp_path: Path):
    configuration = {"server": {"max_connections": 4, "head_timeout": 3600.0}, "models": {}}
    running = start(configuration, tmp_path)
    try:
        eventually(lambda: _healthy(running), message=running.log)
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(connect(running))
            eventually(lambda: _healthy(running))
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                busy = stack.enter_context(connect(running))
                busy.sendall(POST + b"expect: 100-continue\r\ncontent-length: 10\r\n\r\n")
                assert status_of(busy.recv(65536)) == 100
            refused = stack.enter_context(connect(running))
            assert status_of(read_all(refused)) == 503
    finally:
        running.process.terminate()
        running.process.wait()


def _healthy(server: Server) -> bool:
    try:
        return httpx2.get(server.base_url + "/health", timeout=60).status_code == 200
    except httpx2.TransportError:
        return False
