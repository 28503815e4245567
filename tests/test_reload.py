"""Another configuration for a server that is asked all the while: two workers, real processes and sockets."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from benchmarks.ports import free_port
from tests.scraping import Page
from tests.serving import Server, answers, command, eventually, start, stop, wait_until_ready

KEY, ADMIN = "sk-sentinel-client", "sk-sentinel-admin"
FAST = {"time_to_first_token": 0.0, "time_per_token": 0.0, "tokens": 8}
SLOW = {"time_to_first_token": 0.0, "time_per_token": 0.01, "tokens": 40}
ASK = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
Configuration = dict[str, dict[str, object]]


@contextmanager
def elsewhere(tokens: int) -> Iterator[str]:
    """Run a server of somebody else, which answers with so many tokens."""
    port = free_port()
    words = ["--model", "remote", "--port", str(port), "--tokens", str(tokens), "--time-per-token", "0"]
    process = psutil.Popen([sys.executable, "-m", "engines.simulator", *words])
    try:
        with httpx2.Client(timeout=60) as probe:
            eventually(lambda: answers(probe, f"http://127.0.0.1:{port}/health"))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def remotes() -> Iterator[tuple[str, str]]:
    with elsewhere(3) as one, elsewhere(5) as other:
        yield one, other


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, remotes: tuple[str, str]) -> Iterator[Server]:
    server = start(configuration(remotes), tmp_path_factory.mktemp("reload"))
    wait_until_ready(server)
    yield server
    stop(server)


@pytest.fixture
def server(running: Server, remotes: tuple[str, str]) -> Server:
    """The server as it was at first."""
    configure(running, configuration(remotes))
    return running


def configuration(remotes: tuple[str, str]) -> Configuration:
    return {
        "server": {"workers": 2, "api_keys": [KEY], "admin_keys": [ADMIN], "watch": False},
        "models": {
            "fast": {"engine": {"simulator": FAST}},
            "slow": {"engine": {"simulator": SLOW}},
            "remote": remote(remotes[0]),
        },
        "aliases": {"gpt-4o": "fast"},
        "ledger": False,  # type: ignore[dict-item]
    }


def remote(url: str) -> dict[str, object]:
    return {"endpoints": [{"base_url": url, "model": "remote"}]}


def file(server: Server) -> Path:
    return server.output.parent / "polyvox.yaml"


def reload(server: Server) -> httpx2.Response:
    """Have the server follow its file."""
    transport = httpx2.HTTPTransport(uds=str(server.paths.control_socket))
    with httpx2.Client(transport=transport, base_url="http://control", timeout=60) as client:
        return client.post("/services/reload")


def configure(server: Server, wanted: Configuration) -> dict[str, list[str]]:
    """Give the server a configuration; return what it says has changed."""
    file(server).write_text(json.dumps(wanted))
    answer = reload(server)
    assert answer.status_code == 200, answer.text
    return answer.json()["changes"]


def everywhere(server: Server, ask: Callable[[httpx2.Client], int]) -> set[int]:
    """Return what comes on many connections, for both workers to take some."""
    headers, statuses = {"authorization": f"Bearer {KEY}"}, set()
    for _ in range(12):
        with httpx2.Client(base_url=server.base_url, headers=headers, timeout=60) as client:
            statuses.add(ask(client))
    return statuses


def chat(model: str) -> Callable[[httpx2.Client], int]:
    return lambda client: client.post("/v1/chat/completions", json={"model": model, **ASK}).status_code


def tokens(model: str) -> Callable[[httpx2.Client], int]:
    def ask(client: httpx2.Client) -> int:
        answer = client.post("/v1/chat/completions", json={"model": model, **ASK})
        return int(answer.json()["usage"]["completion_tokens"])

    return ask


def admin(server: Server, method: str, path: str, body: object = None) -> httpx2.Response:
    headers = {"authorization": f"Bearer {ADMIN}"}
    return httpx2.request(method, server.base_url + path, json=body, headers=headers, timeout=60)


def scrape(server: Server) -> Page:
    answer = httpx2.get(server.base_url + "/metrics", headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    return Page.of(answer.raise_for_status().text)


class Load:
    """Clients that ask without a pause, plainly and for streams, each on a connection of its own."""

    def __init__(self, server: Server, *models: str) -> None:
        self.failures: list[str] = []
        self.answered = 0
        self._server, self._over = server, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(m, s)) for m in models for s in (False, True)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        eventually(lambda: self.answered or self.failures)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, model: str, stream: bool) -> None:
        body = {"model": model, "stream": stream, **ASK}
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx2.Client(base_url=self._server.base_url, headers=headers, timeout=60) as client:
            while not self._over.is_set():
                try:
                    answer = client.post("/v1/chat/completions", json=body)
                    good = answer.status_code == 200 and (not stream or answer.text.endswith("data: [DONE]\n\n"))
                    if not good or '"error"' in answer.text:
                        self.failures.append(f"{model} {stream} {answer.status_code} {answer.text[-300:]}")
                except httpx2.TransportError as e:
                    self.failures.append(f"{model} {stream} {e!r}")
                self.answered += 1


def test_no_request_fails_while_the_configuration_changes_again_and_again(server: Server, remotes: tuple[str, str]):
    wanted = configuration(remotes)
    with Load(server, "fast", "slow", "remote", "gpt-4o") as load:
        for i in range(30):
            wanted["aliases"]["gpt-4o"] = ("fast", "slow", "remote")[i % 3]
            wanted["models"]["remote"] = remote(remotes[i % 2])
            wanted["models"][f"new-{i}"] = remote(remotes[0])
            wanted["models"].pop(f"new-{i - 2}", None)
            wanted["models"]["many"] = {"endpoints": remote(remotes[0])["endpoints"] * (1 + i % 3)}
            wanted["server"]["api_keys"] = [KEY, f"sk-other-{i}"]
            configure(server, wanted)
    assert load.failures == []
    assert load.answered > 50


def test_requests_for_a_model_that_is_removed_are_answered_to_their_end(server: Server, remotes: tuple[str, str]):
    wanted, body = configuration(remotes), {"model": "slow", "stream": True, **ASK}
    headers = {"authorization": f"Bearer {KEY}"}
    with (
        httpx2.Client(base_url=server.base_url, headers=headers, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        pieces = answer.iter_raw()
        first = next(pieces)
        del wanted["models"]["slow"]
        assert configure(server, wanted)["removed"] == ["models.slow"]
        assert everywhere(server, chat("slow")) == {404}
        assert (first + b"".join(pieces)).endswith(b"data: [DONE]\n\n")
    eventually(lambda: "slow" not in server.fleet())


def test_a_new_model_answers_and_a_removed_one_is_unknown(server: Server, remotes: tuple[str, str]):
    wanted = configuration(remotes)
    wanted["models"]["new"] = remote(remotes[1])
    assert configure(server, wanted)["added"] == ["models.new"]
    assert everywhere(server, tokens("new")) == {5}
    del wanted["models"]["new"]
    assert configure(server, wanted)["removed"] == ["models.new"]
    assert everywhere(server, chat("new")) == {404}


def test_another_address_of_an_endpoint_is_used_at_once(server: Server, remotes: tuple[str, str]):
    assert everywhere(server, tokens("remote")) == {3}
    wanted = configuration(remotes)
    wanted["models"]["remote"] = remote(remotes[1])
    assert configure(server, wanted)["changed"] == ["models.remote"]
    assert everywhere(server, tokens("remote")) == {5}


def test_an_endpoint_that_was_given_up_is_asked_at_its_new_address(server: Server, remotes: tuple[str, str]):
    wanted = configuration(remotes)
    wanted["models"]["remote"] = remote(f"http://127.0.0.1:{free_port()}/v1")
    configure(server, wanted)
    with ThreadPoolExecutor(4) as pool:
        for statuses in pool.map(lambda _: everywhere(server, chat("remote")), range(4)):
            assert statuses <= {502, 503}
    wanted["models"]["remote"] = remote(remotes[0])
    configure(server, wanted)
    assert everywhere(server, chat("remote")) == {200}


def test_aliases_keys_and_limits_are_those_of_the_newest_configuration(server: Server, remotes: tuple[str, str]):
    wanted = configuration(remotes)
    wanted["aliases"] = {"gpt-5": "remote"}
    wanted["server"]["api_keys"] = [KEY, "sk-second"]
    wanted["limits"] = {"n": 1}
    configure(server, wanted)
    assert everywhere(server, tokens("gpt-5")) == {3}
    assert everywhere(server, chat("gpt-4o")) == {404}
    second = {"authorization": "Bearer sk-second"}
    assert everywhere(server, lambda c: c.get("/v1/models", headers=second).status_code) == {200}
    twice = {"model": "fast", "n": 2, **ASK}
    assert everywhere(server, lambda c: c.post("/v1/chat/completions", json=twice).status_code) == {400}
    configure(server, configuration(remotes))
    assert everywhere(server, lambda c: c.get("/v1/models", headers=second).status_code) == {401}
    assert everywhere(server, chat("gpt-4o")) == {200}


def cached(server: Server, prompt: str) -> set[str]:
    """Return what the cache does for a prompt, on many connections, once each worker has had its turn."""
    headers = {"authorization": f"Bearer {KEY}"}
    body = {"model": "fast", "temperature": 0, "messages": [{"role": "user", "content": prompt}]}

    def ask() -> str:
        url = server.base_url + "/v1/chat/completions"
        return httpx2.post(url, json=body, headers=headers, timeout=20).headers.get("x-polyvox-cache", "none")

    for _ in range(12):
        ask()
    return {ask() for _ in range(6)}


def test_the_cache_is_that_of_the_newest_configuration_and_goes_on_counting(server: Server, remotes: tuple[str, str]):
    wanted = configuration(remotes)
    configure(server, wanted)
    assert cached(server, "kept") == {"hit"}
    hits = admin(server, "GET", "/admin/cache").json()["hit"]
    wanted["cache"] = {"when": "never"}  # type: ignore[dict-item]
    assert configure(server, wanted) == {"added": [], "removed": [], "changed": ["cache.when"], "restart": []}
    assert cached(server, "kept") == {"bypass"}
    assert admin(server, "GET", "/admin/cache").json()["hit"] >= hits
    wanted["cache"] = False  # type: ignore[dict-item]
    configure(server, wanted)
    assert cached(server, "kept") == {"none"}
    assert admin(server, "GET", "/admin/cache").status_code == 404
    configure(server, configuration(remotes))
    assert cached(server, "kept") == {"hit"}


def test_a_generation_that_is_shared_is_ended_well_though_the_cache_becomes_another(
    server: Server, remotes: tuple[str, str]
):
    wanted = configuration(remotes)
    configure(server, wanted)
    body = {"model": "slow", "temperature": 0, "stream": True, **ASK}
    headers, url = {"authorization": f"Bearer {KEY}"}, server.base_url + "/v1/chat/completions"
    with httpx2.stream("POST", url, json=body, headers=headers, timeout=30) as answer:
        pieces = answer.iter_text()
        begun = next(pieces)
        wanted["cache"] = {"ttl": 5}  # type: ignore[dict-item]
        configure(server, wanted)
        assert (begun + "".join(pieces)).endswith("data: [DONE]\n\n")
    configure(server, configuration(remotes))


def test_groups_presets_and_ensembles_come_and_go(server: Server, remotes: tuple[str, str]):
    wanted, system = configuration(remotes), "Answer shortly."
    wanted["aliases"] |= {"both": {"any_of": ["fast", "remote"]}, "short": {"model": "remote", "system": system}}
    wanted["ensembles"] = {"council": {"members": {"fast": 1.0, "remote": 1.0}, "strategy": "first"}}
    said = configure(server, wanted)
    assert said["added"] == ["aliases.both", "aliases.short", "ensembles.council"]
    for name in ("both", "short", "council"):
        assert everywhere(server, chat(name)) == {200}
    counted = 12
    eventually(lambda: scrape(server).value("polyvox_requests_total", model_name="council") == counted)
    assert configure(server, configuration(remotes))["removed"] == said["added"]
    for name in ("both", "short", "council"):
        assert everywhere(server, chat(name)) == {404}
    assert scrape(server).value("polyvox_requests_total", model_name="council") == counted


# Refusals


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("models:\n  fast: {engine: {simulator: {}}}\naliases:\n  a: fats\n", 4, "there is no model 'fats'"),
        ("models:\n  fast:\n    endpoints:\n      - base_url: nonsense\n", 4, "expected http://"),
        ("models: {}\nserver: [\n", 3, "not valid YAML"),
        ("models: {}\nmodles: {}\n", 2, "did you mean 'models'?"),
        ("models:\n  a:\n    endpoints: [{base_url: 'http://x/v1', provider: opnai}]\n", 3, "no provider 'opnai'"),
    ],
)
def test_a_bad_file_is_refused_with_its_line_and_all_is_as_it_was(server: Server, text: str, line: int, problem: str):
    before = scrape(server)
    file(server).write_text(text)
    answer = reload(server)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{file(server)}:{line}: ")
    assert problem in answer.json()["error"]["message"]
    assert everywhere(server, chat("gpt-4o")) == {200}
    page = scrape(server)
    assert page.value("polyvox_config_last_reload_successful") == 0
    for name in ("generation", "last_reload_success_timestamp_seconds"):
        assert page.value(f"polyvox_config_{name}") == before.value(f"polyvox_config_{name}")


def test_what_cannot_change_in_a_running_server_is_named(server: Server, remotes: tuple[str, str]):
    wanted = configuration(remotes)
    wanted["server"] |= {"workers": 5, "host": "127.0.0.2"}
    said = configure(server, wanted)
    assert said["restart"] == ["server.host", "server.workers"]
    assert len([p for p in server.process.children() if "proxy.worker" in command(p)]) == 2


def test_requests_that_wait_for_a_model_are_answered_though_it_is_removed(server: Server, remotes: tuple[str, str]):
    wanted = configuration(remotes)
    again = {"base_url": f"{server.base_url}/v1", "model": "slow", "api_key": KEY, "max_in_flight": 1}
    wanted["models"]["narrow"] = {"endpoints": [again]}
    configure(server, wanted)
    statuses: list[int] = []
    eventually(lambda: server.fleet()["slow"].state == "ready")
    (engine,) = (p for p in server.processes("slow") if "engines.simulator" in command(p) and "--uds" in command(p))

    def ask() -> None:
        with httpx2.Client(base_url=server.base_url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
            statuses.append(chat("narrow")(client))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    engine.suspend()
    try:
        for thread in threads:
            thread.start()
        eventually(lambda: scrape(server).value("polyvox_num_requests_waiting", model_name="narrow") >= 2)
        del wanted["models"]["narrow"]
        configure(server, wanted)
    finally:
        engine.resume()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 6


# How a reload is asked for


def test_the_command_says_what_has_changed_and_refuses_a_bad_file_with_status_2(server: Server, remotes):
    wanted = configuration(remotes)
    wanted["aliases"]["new"] = "fast"
    file(server).write_text(json.dumps(wanted))
    done = polyvox_reload(server)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(": added alias new\n")
    file(server).write_text("models: 1\n")
    refused = polyvox_reload(server)
    assert refused.returncode == 2
    assert f"{file(server)}:1: models: expected a mapping" in refused.stderr


def polyvox_reload(server: Server) -> "subprocess.CompletedProcess[str]":
    words = ["reload", "--state-dir", str(server.output.parent / "state")]
    return subprocess.run([sys.executable, "-m", "proxy", *words], capture_output=True, text=True, timeout=60)


def test_a_hangup_reloads(server: Server, remotes: tuple[str, str]):
    wanted = configuration(remotes)
    wanted["aliases"]["hung-up"] = "fast"
    file(server).write_text(json.dumps(wanted))
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: everywhere(server, chat("hung-up")) == {200})
    assert "added alias hung-up" in server.log()


IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_a_terminal_that_is_closed_ends_the_server_that_was_started_there(tmp_path: Path):
    config, log = tmp_path / "polyvox.yaml", tmp_path / "output"
    config.write_text('{"models": {}, "server": {"port": 0}, "ledger": "off"}')
    ours, theirs = os.openpty()
    words = ["-m", "proxy", "serve", "--config", str(config), "--state-dir", str(tmp_path / "state")]
    with log.open("wb") as output:
        server = psutil.Popen(
            [sys.executable, "-c", IN_TERMINAL, *words],
            stdin=theirs, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    os.close(theirs)
    eventually(lambda: "Polyvox listens on" in log.read_text() or server.poll() is not None)
    below = server.children(recursive=True)
    os.close(ours)
    assert server.wait(60) == 0, log.read_text()
    assert [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def test_a_file_that_changes_is_followed_also_when_another_takes_its_name(server: Server, remotes: tuple[str, str]):
    wanted = configuration(remotes)
    wanted["server"]["watch"] = True
    configure(server, wanted)
    wanted["aliases"]["written"] = "fast"
    file(server).write_text(json.dumps(wanted))
    eventually(lambda: everywhere(server, chat("written")) == {200})
    wanted["aliases"]["renamed"] = "fast"
    new = file(server).with_suffix(".new")
    new.write_text(json.dumps(wanted))
    new.rename(file(server))
    eventually(lambda: everywhere(server, chat("renamed")) == {200})
    file(server).write_text("models: [")
    eventually(lambda: "refused" in server.log() and "not valid YAML" in server.log())
    assert everywhere(server, chat("renamed")) == {200}


# Workers, counts and engines


def test_counts_go_on_and_those_of_a_removed_model_are_kept(server: Server, remotes: tuple[str, str]):
    wanted = configuration(remotes)
    wanted["models"]["passing"] = remote(remotes[0])
    configure(server, wanted)
    name, start = "polyvox_requests_total", scrape(server)

    def asked(model: str) -> float:
        return scrape(server).value(name, model_name=model) - start.value(name, model_name=model)

    everywhere(server, chat("fast")), everywhere(server, chat("passing"))
    eventually(lambda: (asked("fast"), asked("passing")) == (12, 12))  # counted once they are answered
    before = scrape(server)
    configure(server, configuration(remotes))
    everywhere(server, chat("fast"))
    eventually(lambda: asked("fast") == 24)
    page = scrape(server)
    assert page.value(name, model_name="fast") == before.value(name, model_name="fast") + 12
    assert page.value(name, model_name="passing") == before.value(name, model_name="passing") >= 12
    assert page.series("polyvox_num_requests_running", model_name="passing") == []
    configure(server, wanted)
    everywhere(server, chat("passing"))
    assert scrape(server).value(name, model_name="passing") == before.value(name, model_name="passing") + 12


def test_a_worker_that_starts_later_has_the_newest_configuration(server: Server, remotes: tuple[str, str]):
    wanted = configuration(remotes)
    wanted["models"]["newest"] = remote(remotes[0])
    configure(server, wanted)
    before = scrape(server).value("polyvox_requests_total", model_name="fast")
    dying = [p for p in server.process.children() if "proxy.worker" in command(p)]
    for worker in dying:
        worker.kill()
    eventually(lambda: answers(httpx2.Client(timeout=60), f"{server.base_url}/ready"))
    assert everywhere(server, chat("newest")) == {200}
    assert scrape(server).value("polyvox_requests_total", model_name="fast") == before


def test_engines_come_go_and_change_and_the_others_keep_their_process(server: Server, remotes: tuple[str, str]):
    before = server.fleet()["fast"].pid
    wanted = configuration(remotes)
    wanted["models"]["extra"] = {"engine": {"simulator": FAST}}
    wanted["models"]["fast"] = {"engine": {"simulator": FAST, "hang_timeout": 30, "max_in_flight": 7}}
    configure(server, wanted)
    assert everywhere(server, tokens("extra")) == {8}
    wanted["models"]["extra"] = {"engine": {"simulator": {**FAST, "tokens": 2}}}
    configure(server, wanted)
    eventually(lambda: everywhere(server, tokens("extra")) == {2})
    del wanted["models"]["extra"]
    configure(server, wanted)
    eventually(lambda: "extra" not in server.fleet())
    assert server.fleet()["fast"].pid == before


def test_while_the_replicas_of_a_model_change_one_after_the_other_it_answers(server: Server, remotes):
    wanted = configuration(remotes)
    wanted["models"]["twice"] = {"engine": {"simulator": FAST, "replicas": 2}}
    configure(server, wanted)
    eventually(lambda: server.fleet()["twice"].state == "ready")
    with Load(server, "twice") as load:
        wanted["models"]["twice"] = {"engine": {"simulator": {**FAST, "tokens": 2}, "replicas": 2}}
        configure(server, wanted)
        eventually(lambda: everywhere(server, tokens("twice")) == {2})
    assert load.failures == []


# Models put by an administrator

TEXT = """\
# Our server
server:
  workers: 2
  api_keys: ["{key}"]      # the client
  admin_keys: [{admin}]
  watch: false
