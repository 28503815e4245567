"""Fetch a repository of the hub into the hub's own cache: `download.py ORG/NAME REVISION LINK`.

Run by the engine's interpreter, as a process of its own; LINK becomes a symbolic link to the snapshot. It prints one
JSON object per line: detail and progress, or error. HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are honoured.
"""

import fnmatch
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

USELESS = ("*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.tflite", "*.ot", "*.pth", "original/*", "onnx/*", ".git*")
OTHER_WEIGHTS = ("*.bin", "*.pt", "consolidated*.safetensors")
INTERVAL = 0.5  # seconds between two reports
GIB = 2**30


class Unusable(Exception):
    """The repository is there, but not what an engine can load."""


def main(repo: str, revision: str, link: str) -> int:
    """Download what vLLM needs of the repository; return the exit status."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is imported
    try:
        os.symlink(fetch(repo, revision), link)
    except Exception as failure:  # whatever it is, the engine cannot start, and a person must read why
        say(error=explain(failure, repo, revision))
        return 1
    return 0


def fetch(repo: str, revision: str) -> str:
    """Return the folder of the snapshot; what is in the cache is not fetched again."""
    from huggingface_hub import HfApi, constants, snapshot_download

    say("asking the hub", None)
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception as failure:
        if not is_unreachable(failure):
            raise
        skipped = [*USELESS, *OTHER_WEIGHTS]
        return str(snapshot_download(repo, revision=revision, ignore_patterns=skipped, local_files_only=True))
    if info.library_name == "mlx" or "mlx" in (info.tags or ()):
        raise Unusable("this is an MLX checkpoint, which vLLM does not load; use the original it was made from")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    chosen = needed(sizes)
    require_disk(Path(constants.HF_HUB_CACHE), sum(sizes[name] for name in chosen))
    bars = progress_class(sum(sizes[name] for name in chosen))
    return str(snapshot_download(repo, revision=revision, allow_patterns=chosen, tqdm_class=bars))


def needed(names: Iterable[str]) -> list[str]:
    """The files that vLLM loads: of several formats of the same weights only one."""
    kept = [name for name in names if not matches(name, USELESS)]
    if "config.json" not in kept and "params.json" not in kept:
        gguf = any(name.endswith(".gguf") for name in names)
        hint = "only GGUF files; use the original they were made from" if gguf else "no config.json"
        raise Unusable(f"this repository has {hint}, so it is not a checkpoint that vLLM loads")
    if any(name.endswith(".safetensors") and not matches(name, OTHER_WEIGHTS) for name in kept):
        kept = [name for name in kept if not matches(name, OTHER_WEIGHTS)]
    return kept


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file name matches one of some glob patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def require_disk(cache: Path, size: int) -> None:
    """Raise Unusable with both figures where the cache's disk has less than `size` bytes."""
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < size:
        raise Unusable(
            f"it takes {size / GIB:.1f} GiB of disk, but {cache} has {free / GIB:.1f} GiB free; "
            "make room, or set HF_HOME to a folder on another disk"
        )


def progress_class(total: int) -> Any:
    """A progress bar that reports bytes to the process that started us instead of drawing."""
    from huggingface_hub.utils import tqdm

    nowhere = io.StringIO()

    class Bar(tqdm):  # type: ignore[misc]
        spoken = 0.0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "file": nowhere})

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            if self.counts_bytes and time.monotonic() - Bar.spoken > INTERVAL:
                Bar.spoken = time.monotonic()
                say(f"{self.n / GIB:.2f} of {total / GIB:.2f} GiB", min(self.n / (total or 1), 1.0))
            return drawn

    return Bar


def is_unreachable(failure: BaseException) -> bool:
    """Whether the hub could not be spoken to, as against having said no."""
    ancestors = {cls.__name__ for cls in type(failure).__mro__}
    return not ancestors.isdisjoint({"TransportError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"})


def explain(failure: Exception, repo: str, revision: str) -> str:
    """One line for a person; never the token."""
    name = type(failure).__name__
    token = "the HF_TOKEN that is set" if os.environ.get("HF_TOKEN") else "no HF_TOKEN is set"
    if name == "GatedRepoError":
        return f"the hub lets only approved accounts have it ({token}): ask for access on its page, then set HF_TOKEN"
    if name == "RepositoryNotFoundError":
        return f"the hub has no such model, or it is private ({token}); a local folder is written ./{repo}"
    if name == "RevisionNotFoundError":
        return f"the hub has this model, but no revision {revision!r} of it"
    if isinstance(failure, Unusable):
        return str(failure)
    if is_unreachable(failure):
        return f"the hub could not be reached and the cache has no copy ({name}); check the network and HF_ENDPOINT"
    status = getattr(getattr(failure, "response", None), "status_code", None)
    return f"the hub answered with status {status} ({name})" if status else f"{name}: {failure}".splitlines()[0]


def say(detail: str = "", progress: float | None = None, error: str | None = None) -> None:
    """Report a step, or the final error, to the process that started us."""
    sys.stdout.write(json.dumps({"detail": detail, "progress": progress, "error": error}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
