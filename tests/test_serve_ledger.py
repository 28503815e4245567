"""What requests cost and the ledger of them, of a running server: real processes, sockets and databases."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.ledger.postgres import PASSWORD, Postgres, postgres
from tests.scraping import Page
from tests.serving import Server, eventually, serve, start, wait_until_ready

KEY, OTHER, ADMIN = "sk-sentinel-one", "sk-sentinel-two", "sk-sentinel-admin"
FAST = {"time_to_first_token": 0.0, "time_per_token": 0.0, "tokens": 8}
ASK = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}  # 6 tokens of the simulator
CHEAP = (6 * 1.0 + 8 * 2.0) / 1e6
MODELS = {
    "cheap": {"engine": {"simulator": FAST}, "price": {"input": 1.0, "output": 2.0}},
    "dear": {"engine": {"simulator": FAST}, "price": {"input": 100.0, "output": 200.0}},
    "hosted": {"engine": {"simulator": {**FAST, "time_per_token": 0.01}}, "hosting": {"usd_per_hour": 3.6}},
    "free": {"engine": {"simulator": FAST}},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    configuration = {
        "server": {"api_keys": [KEY, OTHER], "admin_keys": [ADMIN], "workers": 2},
        "models": MODELS,
        "aliases": {"gpt-4o": "cheap"},
    }
    with serve(configuration, tmp_path_factory.mktemp("ledger")) as running:
        yield running


def ask(server: Server, model: str, key: str = KEY, **more: object) -> httpx2.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    body = {"model": model, **ASK, **more}
    answer = httpx2.post(server.base_url + "/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def usage(server: Server, key: str, **query: str) -> dict:
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx2.get(server.base_url + "/v1/usage", params=query, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def requests_of(server: Server, key: str) -> int:
    return usage(server, key)["total"]["requests"]


def test_an_answer_says_what_it_cost(server: Server):
    assert float(ask(server, "gpt-4o").headers["x-polyvox-cost"]) == pytest.approx(CHEAP)


def test_an_unknown_price_is_not_nothing(server: Server):
    assert "x-polyvox-cost" not in ask(server, "free").headers


def test_the_tokens_of_a_hosted_engine_cost_its_time(server: Server):
    for _ in range(3):  # the first one too
        answer = ask(server, "hosted")
        # 0.07 s or more for 8 tokens, at a thousandth of a dollar a second
        assert 0.00005 < float(answer.headers["x-polyvox-cost"]) < 0.01


def test_a_stream_tells_its_cost_in_its_usage_if_asked(server: Server):
    events = ask(server, "gpt-4o", stream=True, stream_options={"include_cost": True}).text
    last = json.loads(events.split("data: ")[-2])
    assert last["usage"]["cost"] == pytest.approx(CHEAP)
    assert last["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_usage": True, "include_cost": False}])
def test_a_stream_that_is_not_asked_tells_no_cost(server: Server, options: dict):
    events = ask(server, "cheap", stream=True, stream_options=options).text
    assert json.loads(events.split("data: ")[-2])["usage"] == {
        "prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14,
    } | {k: v for k, v in json.loads(events.split("data: ")[-2])["usage"].items() if k.endswith("details")}  # fmt: skip


def test_a_wish_for_the_cost_that_is_none_is_refused_by_name(server: Server):
    body = {"model": "cheap", **ASK, "stream": True, "stream_options": {"include_cost": "yes"}}
    answer = httpx2.post(
        server.base_url + "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stream_options.include_cost"


def test_the_cost_is_counted_for_prometheus(server: Server):
    def total() -> float:
        answer = httpx2.get(server.base_url + "/metrics", headers={"authorization": f"Bearer {KEY}"}, timeout=60)
        return Page.of(answer.text).value("polyvox_cost_usd_total", model_name="dear", endpoint="dear/0")

    before = total()
    ask(server, "dear")
    ask(server, "dear", stream=True)
    eventually(lambda: total() - before == pytest.approx(200 * CHEAP))


def test_a_key_sees_what_it_has_used_and_an_admin_what_all_have(server: Server):
    mine, others = (requests_of(server, key) for key in (KEY, OTHER))
    ask(server, "cheap")
    ask(server, "gpt-4o", stream=True)
    ask(server, "dear", key=OTHER)
    eventually(lambda: requests_of(server, OTHER) == others + 1, pause=0.2)
    eventually(
        lambda: {"gpt-4o", "cheap"} <= {line["group"] for line in usage(server, KEY, group_by="alias")["data"]}, 20
    )
    assert requests_of(server, KEY) >= mine + 2
    assert requests_of(server, ADMIN) >= mine + others + 3
    by_key = usage(server, ADMIN, group_by="key")
    assert len(by_key["data"]) == 2
    assert not any(key in json.dumps(by_key) for key in (KEY, OTHER, ADMIN))
    dear = next(line for line in usage(server, OTHER)["data"] if line["group"] == "dear")
    assert (dear["tokens_in"], dear["tokens_out"], dear["saving"]) == (6, 8, pytest.approx(0))
    cheap = next(line for line in usage(server, KEY)["data"] if line["group"] == "cheap")
    assert cheap["saving"] == pytest.approx(99 * cheap["usd"])
    assert usage(server, ADMIN, since="2999-01-01")["total"]["requests"] == 0


def test_what_is_asked_wrongly_of_the_ledger_is_refused_by_name(server: Server):
    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx2.get(server.base_url + "/v1/usage?group_by=colour", headers=headers, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "group_by")
    assert httpx2.get(server.base_url + "/v1/usage", timeout=60).status_code == 401


def test_the_command_reports_the_same(server: Server):
    ask(server, "gpt-4o")
    eventually(lambda: "gpt-4o" in {line["group"] for line in usage(server, KEY, group_by="alias")["data"]}, pause=0.2)
    before = requests_of(server, ADMIN)
    folder = server.paths.ledger.parent
    command = [sys.executable, "-m", "proxy", "usage", "-c", str(folder.parent / "polyvox.yaml"), "--state-dir",
               str(folder)]  # fmt: skip
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total"]["requests"] >= before
    table = subprocess.run([*command, "--by", "alias", "--since", "1d"], capture_output=True, text=True, timeout=60)
    assert "gpt-4o" in table.stdout
    wrong = subprocess.run([*command, "--since", "tomorrow"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert "since" in wrong.stderr


def test_without_a_ledger_nothing_is_kept(tmp_path: Path):
    with serve({"models": MODELS, "ledger": False}, tmp_path) as server:
        ask(server, "cheap")
        answer = httpx2.get(server.base_url + "/v1/usage", timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_ledger")
        assert not server.paths.ledger.exists()


def test_a_kill_at_any_moment_loses_at_most_the_last_second_and_corrupts_nothing(tmp_path: Path):
    configuration = {"server": {"workers": 2}, "models": {"cheap": MODELS["cheap"]}}
    answered: list[tuple[float, str]] = []
    for _ in range(2):
        server = start(configuration, tmp_path)
        try:
            wait_until_ready(server)
            victims = [psutil.Process(server.process.pid), *server.process.children(recursive=True)]
            stop = threading.Event()
            asking = threading.Thread(target=_ask_for_ever, args=(server, answered, stop))
            asking.start()
            before = len(answered)
            eventually(_AskedFor(answered, 2.0))
            killed = time.time()
            for victim in victims:
                victim.send_signal(signal.SIGKILL)
            stop.set()
            asking.join()
            stood_still = max(b - a for (a, _), (b, _) in pairwise([*answered[before:], (killed, "")]))
            due = {name for ended, name in answered if ended < killed - 1.0 - stood_still}
            answered = [(ended, name) for ended, name in answered if name in due]
        finally:
            server.process.kill()
            server.process.wait()
    with serve(configuration, tmp_path) as server:
        eventually(
            lambda: due <= set(_request_ids(server)), message=lambda: f"missing: {due - set(_request_ids(server))}"
        )
        ids = _request_ids(server)
        assert len(ids) == len(set(ids)), "a row is there twice"


class _AskedFor:
    """Whether many have been answered since now, over so many seconds."""

    def __init__(self, answered: list[tuple[float, str]], seconds: float) -> None:
        self._answered, self._before, self._seconds = answered, len(answered), seconds

    def __call__(self) -> bool:
        since = self._answered[self._before :]
        return len(since) > 50 and since[-1][0] - since[0][0] > self._seconds


def _ask_for_ever(server: Server, answered: list[tuple[float, str]], stop: threading.Event) -> None:
    with httpx2.Client(base_url=server.base_url, timeout=60) as client:
        while not stop.is_set():
            try:
                answer = client.post("/v1/chat/completions", json={"model": "cheap", **ASK})
            except httpx2.TransportError:
                return
            if answer.status_code == 200:
                answered.append((time.time(), answer.headers["x-request-id"]))


def _request_ids(server: Server) -> list[str]:
    path = server.paths.ledger / "ledger.sqlite"
    if not path.exists():
        return []
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return [name for (name,) in connection.execute("SELECT request_id FROM polyvox_requests")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


def test_a_postgresql_that_is_down_costs_no_request_and_loses_no_row(tmp_path: Path, cluster: Postgres):
    cluster.stop()
    configuration = {"models": {"cheap": MODELS["cheap"]}, "ledger": {"url": cluster.url}}
    with serve(configuration, tmp_path) as server:
        for _ in range(20):
            ask(server, "cheap", key="")
        answer = httpx2.get(server.base_url + "/v1/usage", timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
        cluster.start()
        eventually(lambda: _requests_or_none(server) == 20, pause=0.3)
        log, told = server.log(), answer.text
        checked = subprocess.run(
            [sys.executable, "-m", "proxy", "check", str(tmp_path / "polyvox.yaml")],
            capture_output=True, text=True, timeout=60, env={**os.environ},
        )  # fmt: skip
    for text in (log, told, checked.stdout, checked.stderr):
        assert PASSWORD not in text
        assert "sentinel-p@ss" not in text


def _requests_or_none(server: Server) -> int | None:
    answer = httpx2.get(server.base_url + "/v1/usage", timeout=60)
    return answer.json()["total"]["requests"] if answer.status_code == 200 else None
