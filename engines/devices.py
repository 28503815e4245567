"""What this machine has: memory, processor cores, NVIDIA GPUs. Read once, before any engine runs."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec

MIB = 2**20
_QUERY_TIMEOUT = 20.0  # seconds; the first nvidia-smi after boot loads the driver


class Gpu(msgspec.Struct, frozen=True):
    """One NVIDIA GPU, by its index in PCI order. total, free: bytes, 0 where the driver does not tell."""

    index: int
    name: str
    total: int
    free: int


class Machine(msgspec.Struct, frozen=True):
    """memory_total, memory_available: bytes that this process may use, the container's limits applied.

    cores: the processors that this process may run on.
    """

    memory_total: int
    memory_available: int
    cores: tuple[int, ...]
    gpus: tuple[Gpu, ...] = ()


def read_machine() -> Machine:
    """Read what this machine has now."""
    total, available = read_memory(Path("/"))
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return Machine(total, available, cores, read_gpus())


def read_memory(root: Path) -> tuple[int, int]:
    """Total and available bytes: the least of /proc/meminfo and the limits of every control group above us."""
    meminfo = parse_meminfo((root / "proc/meminfo").read_text())
    total, available = meminfo["MemTotal"], meminfo["MemAvailable"]
    for limit, used in _group_limits(root):
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return total, available


def parse_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo as bytes by name."""
    rows = (line.split(":", 1) for line in text.splitlines() if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in rows}


def parse_gpus(csv: str) -> tuple[Gpu, ...]:
    """The answer of `nvidia-smi --query-gpu=index,name,memory.total,memory.free --format=csv,noheader,nounits`."""
    rows = (tuple(cell.strip() for cell in line.split(",")) for line in csv.splitlines())
    return tuple(Gpu(int(r[0]), r[1], _mib(r[2]), _mib(r[3])) for r in rows if len(r) == 4 and r[0].isdigit())


def read_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that this process may use (CUDA_VISIBLE_DEVICES applied); () without a driver."""
    return visible(_all_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(gpus: tuple[Gpu, ...], setting: str | None) -> tuple[Gpu, ...]:
    """The GPUs that a CUDA_VISIBLE_DEVICES of indices lets through; names other than indices let all through."""
    if setting is None:
        return gpus
    words = [word.strip() for word in setting.split(",") if word.strip()]
    if not all(word.lstrip("-").isdigit() for word in words):
        return gpus
    return tuple(gpu for gpu in gpus if str(gpu.index) in words)


def _all_gpus() -> tuple[Gpu, ...]:
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    return _ask(smi) if smi else _from_driver(Path("/proc/driver/nvidia/gpus"))


def _ask(smi: str) -> tuple[Gpu, ...]:
    query = (smi, "--query-gpu=index,name,memory.total,memory.free", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_QUERY_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_gpus(done.stdout) if done.returncode == 0 else ()


def _from_driver(folder: Path) -> tuple[Gpu, ...]:
    """Where nvidia-smi is missing the driver still lists its GPUs, but not their memory."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return tuple(Gpu(index, "NVIDIA GPU", 0, 0) for index, _ in enumerate(found))


def _mib(cell: str) -> int:
    return int(float(cell) * MIB) if cell.replace(".", "", 1).isdigit() else 0


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each memory control group that holds us, version 1 and 2."""
    listing = root / "proc/self/cgroup"
    for line in listing.read_text().splitlines() if listing.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _climb(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _climb(root / "sys/fs/cgroup/memory", path, *v1)


def _climb(mount: Path, path: str, limit: str, usage: str, cache: str) -> Iterator[tuple[int, int]]:
    group = mount / path.lstrip("/")
    for folder in (group, *group.parents):
        if folder.is_relative_to(mount) and (value := _number(folder / limit)) is not None:
            # File cache that nobody uses is given back under pressure, so it is not in the way.
            yield value, (_number(folder / usage) or 0) - _statistic(folder / "memory.stat", cache)


def _number(file: Path) -> int | None:
    """The number in a file; None for `max`, or where there is no such file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    try:
        rows = dict(line.split() for line in file.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(rows.get(name, 0))
