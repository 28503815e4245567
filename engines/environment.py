"""The engines' own Python environment: vLLM and all it pins, installed with uv from a lock with hashes.

The proxy never imports from it; an engine is a process started with the interpreter that `ensure` returns.
"""

import ast
import asyncio
import contextlib
import hashlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

import msgspec
from uv import find_uv_bin

from engines.devices import read_gpus
from engines.paths import StatePaths
from engines.preparation import (
    GIB,
    ChildFailed,
    PreparationError,
    Report,
    child_environment,
    exclusive,
    require_free_disk,
    run,
)

Kind = Literal["cpu", "cuda"]

_COMPLETE = ".complete"
_WARM = ".warm"
_PIP_TIMEOUT = 15.0  # seconds to ask pip for its configuration
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_DOWNLOADING = re.compile(r"Downloading (\S+) \(([\d.]+)([KMG]iB)\)")
_DOWNLOADED = re.compile(r"Downloaded (\S+)")
# One module that does not load on some device must not keep the others from being compiled.
_IMPORT_ALL = """\
import contextlib, importlib, sys
for name in sys.argv[1:]:
    with contextlib.suppress(Exception):
        importlib.import_module(name)
"""
_PINNED_VLLM = re.compile(r"^vllm(?:-cpu)?==(\S+)", re.MULTILINE)


class EngineEnvironmentError(PreparationError):
    """vLLM could not be installed; the text ends with the last lines that the installer said."""


class Recipe(msgspec.Struct, frozen=True):
    """What an environment is made of.

    locks: requirement files with hashes. torch: alternatives to install before them, tried in this order.
    disk: bytes that the environment and what is downloaded for it take.
    imports: the modules that an engine imports first, to be compiled ahead.
    """

    kind: Kind
    locks: tuple[Path, ...]
    torch: tuple[tuple[Path, ...], ...]
    disk: int
    imports: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The vLLM that the locks pin."""
        found = _PINNED_VLLM.search("\n".join(lock.read_text() for lock in self.locks))
        return found[1] if found else "unknown"

    @property
    def digest(self) -> str:
        """Names this content for this Python on this architecture: another lock is another environment."""
        files = (*self.locks, *(file for files in self.torch for file in files))
        python = f"{sys.implementation.cache_tag}-{platform.machine()}"
        content = b"\0".join(file.read_bytes() for file in files) + python.encode()
        return hashlib.sha256(content).hexdigest()[:12]


class Download(msgspec.Struct, frozen=True):
    """How far uv is, folded from the lines it prints: bytes by package announced, and packages fetched."""

    sizes: dict[str, int] = {}
    fetched: frozenset[str] = frozenset()
    detail: str = ""
    share: float = 0.0


def recipe(kind: Kind) -> Recipe:
    """The environment that we ship for machines with (`cuda`) or without (`cpu`) an NVIDIA GPU."""
    here = Path(__file__).parent
    if kind == "cuda":
        return Recipe(kind, (here / "requirements-cuda.txt",), (), 16 * GIB, _imports("gpu"))
    torch = ((here / "requirements-cpu-torch.txt",), (here / "requirements-cpu-torch-pypi.txt",))
    return Recipe(kind, (here / "requirements-cpu.txt",), torch, 3 * GIB, _imports("cpu"))


def kind(devices: str = "auto") -> Kind:
    """The build that an engine with this `devices` setting needs: CUDA where there is a GPU and it may be used."""
    if devices == "cpu":
        return "cpu"
    return "cuda" if devices.startswith("cuda") or read_gpus() else "cpu"


def location(which: Kind | Recipe, paths: StatePaths) -> Path:
    """Where the interpreter of an environment is, or will be."""
    made_of = which if isinstance(which, Recipe) else recipe(which)
    return paths.environments / f"vllm-{made_of.kind}-{made_of.digest}" / "bin" / "python"


async def ensure(which: Kind | Recipe, paths: StatePaths, report: Report) -> Path:
    """Return the interpreter of an environment, installing it where it is not there yet.

    Of two servers at once the second waits. What a broken installation left is removed.
    Raises EngineEnvironmentError, or PreparationError where the disk is too full.
    """
    made_of = which if isinstance(which, Recipe) else recipe(which)
    interpreter = location(made_of, paths)
    folder = interpreter.parent.parent
    if (folder / _COMPLETE).exists():
        return interpreter
    title = f"installing vLLM {made_of.version} ({made_of.kind})"
    waiting = f"{title}: another server is doing it, waiting"
    async with exclusive(folder.with_name(f"{folder.name}.lock"), report, waiting) as lock:
        if not (folder / _COMPLETE).exists():
            require_free_disk(paths.environments, made_of.disk, title)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            await _install(made_of, folder, _Announcer(title, report), lock)
            (folder / _COMPLETE).touch()
    return interpreter


async def warm_up(which: Kind | Recipe, paths: StatePaths) -> None:
    """Import once what an engine imports, so that its bytecode is on disk when the first engine starts.

    Meant to run beside the fetching of weights. Does nothing the second time, and never fails.
    """
    made_of = which if isinstance(which, Recipe) else recipe(which)
    interpreter = location(made_of, paths)
    mark = interpreter.parent.parent / _WARM
    if mark.exists():
        return
    with contextlib.suppress(PreparationError, OSError):
        await run((str(interpreter), "-I", "-c", _IMPORT_ALL, *made_of.imports), child_environment())
        mark.touch()


def read_uv_line(seen: Download, line: str) -> Download:
    """Fold one line that uv prints into how far it is."""
    if found := _DOWNLOADING.search(line):
        sizes = seen.sizes | {found[1]: int(float(found[2]) * _UNITS[found[3]])}
        return _counted(Download(sizes, seen.fetched, seen.detail, seen.share))
    if found := _DOWNLOADED.search(line):
        return _counted(Download(seen.sizes, seen.fetched | {found[1]}, seen.detail, seen.share))
    if line.startswith(("Prepared ", "Installed ")):
        share = 1.0 if line.startswith("Installed ") else 0.95
        return msgspec.structs.replace(seen, detail="unpacking", share=max(seen.share, share))
    return seen


def parse_pip_config(text: str) -> dict[str, str]:
    """The settings in force in the answer of `pip config list`, by name; what is nearer to us wins."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in text.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in sections and value[:1] in {"'", '"'}:
            sections[section][name] = str(ast.literal_eval(value))
    return sections["global"] | sections["install"] | sections[":env:"]


