"""Writes what was found out of a model into its configuration. What stands there already stays. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from proxy.capabilities import Capabilities, shared

Settings = Mapping[str, Any]


def noted(settings: Settings, found: Sequence[Capabilities]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a model with what was found, and a line for each thing that is new.

    found: of each of its endpoints, in their order; of an engine, whose context follows from its flags, one.
    """
    every = shared(found)
    facts: dict[str, Any] = {"modalities": list(every.modalities) if every.modalities else None}
    endpoints = settings.get("endpoints")
    if not isinstance(endpoints, list):
        return _with(settings, facts, "")
    written, lines = _with(settings, {"context": every.context_length, **facts}, "")
    added = [
        _with(e, _of_endpoint(can), f"endpoints[{i}].") for i, (e, can) in enumerate(zip(endpoints, found, strict=True))
    ]
    return {**written, "endpoints": [e for e, _ in added]}, lines + [line for _, more in added for line in more]


def _of_endpoint(can: Capabilities) -> dict[str, Any]:
    return {"continues": can.continues, "stream_usage": can.stream_usage}


def _with(settings: Settings, facts: Mapping[str, Any], at: str) -> tuple[dict[str, Any], list[str]]:
    new = {name: value for name, value in facts.items() if value is not None and name not in settings}
    return {**settings, **new}, [f"{at}{name}: {_shown(value)}" for name, value in new.items()]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)
