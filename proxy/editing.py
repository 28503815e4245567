"""Changes a model in the text of a configuration, and leaves all else there as it is: comments, order, `${NAME}`."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any, cast

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, ScalarString

from proxy.config import MASK
from proxy.errors import ConfigError, FileReadOnly
from proxy.mistakes import dotted

_WIDTH = 10_000  # characters: lines stay as long as they are


def put_model(text: str, name: str, settings: Mapping[str, Any]) -> str:
    """Return the text with a model of these settings, in the place of one of that name. Raises ConfigError.

    A string that is MASK stands for what is there now, which is how a secret was shown.
    """

    def put(models: CommentedMap) -> None:
        models[_quoted(name)] = _merged(models.get(name), dict(settings), ("models", name))

    return _edited(text, put, name)


def remove_model(text: str, name: str) -> str:
    """Return the text without a model. Raises ConfigError."""

    def remove(models: CommentedMap) -> None:
        models.pop(name, None)

    return _edited(text, remove, name)


def write(path: Path, text: str) -> None:
    """Put a text in the place of a file, whole or not at all; its mode stays. Raises FileReadOnly."""
    path = path.resolve()
    if path.is_relative_to(Path(__file__).parent):
        raise FileReadOnly(f"{path}: this is the embedded default; copy it to ./polyvox.yaml, and serve that")
    try:
        status = path.stat()
        if not status.st_mode & stat.S_IWUSR or not os.access(path, os.W_OK):
            raise FileReadOnly(f"{path}: the file is read-only; make it writable, or edit it where it comes from")
        _replace(path, text, status)
    except OSError as e:
        raise FileReadOnly(f"{path}: cannot be written: {e.strerror}") from None


def _replace(path: Path, text: str, like: os.stat_result) -> None:
    descriptor, new = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            with contextlib.suppress(PermissionError):  # who is not root makes files of its own only
                os.fchown(descriptor, like.st_uid, like.st_gid)
            os.fchmod(descriptor, stat.S_IMODE(like.st_mode))
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise


def _edited(text: str, edit: Callable[[CommentedMap], None], name: str) -> str:
    """Apply an edit to the models of a document; refuse one that would change anything else."""
    round_trip = YAML()
    round_trip.Representer = _Representer
    round_trip.preserve_quotes = True
    round_trip.width = _WIDTH
    round_trip.brace_single_entry_mapping_in_flow_sequence = True  # [{a: 1}] stays so, and does not become [a: 1]
    try:
        round_trip.indent(**_indents(text))
        document = cast(CommentedMap, round_trip.load(text)) or CommentedMap()
    except (YAMLError, yaml.YAMLError):
        raise ConfigError("the file is not valid YAML as it is now; `polyvox check` names the line") from None
    if not document.get("models"):
        document["models"] = CommentedMap()
    edit(document["models"])
    written = StringIO()
    round_trip.dump(document, written)
    _check(text, written.getvalue(), name)
    return written.getvalue()


def _indents(text: str) -> dict[str, int]:
    """Return how far a mapping, an item of a list and its dash are indented, as the text first has it."""
    found: dict[str, int] = {}
    for key, value in _entries(yaml.compose(text, Loader=yaml.SafeLoader)):
        column = key.start_mark.column
        if value.flow_style or not value.value:
            continue
        if isinstance(value, yaml.MappingNode):
            found.setdefault("mapping", value.start_mark.column - column)
        elif isinstance(value, yaml.SequenceNode):
            found.setdefault("offset", value.start_mark.column - column)
            found.setdefault("sequence", value.value[0].start_mark.column - column)
    return {"mapping": 2, "sequence": 4, "offset": 2} | found


def _entries(node: yaml.Node | None) -> Iterator[tuple[yaml.Node, yaml.CollectionNode]]:
    """Yield the keys of all mappings whose values are mappings or lists."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(value, yaml.CollectionNode):
                yield key, value
                yield from _entries(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _entries(item)


def _check(before: str, after: str, name: str) -> None:
    """See that all but one model reads as it did: two libraries, and two versions of YAML, meet here."""
    old, new = (yaml.safe_load(text) or {} for text in (before, after))
    for data in (old, new):
        data["models"] = {key: value for key, value in (data.get("models") or {}).items() if key != name}
    if old != new:
        problem = "more than this model would change in the file; edit it by hand"
        raise ConfigError(f"models.{name}: {problem}", f"models.{name}", problem)


def _merged(old: Any, new: Any, path: tuple[str | int, ...]) -> Any:
    """Return a value to be written: the old one, with its comments, as far as it can stay."""
    if new == MASK:
        if not isinstance(old, str):
            problem = f"{MASK} stands for a secret that is there already, and there is none"
            raise ConfigError(f"{dotted(path)}: {problem}", dotted(path), problem)
        return old
    if isinstance(new, dict) and isinstance(old, CommentedMap):
        for key in [key for key in old if key not in new]:
            del old[key]
        for key, value in new.items():
            old[_quoted(key)] = _merged(old.get(key), value, (*path, key))
        return old
    if isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        for i, value in enumerate(new):
            old[i] = _merged(old[i], value, (*path, i))
        return old
    return old if old == new and isinstance(old, ScalarString) else _fresh(new, path)  # a text stays as it was quoted


def _fresh(value: Any, path: tuple[str | int, ...]) -> Any:
    if isinstance(value, dict):
        return CommentedMap({_quoted(key): _merged(None, item, (*path, key)) for key, item in value.items()})
    if isinstance(value, list):
        return [_merged(None, item, (*path, i)) for i, item in enumerate(value)]
    return _quoted(value) if isinstance(value, str) else value


def _quoted(text: str) -> str:
    """Return a text in quotes where YAML 1.1, as which it is read, takes it for something else: `on`, `1_000`, `~`."""
    try:
        is_text = yaml.safe_load(text) == text and yaml.safe_load(f"{{{text}: [{text}]}}") == {text: [text]}
    except (yaml.YAMLError, ValueError):
        is_text = False
    return text if is_text else DoubleQuotedScalarString(text)


class _Representer(RoundTripRepresenter):
    """Writes a number that is new as YAML 1.1 reads it: 1.0e-05, since 1e-05 is a text there."""

    def represent_float_of_1_1(self, value: float) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:float", yaml.safe_dump(value).split()[0])


_Representer.add_representer(float, _Representer.represent_float_of_1_1)
