"""A port to tell a server to listen on."""

import contextlib
import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")  # of the ports that the system gives


def free_port() -> int:
    """Return a port of the loopback that nobody listens on, and that nobody is given who asks for any port.

    One of those would be taken now and then, before a server that was told to listen there has started: by a connection
    to somewhere else, or by this very one to itself.
    """
    low, high = map(int, _RANGE.read_text().split())
    others = [port for port in range(10_000, 65_536) if not low <= port <= high] or [0]
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.choice(others)))
            return int(probe.getsockname()[1])
