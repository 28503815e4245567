"""Time from a fresh clone to the first answer of a real model, and of a second start. `make bench-start`

Clones HEAD into an empty folder, with an empty HOME and nothing cached but what the package tools keep themselves
there, runs `make serve` as a new user would, and asks the embedded model a question as soon as it can answer.
"""

import argparse
import os
import platform
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
from rich.console import Console
from rich.table import Table

from benchmarks.ports import free_port

LIMIT = 600.0  # seconds
QUESTION = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    repository = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        home, clone = Path(folder, "home"), Path(folder, "polyvox")
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(repository), str(clone)], check=True)
        rows = [("fresh clone", *timed(clone, home)), ("second start", *timed(clone, home))]
    table = Table(
        "start", "listens (s)", "first answer (s)", "answer", title=f"{platform.machine()}, {os.cpu_count()} cores"
    )
    for name, listens, answers, text in rows:
        table.add_row(name, f"{listens:.1f}", f"{answers:.1f}", text)
    Console().print(table)


def timed(clone: Path, home: Path) -> tuple[float, float, str]:
    """Run `make serve` once; return seconds to listening, seconds to the first answer, and the answer."""
    port = free_port()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "POLYVOX_", "VIRTUAL_ENV"))}
    began = time.monotonic()
    with (
        subprocess.Popen(
            ["make", "serve", f"ARGS=--port {port}"],
            cwd=clone,
            env={**kept, "HOME": str(home)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as server,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        try:
            _until(lambda: _status(client, "/health") == 200, server)
            listens = time.monotonic() - began
            _until(lambda: _status(client, "/ready") == 200, server)
            answer = client.post("/v1/chat/completions", json=QUESTION).raise_for_status().json()
            answers = time.monotonic() - began
        finally:
            os.killpg(server.pid, signal.SIGTERM)
    return listens, answers, answer["choices"][0]["message"]["content"]


def _until(condition: Callable[[], bool], server: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        if server.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"`make serve` ended with {server.poll()}, or took more than {LIMIT:.0f} s")
        time.sleep(0.02)


def _status(client: httpx2.Client, path: str) -> int:
    try:
        return client.get(path).status_code
    except httpx2.TransportError:
        return 0


if __name__ == "__main__":
    main()
