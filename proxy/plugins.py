"""What installed distributions add to us, by entry points: named without being imported, imported when named."""

from typing import TYPE_CHECKING, Any

from proxy.errors import PluginError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

PROVIDERS = "polyvox.providers"


def names(group: str) -> tuple[str, ...]:
    """Return the names that installed distributions offer in a group. Imports none of them."""
    return tuple(sorted({entry.name for entry in _entries(group)}))


def load(group: str, name: str) -> Any:
    """Import what is offered under a name and call it, without arguments, to make one. Raises PluginError."""
    found = [entry for entry in _entries(group) if entry.name == name]
    if not found:
        raise PluginError(f"no installed distribution offers {name!r}")
    if len({entry.value for entry in found}) > 1:
        raise PluginError(f"{name!r} is offered by several distributions: {', '.join(map(_origin, found))}")
    try:
        return found[0].load()()
    except Exception as e:
        raise PluginError(f"{_origin(found[0])}: {found[0].value} cannot be loaded: {type(e).__name__}: {e}") from e


def _entries(group: str) -> "EntryPoints":
    # Imported here because it takes 9 ms, and most servers use no plugin.
    from importlib.metadata import entry_points

    return entry_points(group=group)


def _origin(entry: "EntryPoint") -> str:
    return entry.dist.name if entry.dist else "an unnamed distribution"
