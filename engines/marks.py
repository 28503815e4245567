"""The mark that every process of an engine carries in its environment, so that it can be found again.

`POLYVOX_ENGINE=<state id>:<engine id>`. The state id belongs to one state folder and survives restarts: whoever
holds the lock of that folder knows that every process so marked is its own, or left over from an earlier run.
"""

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from engines.paths import StatePaths
from engines.spec import Launch

VARIABLE: Final = "POLYVOX_ENGINE"

# Bytecode is what makes a second start fast, and another interpreter's paths would break the engine's.
_NOT_INHERITED: Final = frozenset({"PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"})
_SECRET: Final = re.compile(r"POLYVOX_.*|.*_API_KEY|.*_TOKEN|.*_SECRET.*", re.IGNORECASE)


def state_id(paths: StatePaths) -> str:
    """Return the id of this state folder; made on first use.

    It depends on the folder's place too, so that a copy of a folder does not claim the engines of the original.
    """
    file = paths.logs.parent / "id"
    if not file.exists():
        file.write_text(secrets.token_hex(16))
    place = f"{file.read_text().strip()}:{file.resolve()}"
    return hashlib.sha256(place.encode()).hexdigest()[:20]


def mark(state: str, engine: str) -> str:
    """Return the value of the variable for an engine."""
    return f"{state}:{engine}"


def engine_environment(inherited: Mapping[str, str], launch: Launch, marking: str) -> dict[str, str]:
    """Return the environment of an engine: ours without what would harm it or is secret, and its own additions."""
    kept = {k: v for k, v in inherited.items() if k not in _NOT_INHERITED and not _is_secret(k)}
    # setproctitle, which vLLM uses, overwrites the environment that /proc shows unless it is told not to.
    return {**kept, **launch.environment, "SPT_NOENV": "1", VARIABLE: marking}


def _is_secret(name: str) -> bool:
    return name != "HF_TOKEN" and _SECRET.fullmatch(name) is not None


def marked(state: str, engine: str | None = None) -> dict[int, str]:
    """Return the running processes of an engine, or of all engines of a state folder: process id -> engine id."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            owner = _engine_of(Path("/proc", name, "environ").read_bytes(), state)
            if owner is not None and engine in (None, owner):
                found[int(name)] = owner
    return found


def _engine_of(environment: bytes, state: str) -> str | None:
    prefix = f"{VARIABLE}={state}:".encode()
    for entry in environment.split(b"\0"):
        if entry.startswith(prefix):
            return entry.removeprefix(prefix).decode(errors="replace")
    return None
