"""An HTTP server that answers as it was told to, with what clouds would say, and remembers what it was asked."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec


class Said(msgspec.Struct):
    """An answer. chunks: its body, each written on its own; with cut, the connection ends before the body does."""

    chunks: list[bytes]
    content_type: str = "application/json"
    status: int = 200
    headers: dict[str, str] = {}
    cut: bool = False


class Cloud(http.server.ThreadingHTTPServer):
    """Gives `says` to whoever asks, whatever the path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.says = Said([b"{}"])
        self.asked: list[tuple[str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def document(self, body: Any, status: int = 200, **headers: str) -> None:
        """Say a JSON document from now on."""
        self.says = Said([json.dumps(body).encode()], status=status, headers=headers)

    def stream(self, *events: bytes, cut: bool = False) -> None:
        """Say an event stream from now on."""
        self.says = Said(list(events), "text/event-stream; charset=utf-8", cut=cut)

    def last(self) -> tuple[str, dict[str, str], Any]:
        """Return path, headers and JSON body of the last request."""
        path, headers, body = self.asked[-1]
        return path, headers, json.loads(body)

    def handle_error(self, *_: object) -> None:
        """A connection that is given up is no failure of the test."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Cloud

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        said = self.server.says
        self.send_response(said.status)
        self.send_header("content-type", said.content_type)
        self.send_header("transfer-encoding", "chunked")
        for name, value in said.headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        for chunk in said.chunks:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        if said.cut:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def cloud() -> Iterator[Cloud]:
    """Run one on a free port of the loopback."""
    server = Cloud()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
