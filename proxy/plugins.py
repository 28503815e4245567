"""What installed distributions add to us, by entry points: named without being imported, imported when named."""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from proxy.errors import PluginError

PROVIDERS = "polyvox.providers"


def names(group: str) -> tuple[str, ...]:
    """Return the names that installed distributions offer in a group. Imports none of them."""
    return tuple(sorted({entry.name for entry in entry_points(group=group)}))


def load(group: str, name: str) -> Any:
    """Import what is offered under a name and call it, without arguments, to make one. Raises PluginError."""
    found = [entry for entry in entry_points(group=group) if entry.name == name]
    if not found:
        raise PluginError(f"no installed distribution offers {name!r}")
    if len({entry.value for entry in found}) > 1:
        raise PluginError(f"{name!r} is offered by several distributions: {', '.join(map(_origin, found))}")
    try:
        return found[0].load()()
    except Exception as e:
        raise PluginError(f"{_origin(found[0])}: {found[0].value} cannot be loaded: {type(e).__name__}: {e}") from e


def _origin(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unnamed distribution"
