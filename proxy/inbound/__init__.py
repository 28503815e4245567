"""HTTP/1.1 from clients: the protocol that uvicorn runs on each connection, in the place of its own.

What it does otherwise than uvicorn's, and why:

* The task that answers a request is cancelled as soon as its client goes. Nobody has to listen for that.
* The head of an answer waits for the first of its body for the rest of the event loop's turn, and the end of a body
  for nothing: an ordinary answer is one write to the socket where it would be three. Each costs 10 us.
* What could be read in two ways is refused (heads.py); httptools leaves some of it open.
* Nothing is timed per request: one sweep looks at all connections and ends those on which a head, a body or a next
  request is late (patience.py).
* A body is kept in the pieces that it came in, and joined once.
"""

import asyncio
import resource
from typing import Any, cast

import msgspec

from proxy.config import Server
from proxy.inbound.connection import Connection

__all__ = ["Connection", "follow", "protocol", "raise_open_files", "sweep_for_ever"]

_SWEEP = 1.0  # seconds between two looks at the connections, at most


def protocol(settings: Server) -> type[Connection]:
    """Return the protocol class for a server."""
    made = cast(type[Connection], type("Connection", (Connection,), {}))
    follow(made, settings)
    return made


def follow(connections: type[Connection], settings: Server) -> None:
    """Have all connections of a class go by other settings, those that are open included."""
    room = raise_open_files() // 2  # every request may need a connection to an engine as well
    connections.settings = msgspec.structs.replace(settings, max_connections=min(settings.max_connections, room))


def raise_open_files() -> int:
    """Let this process have as many files open as it may; return how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


async def sweep_for_ever(connections: set[Any], settings: Server) -> None:
    """Look at all connections again and again."""
    loop = asyncio.get_running_loop()
    pause = min(_SWEEP, settings.head_timeout / 4, settings.body_timeout / 4, settings.send_timeout / 4)
    while True:
        await asyncio.sleep(pause)
        now = loop.time()
        for connection in list(connections):
            connection.sweep(now)
