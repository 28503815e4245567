"""What the parent process does for others over its control socket: reloads, and models put, deleted and shown.

A service takes JSON and gives a status and JSON: what it has done, or an error in OpenAI's envelope.
"""

import difflib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from proxy.errors import BadRequest, ConfigError, Conflict, FileReadOnly, RequestError, ServeError, UnknownModel
from proxy.reloading import Applied, Reloader, Shown

Service = Callable[[bytes], Awaitable[tuple[int, bytes]]]


class Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request for a service. name: of a model; "" for all. settings: see config.ModelSettings."""

    name: str = ""
    settings: Any = None


def services(reloader: Reloader) -> dict[str, Service]:
    """Return the services by name."""

    async def reload(_: Named) -> object:
        return await reloader.reload()

    async def put(wish: Named) -> object:
        if not isinstance(wish.settings, dict):
            raise BadRequest("The body must be an object: the settings of a model, with engine or endpoints.")
        return await _edited(reloader.put_model(wish.name, wish.settings))

    async def delete(wish: Named) -> object:
        _find(reloader, wish.name)
        return await _edited(reloader.delete_model(wish.name))

    async def show(wish: Named) -> object:
        return _find(reloader, wish.name) if wish.name else {"object": "list", "data": list(reloader.models())}

    return {
        "reload": _served(reload),
        "put-model": _served(put),
        "delete-model": _served(delete),
        "models": _served(show),
    }


def _find(reloader: Reloader, name: str) -> Shown:
    found = {shown.name: shown for shown in reloader.models()}
    if name not in found:
        raise UnknownModel(name, difflib.get_close_matches(name, found, n=3, cutoff=0.5))
    return found[name]


async def _edited(editing: Awaitable[Applied]) -> Applied:
    """Name the field where a model is refused: the line would be that of a text which was not written."""
    try:
        return await editing
    except FileReadOnly as e:
        raise Conflict(str(e), code="configuration_read_only") from None
    except ConfigError as e:
        text = f"{e.field}: {e.problem}" if e.field else e.problem
        raise BadRequest(text, param=e.field or None, code="invalid_configuration") from None


def _served(do: Callable[[Named], Awaitable[object]]) -> Service:
    async def serve(body: bytes) -> tuple[int, bytes]:
        try:
            return 200, msgspec.json.encode(await do(msgspec.json.decode(body or b"{}", type=Named)))
        except (RequestError, ConfigError, ServeError, msgspec.MsgspecError) as e:
            refusal = _refusal(e)
            return refusal.status, refusal.envelope()

    return serve


def _refusal(error: Exception) -> RequestError:
    """Return what the client is told."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ServeError):
        return Conflict(str(error))
    code = "invalid_configuration" if isinstance(error, ConfigError) else None
    return BadRequest(str(error), code=code)
