"""Where state lives: the XDG folders, or one folder that the user names."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Self

import msgspec

_SOCKET_PATH_LIMIT = 100  # sun_path holds 108 bytes on Linux; leave room for the file name


class StatePaths(msgspec.Struct, frozen=True):
    """Folders of one server. data: environments and weights, large, may be shared by several servers.

    logs, run, ledger, capabilities: the logs, sockets and the lock, the ledger of requests of this server alone, and
    what it found out of its models.
    """

    data: Path
    logs: Path
    run: Path

    @classmethod
    def resolve(cls, state_dir: Path | None = None, data_dir: Path | None = None) -> Self:
        """Choose the folders: those given, else the XDG ones."""
        home = Path.home()
        state = state_dir or Path(os.environ.get("XDG_STATE_HOME") or home / ".local/state") / "polyvox"
        xdg_data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share") / "polyvox"
        data = data_dir or (state_dir / "data" if state_dir else xdg_data)
        return cls(data=data.absolute(), logs=state.absolute() / "logs", run=_run_folder(state.absolute()))

    @property
    def environments(self) -> Path:
        return self.data / "environments"

    @property
    def weights(self) -> Path:
        return self.data / "weights"

    @property
    def ledger(self) -> Path:
        return self.logs.parent / "ledger"

    @property
    def capabilities(self) -> Path:
        return self.logs.parent / "capabilities"

    @property
    def control_socket(self) -> Path:
        return self.run / "control.sock"

    @property
    def lock(self) -> Path:
        return self.run / "lock"

    def create(self) -> None:
        """Make the folders; sockets and logs are for this user only."""
        self.data.mkdir(parents=True, exist_ok=True)
        for folder in (self.logs, self.run):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def _run_folder(state: Path) -> Path:
    """Sockets live beside the state, or in a short folder of this user where the path would be too long."""
    run = state / "run"
    if len(os.fsencode(run)) <= _SOCKET_PATH_LIMIT - 30:
        return run
    digest = hashlib.sha256(os.fsencode(run)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"polyvox-{os.getuid()}-{digest}"
