"""`polyvox probe` against real engines, and engines that are asked by themselves."""

import json
import subprocess
import sys

import pytest

from proxy.capabilities import Capabilities, Finding, Folder
from tests.real.conftest import PROBED
from tests.serving import START_DEADLINE, Server, eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300, func_only=True)]


def polyvox(server: Server, *args: str) -> str:
    """Run a command against the server; return what it prints."""
    folders = ["--config", str(server.config), "--state-dir", str(server.output.parent / "state")]
    command = [sys.executable, "-m", "proxy", *args, "--json", *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def listed(server: Server, model: str) -> Capabilities:
    (row,) = (row for row in json.loads(polyvox(server, "models")) if row["model"] == model)
    return Capabilities(**{**row["capabilities"], "modalities": tuple(row["capabilities"].get("modalities") or ())})


def test_a_real_engine_is_found_to_do_what_it_does(server: Server) -> None:
    (found,) = json.loads(polyvox(server, "probe", "gpt-3.5-turbo"))
    can = found["capabilities"]
    assert found["model"] == "smollm2" and found["version"].startswith("0.")
    assert 0 <= can.pop("instruction_score") <= 1 and can.pop("tokens_per_second") > 0
    assert can == {
        "json_mode": True, "json_schema": True, "tools": True, "logprobs": True, "system_role": True,
        "stream_usage": True, "continues": True, "context_length": 2048, "modalities": ["text"],
    }  # fmt: skip
    assert listed(server, "smollm2").tools is True


def test_a_real_engine_without_a_parser_for_tools_is_found_to_take_none(server: Server) -> None:
    (found,) = json.loads(polyvox(server, "probe", "tiny-llama"))
    assert found["capabilities"]["tools"] is False
    assert found["capabilities"]["json_schema"] is True  # whatever its weights, which are random


def test_a_real_engine_that_does_not_chat_is_asked_nothing_more(server: Server) -> None:
    (found,) = json.loads(polyvox(server, "probe", "tiny-embedder"))
    assert found["capabilities"] == {"context_length": 512}


def test_a_real_engine_is_asked_by_itself_when_it_is_first_ready(server: Server) -> None:
    def found() -> Finding | None:
        kept = Folder(server.paths.capabilities).read().values()
        return next((finding for finding in kept if finding.model == PROBED), None)

    eventually(found, START_DEADLINE / 4, pause=0.5)
    finding = found()
    assert finding is not None and finding.capabilities.stream_usage is True
    assert finding.capabilities.context_length == 2048
