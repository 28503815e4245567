"""The cache of a running server with two workers: what it does, says and forgets."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import httpx2
import pytest

from tests.scraping import Page
from tests.serving import Server, eventually, serve

KEY, OTHER, ADMIN = "sk-sentinel-one", "sk-sentinel-two", "sk-sentinel-admin"
FAST = {"time_to_first_token": 0.0, "time_per_token": 0.0, "tokens": 8}
QUESTIONS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    configuration = {
        "server": {"api_keys": [KEY, OTHER], "admin_keys": [ADMIN], "workers": 2},
        "models": {"m": {"engine": {"simulator": FAST}, "price": {"input": 1.0, "output": 2.0}}},
        "aliases": {"a": "m"},
    }
    with serve(configuration, tmp_path_factory.mktemp("cache")) as running:
        yield running


def ask(server: Server, number: int, key: str = KEY, **more: object) -> httpx2.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": f"{number}?"}], "temperature": 0, **more}
    headers = {"authorization": f"Bearer {key}"}  # and another connection, perhaps to another worker, each time
    return httpx2.post(server.base_url + "/v1/chat/completions", json=body, headers=headers, timeout=60)


def admin(server: Server, method: str = "GET", **asked: str) -> dict[str, object]:
    headers = {"authorization": f"Bearer {ADMIN}"}
    answer = httpx2.request(method, server.base_url + "/admin/cache", params=asked, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def polyvox(server: Server, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "POLYVOX_STATE_DIR": str(server.paths.control_socket.parent)}
    folders = ["--state-dir", str(server.output.parent / "state")]
    command = [sys.executable, "-m", "proxy", "cache", *words, *folders]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)


def fill(server: Server) -> list[httpx2.Response]:
    """Ask until every question was answered from the cache."""
    answers = []
    for number in range(QUESTIONS):
        while (answer := ask(server, number, stream=number % 2 == 1)).headers["x-polyvox-cache"] != "hit":
            answers.append(answer)
    return answers


def test_all_workers_are_counted_and_all_forget(server: Server) -> None:
    fill(server)
    eventually(lambda: int(str(admin(server)["entries"])) >= QUESTIONS)
    report = json.loads(polyvox(server, "stats", "--json").stdout)
    assert report["entries"] == report["stored"] == report["miss"]
    assert report["hit"] >= QUESTIONS
    assert "HIT RATE" in polyvox(server, "stats").stdout
    purged = polyvox(server, "purge", "--model", "a")
    assert purged.stdout == f"{report['entries']} answers dropped\n"
    assert admin(server)["entries"] == 0
    assert {ask(server, n).headers["x-polyvox-cache"] for n in range(QUESTIONS)} <= {"miss", "hit"}


def test_a_purge_over_http_reaches_all_workers(server: Server) -> None:
    fill(server)
    prefix = ask(server, 0).headers["x-polyvox-cache-key"][:16]
    assert ask(server, 0, OTHER).headers["x-polyvox-cache"] == "miss"
    assert int(str(admin(server, "DELETE", key_prefix=prefix)["purged"])) >= QUESTIONS
    eventually(lambda: admin(server)["entries"] == 1)


def test_what_cannot_be_purged_is_named(server: Server) -> None:
    for words, message in ((["--model", "nix"], "'nix' does not exist"), (["--key-prefix", "z"], "hexadecimal")):
        done = polyvox(server, "purge", *words)
        assert (done.returncode, message in done.stderr) == (1, True)


def test_what_is_saved_is_in_the_ledger_and_in_metrics(server: Server) -> None:
    fill(server)

    def saved() -> float:
        answer = httpx2.get(server.base_url + "/v1/usage", headers={"authorization": f"Bearer {ADMIN}"}, timeout=60)
        return answer.json()["total"]["usd_saved_by_cache"] or 0.0

    eventually(lambda: saved() > 0)
    page = httpx2.get(server.base_url + "/metrics", headers={"authorization": f"Bearer {KEY}"}, timeout=60).text
    assert Page.of(page).value("polyvox_cache_saved_usd_total") > 0
