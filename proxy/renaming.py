"""The name that a client asked for, written into the events of a stream."""

import re

from proxy import sse, wire

# The beginning of an event up to the end of its model, where no object or list opens before it.
_BEGINNING = re.compile(rb'data: ?\{(?:[^][{}"\\]|"(?:[^"\\{]|\\.)*+")*?"model"\s*:\s*"(?P<name>(?:[^"\\]|\\.)*+)"')
_LONGEST = 1024  # bytes of a beginning


class EventRenamer:
    """Changes `model` in the events of one stream, which must come whole.

    All events of a stream begin alike up to their model, so that of one is remembered, and those that begin like it
    are renamed by replacing it, without a look into each.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._encoded = wire.encode(name)
        # All mutable state: how an event began that had its model at the top, and how it begins when renamed.
        self._old = self._new = b""

    def __repr__(self) -> str:
        return f"<EventRenamer {self._name!r}>"

    def __call__(self, events: bytes) -> bytes:
        """Return whole events under the new name."""
        if self._old and events.startswith(self._old) and events.rfind(b'"model"', len(self._old)) < 0:
            return self._new + events[len(self._old) :]  # as almost always
        models = events.count(b'"model"')
        if self._old and events.startswith(self._old) + events.count(b"\n" + self._old) == models:
            return events.replace(self._old, self._new)
        return self._look_into(events) if models else events

    def _look_into(self, events: bytes) -> bytes:
        match = _BEGINNING.match(events, 0, _LONGEST)
        if match is not None:
            self._old = match[0]
            self._new = events[: match.start("name") - 1] + self._encoded
        return sse.map_data(events, self._rename)

    def _rename(self, document: bytes) -> bytes:
        return wire.set_model(document, self._name)
