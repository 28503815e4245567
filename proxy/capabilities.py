"""What a server can do with a model, as `polyvox probe` found it out, and how what it found is kept.

A finding is of one subject: what is asked, whoever asks it under whatever name. An engine is its weights and the flags
that it runs with, so that all its replicas are one; an endpoint is its address and its own name for the model.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from engines.spec import EngineSettings
from proxy.config import EndpointSettings


class Capabilities(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a server can do. None: it is not known.

    json_mode, json_schema: `response_format` of these types is obeyed. tools: a tool is called when it is to be.
    logprobs: they are in answers. system_role: a system message is taken, and obeyed. stream_usage: streams tell what
    they used where `stream_options` ask for it; False where it refuses to be asked. continues: a partial message of the
    assistant is continued. context_length: tokens. modalities: what messages may hold, as text and image.
    instruction_score: share of a few plain instructions that were followed to the letter, 0 to 1.
    tokens_per_second: of one answer, while it is written.
    """

    json_mode: bool | None = None
    json_schema: bool | None = None
    tools: bool | None = None
    logprobs: bool | None = None
    system_role: bool | None = None
    stream_usage: bool | None = None
    continues: bool | None = None
    context_length: int | None = None
    modalities: tuple[str, ...] | None = None
    instruction_score: float | None = None
    tokens_per_second: float | None = None


def shared(endpoints: Iterable[Capabilities]) -> Capabilities:
    """Return what all endpoints of a model can do: a request may go to any of them.

    What one of them is known not to do is not done; what is not known of one is not known.
    """
    found = tuple(endpoints)
    if not found or all(each == found[0] for each in found):
        return found[0] if found else Capabilities()
    return Capabilities(**{name: _least([getattr(c, name) for c in found]) for name in Capabilities.__struct_fields__})


def _least(values: list[Any]) -> Any:
    known = [value for value in values if value is not None]
    if False in known and isinstance(known[0], bool):
        return False
    if len(known) < len(values):
        return None
    if isinstance(known[0], tuple):
        return tuple(each for each in known[0] if all(each in other for other in known))
    return min(known)


class Finding(msgspec.Struct, frozen=True):
    """What was found out. model: its name at the server. version: the server's, as it says. at: UNIX time."""

    model: str
    capabilities: Capabilities
    at: float
    version: str | None = None


Findings = Mapping[str, Finding]  # by subject
NOTHING: Findings = MappingProxyType({})


def subject_of(settings: EngineSettings | EndpointSettings, model: str) -> str:
    """Return the subject that a configuration describes. model: its name, for an endpoint that calls it the same."""
    if isinstance(settings, EngineSettings):
        told: tuple[Any, ...] = (settings.weights, settings.simulator, settings.quantization, settings.dtype)
        told = (*told, settings.max_model_len, sorted(settings.args.items()))
    else:
        told = (settings.base_url.rstrip("/"), settings.model or model, settings.provider, settings.api_version)
    return hashlib.sha256(msgspec.json.encode(told)).hexdigest()[:16]


class Folder:
    """Findings on disk: a JSON file for each subject, replaced whole. Servers, workers and commands share it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"<Folder {self.path}>"

    def read(self) -> dict[str, Finding]:
        """Return all findings. A file that is none is as if it were not there: it is found out anew."""
        found = {}
        for file in sorted(self.path.glob("*.json")) if self.path.is_dir() else ():
            with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeDecodeError):
                found[file.stem] = msgspec.json.decode(file.read_bytes(), type=Finding)
        return found

    def write(self, subject: str, finding: Finding) -> None:
        """Keep a finding in place of an older one, so that readers see the one or the other. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, temporary = tempfile.mkstemp(dir=self.path, suffix=".new")
        try:
            with open(fd, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(finding), indent=2))
            os.replace(temporary, self.path / f"{subject}.json")
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def changed(self) -> int:
        """Return what differs after each `write`, in nanoseconds of UNIX time; 0 while nothing was ever written."""
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return 0
