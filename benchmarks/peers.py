"""The proxies that are measured: how each is installed, configured and started in front of two mock upstreams.

Each peer has an environment of its own below `polyvox/bench` in the XDG cache, made once.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from engines.environment import pip_install
from engines.preparation import ChildFailed

KEY = "sk-bench"
MODEL = "mock"


class Setting(msgspec.Struct, frozen=True):
    """Where a peer runs. workers: its processes or threads, where it can be told. folder: for its configuration."""

    port: int
    upstreams: tuple[str, ...]  # origins
    workers: int
    folder: Path


class Start(msgspec.Struct, frozen=True):
    """How a peer is started, and what clients must say to it."""

    command: tuple[str, ...]
    environ: dict[str, str] = {}
    headers: dict[str, str] = {}
    path: str = "/v1/chat/completions"


class Peer(msgspec.Struct, frozen=True):
    """A proxy. install returns its program, or raises Unavailable.

    scales: it can be told a number of workers. patience: so many times longer is measured, as little gets done.
    """

    name: str
    what: str
    install: Callable[[], Path]
    start: Callable[[Path, Setting], Start]
    scales: bool = False
    patience: float = 1.0


class Unavailable(Exception):
    """A peer cannot be installed here."""


def cache() -> Path:
    """Return the folder of the peers' environments."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyvox" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable((done.stderr or done.stdout).strip()[-300:])


def _python(name: str, program: str, *requirements: str, overrides: tuple[str, ...] = ()) -> Path:
    """Return a program of a Python package in an environment of its own. Overrides win against what packages pin."""
    folder = cache() / name
    made = folder / "bin" / program
    if not made.exists():
        _run(sys.executable, "-m", "venv", "--clear", folder)
        listed = folder / "overrides.txt"
        listed.write_text("\n".join(overrides))
        words = ("--quiet", "--python", str(folder / "bin" / "python"), "--overrides", str(listed), *requirements)
        try:
            asyncio.run(pip_install(words))
        except ChildFailed as e:
            raise Unavailable(str(e)[-300:]) from None
    return made


def _node(name: str, program: str, *packages: str) -> Path:
    made = cache() / name / "node_modules" / ".bin" / program
    if not made.exists():
        if not shutil.which("npm"):
            raise Unavailable("there is no npm")
        _run("npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", cache() / name, *packages)
    return made


def _nginx() -> Path:
    if not (found := shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")):
        raise Unavailable("nginx is not installed: apt-get install nginx-light")
    return Path(found)


def _start_nginx(program: Path, s: Setting) -> Start:
    servers = "".join(f"server {origin.removeprefix('http://')}; " for origin in s.upstreams)
    config = s.folder / "nginx.conf"
    config.write_text(f"""
worker_processes {s.workers}; daemon off; pid {s.folder}/nginx.pid; error_log {s.folder}/nginx.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {s.folder}; proxy_temp_path {s.folder};
  client_max_body_size 64m; client_body_buffer_size 1m; keepalive_requests 1000000000;
  upstream engines {{ {servers} keepalive 512; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{s.port} backlog=1024;
    location / {{
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}""")
    return Start((str(program), "-e", f"{s.folder}/nginx.log", "-c", str(config)))


def _start_vllm_router(policy: str) -> Callable[[Path, Setting], Start]:
    def start(program: Path, s: Setting) -> Start:
        options = ("--policy", policy, "--prometheus-port", str(s.port + 1), "--log-level", "error")
        return Start((str(program), "--host", "127.0.0.1", "--port", str(s.port), *options, *_worker_urls(s)))

    return start


def _start_smg(program: Path, s: Setting) -> Start:
    options = ("--policy", "round_robin", "--prometheus-port", str(s.port + 1), "--log-level", "error")
    return Start((str(program), "launch", "--host", "127.0.0.1", "--port", str(s.port), *options, *_worker_urls(s)))


def _worker_urls(s: Setting) -> tuple[str, ...]:
    return ("--worker-urls", *s.upstreams)


def _start_litellm(program: Path, s: Setting) -> Start:
    config = s.folder / "litellm.json"  # JSON is YAML
    entries = [
        {
            "model_name": MODEL,
            "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"{o}/v1", "api_key": "none"},
        }
        for o in s.upstreams
    ]
    config.write_text(json.dumps({"model_list": entries, "general_settings": {"master_key": KEY}}))
    words = ("--config", str(config), "--host", "127.0.0.1", "--port", str(s.port), "--num_workers", str(s.workers))
    return Start((str(program), *words), {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"})


def _start_portkey(program: Path, s: Setting) -> Start:
    headers = {"x-portkey-provider": "openai", "x-portkey-custom-host": f"{s.upstreams[0]}/v1"}
    return Start(("node", str(program.resolve()), "--headless", f"--port={s.port}"), {}, headers)


def _start_ours(program: Path, s: Setting) -> Start:
    config = s.folder / "polyvox.yaml"
    endpoints = [{"base_url": f"{o}/v1", "model": MODEL} for o in s.upstreams]
    server = {"api_keys": [KEY], "workers": s.workers}
    models = {"served": {"endpoints": endpoints}}
    # No other proxy here keeps a ledger, or answers.
    settings = {"server": server, "models": models, "aliases": {MODEL: "served"}, "ledger": False, "cache": False}
    config.write_text(json.dumps(settings))
    words = ("serve", "--config", str(config), "--port", str(s.port), "--state-dir", str(s.folder / "state"))
    return Start((str(program), *words))


VLLM_ROUTER = "vllm-router round_robin"
LITELLM = "LiteLLM"
OURS = "polyvox"

PEERS = (
    Peer("nginx", "proxy_pass, keep-alive, no buffering", _nginx, _start_nginx, scales=True),
    Peer(
        VLLM_ROUTER,
        "Rust",
        lambda: _python("vllm-router", "vllm-router", "vllm-router"),
        _start_vllm_router("round_robin"),
    ),
    Peer(
        "vllm-router cache_aware",
        "Rust",
        lambda: _python("vllm-router", "vllm-router", "vllm-router"),
        _start_vllm_router("cache_aware"),
    ),
    Peer("smg", "Rust, round_robin", lambda: _python("smg", "smg", "smg"), _start_smg),
    Peer(
        LITELLM,
        "1.108.0, master key",
        lambda: _python("litellm", "litellm", "litellm[proxy]==1.108.0", overrides=("certifi>=2026.7.22",)),
        _start_litellm,
        scales=True,
        patience=4.0,
    ),
    Peer(
        "Portkey",
        "1.15.2 on Node",
        lambda: _node("portkey", "gateway", "@portkey-ai/gateway@1.15.2", "hono@4.9.7"),
        _start_portkey,
    ),
    Peer(
        OURS,
        "keys, alias, two endpoints, no ledger",
        lambda: Path(sys.executable).with_name("polyvox"),
        _start_ours,
        scales=True,
    ),
)
