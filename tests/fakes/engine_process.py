"""A scripted engine: vLLM's probes over a unix socket, a tree of processes like vLLM's, and faults on demand.

Run as a program, standard library only, so that it starts in tens of milliseconds:
    engine_process.py --uds PATH --model NAME [--exit-at-start CODE] [--never-ready] [--ignore-sigterm]
                      [--chatter BYTES] [--no-children]

POST /set?running=1&stuck=1&dead=1&wedged=1&exit=3 changes how it behaves from then on:
POST /looks answers how often its metrics were read.
running: requests in flight. stuck: no iterations. dead: /health is 503. wedged: completions are never answered.
"""

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from urllib.parse import parse_qsl, urlsplit


def main() -> None:
    args = _arguments()
    if args.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("non-default args: scripted", flush=True)
    if args.chatter:
        print("\n".join(f"line {n}" for n in range(args.chatter)), flush=True)
    if args.exit_at_start is not None:
        print("Starting to load model", flush=True)
        print("ValueError: the scripted reason", file=sys.stderr, flush=True)
        sys.exit(args.exit_at_start)
    if not args.no_children:
        _fork_children()
    if args.never_ready:
        _sleep_forever()
    Server(args.uds, args.model).run()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds")
    parser.add_argument("--model")
    parser.add_argument("--exit-at-start", type=int)
    parser.add_argument("--chatter", type=int, default=0)
    for flag in ("--never-ready", "--ignore-sigterm", "--no-children"):
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()


def _fork_children() -> None:
    """A child with a child of its own, and a child that has its own session with another in it."""
    for detached in (False, True):
        if os.fork() == 0:
            if detached:
                os.setsid()
            os.fork()
            _sleep_forever()


def _sleep_forever() -> None:
    while True:
        time.sleep(3600)


class Server:
    def __init__(self, path: str, model: str) -> None:
        self._model = model
        self._knobs = {"running": 0, "stuck": 0, "dead": 0, "wedged": 0}
        self._iterations = 0
        self._looks = 0
        self._kept: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)  # fails on a leftover file, like vLLM
        self._listener.listen(64)

    def run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with contextlib.suppress(OSError):
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        method, target = connection.recv(65536).decode().split(" ")[:2]
        url = urlsplit(target)
        if url.path == "/v1/completions" and self._knobs["wedged"]:
            self._kept.append(connection)
            return
        status, body = self._route(method, url.path, dict(parse_qsl(url.query)))
        head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        connection.sendall(head.encode() + body.encode())
        connection.close()

    def _route(self, method: str, path: str, query: dict[str, str]) -> tuple[int, str]:
        if path == "/set":
            self._knobs.update({name: int(value) for name, value in query.items()})
            if "exit" in query:
                os._exit(int(query["exit"]))
        elif path == "/health":
            return (503 if self._knobs["dead"] else 200), ""
        elif path == "/v1/models":
            return 200, f'{{"data": [{{"id": "{self._model}", "max_model_len": 2048}}]}}'
        elif path == "/metrics":
            return 200, self._metrics()
        elif path == "/looks":
            return 200, str(self._looks)
        elif path == "/v1/completions":
            self._iterations += 1
        return 200, "{}"

    def _metrics(self) -> str:
        self._looks += 1
        if self._knobs["running"] and not self._knobs["stuck"]:
            self._iterations += 1
        label = f'{{engine="0",model_name="{self._model}"}}'
        return (
            f"# TYPE vllm:num_requests_running gauge\n"
            f"vllm:num_requests_running{label} {self._knobs['running']}.0\n"
            f"vllm:num_requests_waiting{label} 0.0\n"
            f'vllm:num_requests_waiting_by_reason{{engine="0",reason="capacity"}} 7.0\n'
            f"vllm:iteration_tokens_total_count{label} {self._iterations}.0\n"
            f"vllm:iteration_tokens_total_sum{label} {self._iterations * 8}.0\n"
        )


if __name__ == "__main__":
    main()
