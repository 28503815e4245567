"""`polyvox probe` and `polyvox models`, run as they are by a person."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import httpx2
import pytest

from proxy import config
from tests.fakes.able_server import AbleServer, able_server
from tests.serving import Server, eventually, serve

CONFIG = """\
models:
  cloud:
    kind: advanced
    price: {{input: 0.5, output: 1.5}}
    endpoints: [{{base_url: '{address}/v1', model: there, api_key: '${{KEY}}'}}]
  local:
    engine: {{simulator: {{}}}}
    hosting: {{usd_per_hour: 2.1}}
aliases: {{best: cloud, legal: {{model: cloud, system: Be a lawyer.}}, fast: {{any_of: [cloud, local]}}}}
"""


@contextmanager
def serving(**settings: object) -> Iterator[AbleServer]:
    """Serve in a thread, since the command blocks."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    context = able_server(**settings)
    able = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(60)
    try:
        yield able
    finally:
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


def polyvox(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "proxy", *args, "--state-dir", str(folder / "state")]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "KEY": "sk-sentinel"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def configured(folder: Path, address: str) -> str:
    file = folder / "polyvox.yaml"
    file.write_text(CONFIG.format(address=address))
    return str(file)


def test_what_is_found_is_told_kept_and_listed(tmp_path):
    with serving(key="sk-sentinel", ways={"tools": "refuses"}, tells_limit=True, context=2000) as able:
        config = configured(tmp_path, able.address)
        done = polyvox(tmp_path, "probe", "best", "-c", config)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "cloud/0: models: there"
    assert "cloud/0: tools: no" in lines and "cloud/0: json mode: yes" in lines
    assert lines[-1] == "cloud/0: context length: 2000"

    table = polyvox(tmp_path, "models", "-c", config)
    assert table.returncode == 0, table.stderr
    rows = {line.split()[0]: line.split() for line in table.stdout.splitlines()[1:]}
    assert rows["cloud"][1:5] == ["advanced", "ready", "2000", "text"]
    assert rows["cloud"][-2:] == ["0.5", "1.5"]
    assert rows["local"][1:4] == ["balanced", "not", "running"]

    listed = json.loads(polyvox(tmp_path, "models", "-c", config, "--json").stdout)
    assert listed[0]["model"] == "cloud" and listed[0]["aliases"] == ["best"]
    assert listed[0]["capabilities"]["tools"] is False and listed[0]["capabilities"]["json_schema"] is True
    assert listed[1]["usd_per_hour"] == 2.1 and listed[1]["price"] is None
    assert "sk-sentinel" not in done.stdout + done.stderr + table.stdout


def test_a_server_that_is_in_no_configuration_is_asked_by_its_url(tmp_path):
    with serving(key="sk-sentinel") as able:
        url = f"{able.address}/v1"
        done = polyvox(tmp_path, "probe", "there", "--url", url, "--key-env", "KEY", "--context-spend", "0", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["model"] == "there" and found["version"] == "9.1"
    assert found["capabilities"]["tools"] is True
    assert "there/0: tools: yes" in done.stderr.splitlines()
    assert "sk-sentinel" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["nobody"], 2, "there is no model 'nobody'; there are cloud, local"),
        (["fast"], 2, "there is no model 'fast'"),
        (["local"], 3, "no polyvox server answers"),
        (["cloud"], 1, "cloud/0 does not answer: ConnectFailed"),
        (["legal"], 1, "cloud/0 does not answer: ConnectFailed"),
        (["x", "--url", "ftp://x"], 2, "--url: expected http://HOST"),
        (["x", "--url", "http://127.0.0.1:1/v1", "--key-env", "NOPE"], 2, "environment variable NOPE is not set"),
        (["x", "--key-env", "KEY"], 2, "--key-env goes with --url"),
        (["x", "--url", "http://127.0.0.1:1/v1", "--write"], 2, "--write does not go with --url"),
    ],
)
def test_what_cannot_be_asked_is_told_with_its_reason(tmp_path, args, status, said):
    config = configured(tmp_path, "http://127.0.0.1:1")
    done = polyvox(tmp_path, "probe", *args, "-c", config)
    assert done.returncode == status, done.stderr
    assert said in done.stderr


WRITTEN = """\
# ours
models:
  cloud:   # the good one
    endpoints:
      - base_url: '{address}/v1'   # over there
        model: there
        api_key: '${{KEY}}'
      - {{base_url: '{address}/v1', model: there, continues: false}}
aliases: {{best: cloud}}  # everybody's
"""


def test_what_is_found_goes_into_the_file_beside_what_stands_there(tmp_path):
    with serving(ways={"stream_usage": "refuses"}, tells_limit=True, context=2000) as able:
        file = tmp_path / "polyvox.yaml"
        file.write_text(WRITTEN.format(address=able.address))
        done = polyvox(tmp_path, "probe", "best", "--write", "-c", str(file))
        again = polyvox(tmp_path, "probe", "best", "--write", "-c", str(file))
    assert done.returncode == 0, done.stderr
    new = {line.split(": models.cloud.")[1] for line in done.stdout.splitlines() if ": models.cloud." in line}
    assert new == {
        "context: 2000", "modalities: [text, image]", "endpoints[0].continues: true",
        "endpoints[0].stream_usage: false", "endpoints[1].stream_usage: false",
    }  # fmt: skip
    assert again.stdout.splitlines()[-1].endswith(": nothing is new")
    text = file.read_text()
    for kept in ("# ours", "# the good one", "# over there", "'${KEY}'", "# everybody's"):
        assert kept in text
    loaded = config.load(file, {"KEY": "k"}).config.models["cloud"]
    assert loaded.context == 2000 and loaded.modalities == ("text", "image")
    assert [e.continues for e in loaded.endpoints] == [True, False]
    assert [e.stream_usage for e in loaded.endpoints] == [False, False]


def test_a_file_that_is_not_to_be_written_is_told(tmp_path):
    with serving() as able:
        file = Path(configured(tmp_path, able.address))
        before = file.read_text()
        file.chmod(0o444)
        done = polyvox(tmp_path, "probe", "cloud", "--write", "--context-spend", "0", "-c", str(file))
    assert done.returncode == 2 and "read-only" in done.stderr
    assert file.read_text() == before


def test_a_running_server_goes_by_what_is_found(tmp_path):
    models = {"cloud": {"endpoints": [{"base_url": "", "model": "there"}]}, "other": {"engine": {"simulator": {}}}}
    with serving(tells_limit=True, context=2000) as able:
        models["cloud"]["endpoints"][0]["base_url"] = f"{able.address}/v1"
        with serve({"server": {"workers": 2}, "models": models}, tmp_path) as server:
            assert lengths(server) == {None}
            done = polyvox(tmp_path, "probe", "cloud", "-c", str(server.config))
            assert done.returncode == 0, done.stderr
            eventually(lambda: lengths(server) == {2000})


def lengths(server: Server) -> set[int | None]:
    """The context length of the model, asked for so often that each worker has answered."""
    cards = [httpx2.get(f"{server.base_url}/v1/models/cloud", timeout=60).json() for _ in range(20)]
    return {card["max_model_len"] for card in cards}