def uv_settings(pip: Mapping[str, str], environ: Mapping[str, str], further: bool = False) -> dict[str, str]:
    """pip's settings as uv's environment variables: uv does not read pip's configuration.

    further: with the extra indexes. Folders that do not exist are left out, and what the user set for uv stays.
    """
    extra = _existing(pip.get("extra-index-url", "")) if further else []
    settings = {
        "UV_DEFAULT_INDEX": " ".join(_existing(pip.get("index-url", ""))),
        "UV_INDEX": " ".join(extra),
        "UV_INDEX_STRATEGY": "unsafe-best-match" if extra else "",
        "UV_FIND_LINKS": ",".join(_existing(pip.get("find-links", ""))),
        "UV_INSECURE_HOST": " ".join(pip.get("trusted-host", "").split()),
        "SSL_CERT_FILE": pip.get("cert", ""),
        "UV_HTTP_TIMEOUT": pip.get("default-timeout") or pip.get("timeout", ""),
    }
    return {name: value for name, value in settings.items() if value and name not in environ}


async def pip_install(
    arguments: tuple[str, ...],
    on_line: Callable[[str], None] = lambda _: None,
    keep_open: int | None = None,
    pip: Mapping[str, str] | None = None,
) -> None:
    """Run `uv pip install` with the package indexes that pip is configured to use. Raises ChildFailed.

    pip: its configuration where the caller has read it already.

    pip takes the best file of all its indexes; uv takes a version from the first index that has it, even if the
    files there are fewer. So the further indexes are only asked for what the first one does not have.
    """
    command = (find_uv_bin(), "pip", "install", *arguments)
    pip = await _pip_config() if pip is None else pip
    environment = child_environment({"UV_NO_PROGRESS": "1", "NO_COLOR": "1"})
    try:
        await run(command, environment | uv_settings(pip, environment), on_line, keep_open)
    except ChildFailed as failure:
        further = uv_settings(pip, environment, further=True)
        if "UV_INDEX" not in further or not _is_not_there(failure.tail):
            raise
        await run(command, environment | further, on_line, keep_open)


