"""What an administrator reaches at /admin/models: passed on to the parent process, which has the file."""

from urllib.parse import unquote

import msgspec

from proxy.errors import BadRequest, MethodNotAllowed
from proxy.transport import Timeouts, Transport

PATH = "/admin/models"

_TIMEOUTS = Timeouts(connect=5.0, first_byte=120.0, between_bytes=10.0)
_LONGEST = 16 * 1024 * 1024  # bytes of an answer
_SERVICES = {"GET": "models", "PUT": "put-model", "DELETE": "delete-model"}


class Admin:
    """GET /admin/models, and GET, PUT, DELETE /admin/models/NAME."""

    def __init__(self, parent: Transport) -> None:
        """parent: to the control socket."""
        self._parent = parent

    def __repr__(self) -> str:
        return f"<Admin by {self._parent!r}>"

    async def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Return status and JSON. Raises RequestError, or UpstreamError while the parent does not answer.

        path: as it came, with its escapes.
        """
        name = unquote(path.removeprefix(PATH).removeprefix("/"))
        if method not in _SERVICES or (not name and method != "GET"):
            raise MethodNotAllowed(method, path, "GET, PUT, DELETE" if name else "GET")
        wish = {"name": name, "settings": _settings(body) if method == "PUT" else None}
        answer = await self._parent.send(
            b"POST", b"/services/" + _SERVICES[method].encode(), [], msgspec.json.encode(wish), _TIMEOUTS
        )
        try:
            return answer.status, await answer.read(_LONGEST)
        finally:
            await answer.close()


def _settings(body: bytes) -> object:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise BadRequest(f"The body is not valid JSON: {e}") from None
