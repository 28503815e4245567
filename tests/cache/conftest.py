from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache.redis_server import RedisServer, redis_server


@pytest.fixture(scope="session")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    folder: Path = tmp_path_factory.mktemp("redis")
    with redis_server(folder) as server:
        yield server


@pytest.fixture
def server(_running: RedisServer) -> RedisServer:
    """A Redis server, running and empty."""
    _running.clear()
    return _running