async def _install(made_of: Recipe, folder: Path, say: "_Announcer", lock: int) -> None:
    """Make the environment in place: a virtual environment cannot be moved, so a mark says when it is whole."""
    venv = ("venv", "--quiet", "--no-project", "--python", sys.executable, str(folder))
    try:
        await run((find_uv_bin(), *venv), child_environment())
        pip = await _pip_config()
        if made_of.torch:
            await _install_torch(made_of.torch, folder, say, lock, pip)
        say.stage("choosing packages", 0.3, 1.0)
        await pip_install(_arguments(folder, made_of.locks), say, lock, pip)
    except ChildFailed as failure:
        raise EngineEnvironmentError(
            f"{say.title} failed. Check the network and the package index that pip is configured to use, "
            f"then start again; what was downloaded is kept. The installer's last words:\n{failure.tail}"
        ) from failure


async def _install_torch(
    alternatives: tuple[tuple[Path, ...], ...], folder: Path, say: "_Announcer", lock: int, pip: Mapping[str, str]
) -> None:
    """Install the first alternative that the package indexes of this machine have, for this Python."""
    say.stage("looking for the CPU build of torch", 0.0, 0.3)
    for number, files in enumerate(alternatives, 1):
        try:
            await pip_install(_arguments(folder, files), say, lock, pip)
            break
        except ChildFailed as failure:
            if number == len(alternatives) or not _is_not_there(failure.tail):
                raise
            say.stage("no package index here has the CPU build of torch, so the large build is taken", 0.0, 0.3)


def _arguments(folder: Path, locks: tuple[Path, ...]) -> tuple[str, ...]:
    files = (word for lock in locks for word in ("-r", str(lock)))
    return ("--python", str(folder / "bin" / "python"), "--no-deps", "--require-hashes", *files)


def _is_not_there(tail: str) -> bool:
    """Whether uv failed because no index has such a file for this Python with this hash; not for the network."""
    return any(words in tail for words in ("unsatisfiable", "Hash mismatch", "not found in the package registry"))


class _Announcer:
    """Turns uv's lines into reports, for one stage of the installation after another."""

    def __init__(self, title: str, report: Report) -> None:
        # State: how far uv is in this stage, and which part of the whole the stage is.
        self.title = title
        self._report = report
        self._seen = Download()
        self._part = (0.0, 1.0)

    def __repr__(self) -> str:
        return f"<_Announcer {self.title}: {self._seen.detail}>"

    def stage(self, detail: str, start: float, end: float) -> None:
        self._part = (start, end)
        self._tell(Download(detail=detail))

    def __call__(self, line: str) -> None:
        if (seen := read_uv_line(self._seen, line)) != self._seen:
            self._tell(seen)

    def _tell(self, seen: Download) -> None:
        self._seen = seen
        start, end = self._part
        self._report(f"{self.title}: {seen.detail}", start + (end - start) * seen.share)


def _counted(seen: Download) -> Download:
    """uv announces a package as its download begins, so the share never goes back when one more appears."""
    waiting = seen.sizes.keys() - seen.fetched
    left = sum(seen.sizes[name] for name in waiting)
    total = sum(seen.sizes.values()) or 1
    largest = max(waiting, key=lambda name: seen.sizes[name], default="")
    detail = f"downloading {largest}, {left / 2**20:.0f} MiB to go" if largest else "downloading"
    return Download(seen.sizes, seen.fetched, detail, max(seen.share, 0.9 * (1 - left / total)))


async def _pip_config() -> dict[str, str]:
    """Ask the pip of the Python that we were made from; without one, its variables in our environment."""
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    lines: list[str] = []
    argv = (str(python), "-m", "pip", "--disable-pip-version-check", "config", "list")
    with contextlib.suppress(ChildFailed, OSError, TimeoutError):
        async with asyncio.timeout(_PIP_TIMEOUT):
            await run(argv, child_environment(), lines.append)
    variables = {k[4:].lower().replace("_", "-"): v for k, v in os.environ.items() if k.startswith("PIP_")}
    return parse_pip_config("\n".join(lines)) | variables


def _existing(words: str) -> list[str]:
    return [word for word in words.split() if (path := _local_path(word)) is None or path.exists()]


def _local_path(word: str) -> Path | None:
    parts = urlsplit(word)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return None if parts.scheme else Path(word)


def _imports(worker: str) -> tuple[str, ...]:
    """The modules of the three parts of an engine: server, core and worker."""
    parts = ("entrypoints.openai.api_server", "v1.engine.core", f"v1.worker.{worker}_worker")
    return tuple(f"vllm.{part}" for part in parts)
