"""What passes between the parent process and a worker when the configuration changes."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Coroutine
from typing import Any, cast

import pytest

from proxy import config
from proxy.config import Config
from proxy.orders import Followed, Orders
from proxy.worker import _done, _Server
from proxy.workers import _Worker

# A worker that reads its first orders, and answers each that comes then as its argument says.
SCRIPT = """
import socket, sys
from proxy.orders import Followed, Orders
line = socket.socket(fileno=0)
Orders.take(line)
while True:
    line.sendall(Followed(Orders.take(line).generation, failed=sys.argv[1] == "fail").frame())
"""


def orders(generation: int) -> Orders:
    return Orders(config.encode(Config()), generation, (), "", 0, 0, 0, 0, 0, "", "")


async def started(how: str) -> _Worker:
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", SCRIPT, how, stdin=theirs.fileno())
    return _Worker(process, await asyncio.open_unix_connection(sock=ours), orders(1))


def test_a_worker_follows_when_it_says_so():
    async def story() -> None:
        worker = await started("follow")
        running = asyncio.create_task(worker.run())
        for generation in (2, 3):
            worker.send(orders(generation))
        assert await worker.follows(3)
        assert worker.process.returncode is None
        await worker.end()
        await running

    asyncio.run(story())


def test_a_worker_that_cannot_follow_is_ended_so_that_another_starts():
    async def story() -> None:
        worker = await started("fail")
        running = asyncio.create_task(worker.run())
        worker.send(orders(2))
        assert await worker.follows(2)
        assert await running == -15
        await worker.end()

    asyncio.run(story())


def test_a_worker_that_says_nothing_is_not_waited_for_for_ever():
    async def story() -> None:
        worker = await started("follow")
        running = asyncio.create_task(worker.run())
        worker.process.send_signal(signal.SIGSTOP)
        worker.send(orders(2))
        assert not await worker.follows(2, patience=0.05)
        worker.process.send_signal(signal.SIGCONT)
        assert await worker.follows(2)
        await worker.end()
        await running

    asyncio.run(story())


def test_what_goes_wrong_in_a_worker_is_logged_and_told(caplog: pytest.LogCaptureFixture):
    class Broken:
        async def follow(self, *_: object) -> None:
            raise RuntimeError("no room")

    with caplog.at_level(logging.ERROR):
        done = cast(Coroutine[Any, Any, Followed], _done(orders(7), Broken(), cast(_Server, None)))  # type: ignore[arg-type]
        assert asyncio.run(done) == Followed(7, failed=True)
    assert "no room" in caplog.text
