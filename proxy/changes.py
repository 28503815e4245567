"""What differs between two configurations, by name: no value is shown, as it may be a secret. Pure."""

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from proxy.config import Config

# What a running server keeps as it was started: sockets, processes, and where the ledger is.
_FIXED = (("server", "host"), ("server", "port"), ("server", "workers"), ("ledger",))

_WORDS = {"models": "model", "aliases": "alias", "ensembles": "ensemble"}  # for an entry of a section

Kind = Literal["added", "removed", "changed"]


class Changes(msgspec.Struct, frozen=True):
    """Names as `models.NAME`. restart: what is other in the file than in the server until that starts again."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a person."""
        kinds = {"added": self.added, "removed": self.removed, "changed": self.changed}
        parts = [f"{kind} {', '.join(map(_worded, names))}" for kind, names in kinds.items() if names]
        if self.restart:
            parts.append(f"after a restart only: {', '.join(self.restart)}")
        return "; ".join(parts) or "nothing changed"


def between(old: Config, new: Config) -> Changes:
    """Return what has changed. old: as the server runs."""
    found: dict[Kind, list[str]] = {"added": [], "removed": [], "changed": []}
    effective = pinned(new, old)
    for section in Config.__struct_fields__:
        for kind, name in _differences(section, getattr(old, section), getattr(effective, section)):
            found[kind].append(name)
    restart = tuple(".".join(path) for path in _FIXED if _at(old, path) != _at(new, path))
    return Changes(tuple(found["added"]), tuple(found["removed"]), tuple(found["changed"]), restart)


def pinned(new: Config, running: Config) -> Config:
    """Return a configuration with what cannot change in a running server as it is there."""
    server = {path[1]: _at(running, path) for path in _FIXED if len(path) > 1}
    sections = {path[0]: _at(running, path) for path in _FIXED if len(path) == 1}
    return msgspec.structs.replace(new, server=msgspec.structs.replace(new.server, **server), **sections)


def _at(config: Config, path: tuple[str, ...]) -> Any:
    value: Any = config
    for name in path:
        value = getattr(value, name)
    return value


def _differences(section: str, old: Any, new: Any) -> Iterator[tuple[Kind, str]]:
    """Yield the entries of a section that differ, or its fields, or itself."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) != new.get(name):
                yield "added" if name not in old else "removed" if name not in new else "changed", f"{section}.{name}"
    elif isinstance(old, msgspec.Struct) and type(old) is type(new):
        for name in old.__struct_fields__:
            if getattr(old, name) != getattr(new, name):
                yield "changed", f"{section}.{name}"
    else:
        yield "changed", section


def _worded(name: str) -> str:
    section, _, entry = name.partition(".")
    return f"{_WORDS[section]} {entry}" if section in _WORDS else name