ledger: off
models:

  fast:                    # quick
    engine:
      simulator: {{tokens: 8, time_per_token: 0, time_to_first_token: 0}}
  remote:
    endpoints:
      - base_url: {remote}   # theirs
        model: remote
        api_key: ${{PATH}}   # not this
aliases: {{gpt-4o: fast}}    # as they know it
"""


def written(server: Server, remotes: tuple[str, str]) -> str:
    text = TEXT.format(key=KEY, admin=ADMIN, remote=remotes[0])
    file(server).write_text(text)
    assert reload(server).status_code == 200
    return text


def test_a_model_that_is_put_answers_and_is_in_the_file_whose_comments_stay(server: Server, remotes: tuple[str, str]):
    text = written(server, remotes)
    answer = admin(server, "PUT", "/admin/models/org%2Fnew", remote(remotes[1]))
    assert answer.status_code == 200, answer.text
    assert answer.json()["changes"]["added"] == ["models.org/new"]
    assert everywhere(server, tokens("org/new")) == {5}
    now = file(server).read_text()
    assert [line for line in text.splitlines() if line not in now.splitlines()] == []
    assert len(now.splitlines()) == len(text.splitlines()) + 4


def test_a_model_that_is_put_anew_is_changed_in_its_place(server: Server, remotes: tuple[str, str]):
    text = written(server, remotes)
    shown = admin(server, "GET", "/admin/models/remote").json()["settings"]
    assert shown["endpoints"][0]["api_key"] == "${PATH}"
    body = {"endpoints": [{"base_url": remotes[1], "model": "remote", "api_key": "***"}]}
    assert admin(server, "PUT", "/admin/models/remote", body).status_code == 200
    assert everywhere(server, tokens("remote")) == {5}
    assert file(server).read_text() == text.replace(remotes[0], remotes[1])


def test_a_model_that_is_deleted_is_gone_from_the_file(server: Server, remotes: tuple[str, str]):
    written(server, remotes)
    assert admin(server, "DELETE", "/admin/models/remote").json()["changes"]["removed"] == ["models.remote"]
    assert everywhere(server, chat("remote")) == {404}
    assert "remote" not in file(server).read_text()
    assert admin(server, "DELETE", "/admin/models/remote").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("PUT", "/admin/models/x", {"endpoints": [{"base_url": "nonsense"}]}, 400, "models.x.endpoints[0].base_url"),
        ("PUT", "/admin/models/x", {"endpoint": []}, 400, "models.x.endpoint"),
        ("PUT", "/admin/models/x", {}, 400, "models.x"),
        ("PUT", "/admin/models/x", [1], 400, None),
        ("PUT", "/admin/models/gpt-4o", {"engine": {"simulator": {}}}, 400, "aliases.gpt-4o"),
        ("PUT", "/admin/models/x", {"endpoints": [{"base_url": "http://x/v1", "api_key": "***"}]}, 400,
         "models.x.endpoints[0].api_key"),
        ("PUT", "/admin/models/x", {"engine": {"weights": "org/X-MLX_8bit"}}, 409, None),
        ("DELETE", "/admin/models/fast", None, 400, "aliases.gpt-4o"),
        ("DELETE", "/admin/models/nothing", None, 404, "model"),
        ("GET", "/admin/models/nothing", None, 404, "model"),
        ("POST", "/admin/models/x", {}, 405, None),
        ("PUT", "/admin/models", {}, 405, None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_the_file_stays(server: Server, remotes, method, path, body, status, param):
    text = written(server, remotes)
    answer = admin(server, method, path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert file(server).read_text() == text
    assert everywhere(server, chat("gpt-4o")) == {200}


def test_a_file_that_is_read_only_is_not_written(server: Server, remotes: tuple[str, str]):
    text = written(server, remotes)
    file(server).chmod(0o444)
    try:
        answer = admin(server, "PUT", "/admin/models/x", remote(remotes[0]))
        assert answer.status_code == 409
        assert "read-only" in answer.json()["error"]["message"]
        assert file(server).read_text() == text
    finally:
        file(server).chmod(0o644)


def test_models_are_shown_to_administrators_only_and_without_secrets(server: Server, remotes: tuple[str, str]):
    wanted = configuration(remotes)
    wanted["models"]["secretive"] = {"endpoints": [{"base_url": remotes[0], "api_key": "sk-sentinel-upstream"}]}
    configure(server, wanted)
    assert everywhere(server, lambda c: c.get("/admin/models").status_code) == {401}
    shown = admin(server, "GET", "/admin/models")
    assert [m["name"] for m in shown.json()["data"]] == [*wanted["models"]]
    assert "sk-sentinel" not in shown.text
    assert '"api_key":"***"' in shown.text
