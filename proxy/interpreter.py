"""Which Python the proxy is set up with: `python3`, or the fastest one of the same version on this machine.

Builds of one version differ by a fifth in speed: those of distributions are optimized with a profile, those that pyenv
compiles are not unless asked. `make setup` runs this file before there is anything to import but the standard library;
it prints the path of the interpreter.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

_WORTH = 0.9  # of the time that python3 takes; a smaller gain is no reason for a surprise
_USUAL = ("/usr/local/bin", "/usr/bin")
_TIMES = 3
_PATIENCE = 20.0  # seconds for an interpreter to start and answer


def candidates(folders: Iterable[str], name: str) -> list[str]:
    """Return the different files of this name in some folders, without links."""
    found = (shutil.which(name, path=folder) for folder in folders)
    return list(dict.fromkeys(os.path.realpath(file) for file in found if file))


def choose(default: str, seconds: Mapping[str, float]) -> str:
    """Return the interpreter that took the fewest seconds for the same work, if that is worth leaving the default."""
    best = min(seconds, key=lambda python: seconds[python], default=default)
    return best if seconds.get(best, 0.0) < _WORTH * seconds.get(default, 0.0) else default


def usable(*, headers: bool) -> bool:
    """Say whether this interpreter can make environments, and has what engines compile with."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return False
    return not headers or has_headers()


def has_headers() -> bool:
    """Say whether this interpreter has the header files of its C interface."""
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


def work() -> float:
    """Return the seconds that a little of what a proxy does most takes: calls, attributes, dictionaries, bytes."""

    class Counter:
        __slots__ = ("count",)

        def __init__(self) -> None:
            self.count = 0

        def add(self, by: int) -> int:
            self.count += by
            return self.count

    counter, seen = Counter(), {}
    started = time.perf_counter()
    for i in range(60_000):
        line = (b"name", i)
        name, value = line
        seen[value & 255] = counter.add(len(name))
    return time.perf_counter() - started


def _timed(python: str, *, headers: bool) -> float | None:
    """Return the seconds of another interpreter's work; None for one that cannot be used."""
    command = [python, "-I", __file__, "--time", *(["--headers"] if headers else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
        return float(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _find() -> str:
    """Return the interpreter to use. Each is timed several times in turn, as other programs run beside it."""
    default = os.path.realpath(sys.executable)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    headers = has_headers()
    found = [default, *candidates((*os.get_exec_path(), *_USUAL), version)]
    seconds: dict[str, float] = {}
    for _ in range(_TIMES):
        for python in found:
            if (taken := _timed(python, headers=headers)) is not None:
                seconds[python] = min(taken, seconds.get(python, taken))
    best = choose(default, seconds)
    if best != default:
        print(f"python: {best}, {seconds[default] / seconds[best]:.1f} times as fast as python3", file=sys.stderr)
    return best


def main(arguments: list[str]) -> int:
    """Print the path of the interpreter, or with --time the seconds of this one's own work."""
    if "--time" not in arguments:
        print(_find())
        return 0
    if not usable(headers="--headers" in arguments):
        return 1
    print(min(work() for _ in range(3)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
