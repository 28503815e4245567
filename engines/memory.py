"""Which engine runs on what: specs x sizes x machine -> placements, or a refusal with both figures.

Pure: sizes come from `weights.footprint`, the machine from `devices.read_machine`, read once before any engine runs.
`plan` decides in these steps:
 (1) refuse what vLLM does not load, whatever the memory;
 (2) give each engine a device: what it asks for, else the roomiest GPU, else, without GPUs, the processor;
 (3) share each GPU among its engines in proportion to what they need;
 (4) share cores and memory of the machine among the engines on the processor.
"""

import itertools
import re
from collections.abc import Mapping, Sequence

import msgspec

from engines.devices import Gpu, Machine
from engines.spec import EngineSpec, Scalar, cuda_indices

GIB = 2**30

# Measured with vLLM 0.32 on CPU: the API server and the engine's core take 1.6 GiB beside weights and KV cache,
# and a worker of its own, which tensor parallelism needs, 0.6 GiB more.
CPU_OVERHEAD = int(1.6 * GIB)
CPU_WORKER_OVERHEAD = int(0.6 * GIB)
# CUDA context, activations and graphs of a GPU engine, and the least KV cache that serves a conversation.
GPU_OVERHEAD = int(1.5 * GIB)
GPU_LEAST_KV = GIB
# What vLLM takes of a GPU by itself; the rest is left to the driver and to fragmentation.
GPU_SHARE = 0.92
SIMULATOR = 60 * 2**20
_CPU_KV_CHOICES = (4, 3, 2, 1)  # GiB
_CPU_KV_SHARE = 0.7  # of available memory that engines may take before the default KV cache is made smaller

_PARALLEL = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size", "distributed-executor-backend")
_DTYPE_BYTES = {"float32": 4.0, "float": 4.0, "float16": 2.0, "half": 2.0, "bfloat16": 2.0}
_EIGHT_BITS = re.compile(r"fp8|int8|mxfp8|w8a8|w8a16|8[-_]?bit", re.IGNORECASE)
_FOUR_BITS = re.compile(r"awq|gptq|int4|fp4|w4a16|4[-_]?bit|bitsandbytes|bnb", re.IGNORECASE)
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([BM])(?![A-Za-z0-9])", re.IGNORECASE)
_MLX = re.compile(r"(^|[-_.])MLX([-_.].*)?$", re.IGNORECASE)
_GGUF = re.compile(r"[-_.]GGUF$", re.IGNORECASE)


class Footprint(msgspec.Struct, frozen=True):
    """The size of weights, as far as it is known. stored_bytes: of the files. quantized: the files are quantized."""

    parameters: int | None = None
    stored_bytes: int | None = None
    quantized: bool = False


class Placement(msgspec.Struct, frozen=True):
    """Where an engine runs. environment and args are to be added to those of its settings, which win."""

    device: str
    cores: tuple[int, ...] = ()
    gpus: tuple[int, ...] = ()
    environment: dict[str, str] = {}
    args: dict[str, Scalar] = {}


class Row(msgspec.Struct, frozen=True):
    """One line of the plan for people: bytes on its device. share: of the device's memory that it gets, 0 to 1.

    weights is None where nobody knows before they are fetched; then they count as nothing.
    """

    engine: str
    device: str
    weights: int | None
    kv: int
    overhead: int
    total: int
    share: float


class Plan(msgspec.Struct, frozen=True):
    """Placements by the id of their engine, and the same as rows to print."""

    placements: dict[str, Placement]
    rows: tuple[Row, ...]


class PlanRefused(Exception):
    """Some engines cannot run here; one sentence for each, with what it needs, what there is and what helps."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("\n".join(reasons))
        self.reasons = tuple(reasons)


class _Need(msgspec.Struct, frozen=True):
    spec: EngineSpec
    weights: int | None

    @property
    def bytes(self) -> int:
        return self.weights or 0


def plan(specs: Sequence[EngineSpec], footprints: Mapping[str, Footprint], machine: Machine) -> Plan:
    """Place all engines of a server, or raise PlanRefused. footprints: by the id of the engine."""
    reasons = [f"{s.id}: {why}" for s in specs if (why := unloadable(s.settings.weights)) is not None]  # (1)
    if reasons:
        raise PlanRefused(reasons)
    needs = [_Need(s, weights_bytes(s, footprints.get(s.id, Footprint()))) for s in specs]
    engines = [need for need in needs if need.spec.settings.simulator is None]
    homes, reasons = _devices(engines, machine)  # (2)
    placed = [_simulated(need.spec, machine) for need in needs if need.spec.settings.simulator is not None]
    on_gpu = [need for need in engines if homes.get(need.spec.id)]
    on_cpu = [need for need in engines if homes.get(need.spec.id) == ()]
    gpu_placed, gpu_reasons = _on_gpus(on_gpu, homes, machine)  # (3)
    cpu_placed, cpu_reasons = _on_cpu(on_cpu, machine)  # (4)
    if reasons := [*reasons, *gpu_reasons, *cpu_reasons]:
        raise PlanRefused(reasons)
    found = {row.engine: (placement, row) for placement, row in (*placed, *gpu_placed, *cpu_placed)}
    return Plan({s.id: found[s.id][0] for s in specs}, tuple(found[s.id][1] for s in specs))


def placed(spec: EngineSpec, placement: Placement) -> EngineSpec:
    """The spec with what its placement adds; what its settings say themselves stays."""
    settings = spec.settings
    args = {**placement.args, **settings.args}
    environment = {**placement.environment, **settings.env}
    return msgspec.structs.replace(spec, settings=msgspec.structs.replace(settings, args=args, env=environment))


def unloadable(weights: str | None) -> str | None:
    """Why vLLM does not load a hub's checkpoint of this name, and what to use instead; None where it may well do."""
    if weights is None or weights.startswith(("wheel:", "/", ".", "~")):
        return None
    name = weights.partition("@")[0]
    organisation, _, model = name.rpartition("/")
    if organisation.lower().startswith("mlx-") or _MLX.search(model):
        original = "the original checkpoint" if organisation.lower().startswith("mlx-") else _MLX.sub("", name)
        return f"vLLM does not load MLX checkpoints; use {original}{_instead_of_mlx(model)} in place of {name}"
    if _GGUF.search(model):
        return f"vLLM does not load GGUF files from the hub; use the original, {_GGUF.sub('', name)} or alike"
    return None


def _instead_of_mlx(model: str) -> str:
    if _EIGHT_BITS.search(model):
        return " with quantization: fp8"
    return " or an AWQ checkpoint of it" if _FOUR_BITS.search(model) else ""


def footprint_of_name(name: str) -> Footprint:
    """Guess parameters from a name: 24B, 135M, 8x7B; of several sizes (30B-A3B) the largest."""
    sizes = [
        int(times or 1) * float(number) * (1e9 if unit in "bB" else 1e6) for times, number, unit in _SIZE.findall(name)
    ]
    return Footprint(int(max(sizes))) if sizes else Footprint()


def weights_bytes(spec: EngineSpec, footprint: Footprint) -> int | None:
    """Bytes of the weights once loaded: files that are quantized or wanted as they are, else parameters x width."""
    settings = spec.settings
    if settings.simulator is not None:
        return 0
    as_stored = settings.quantization is None and (settings.dtype == "auto" or footprint.parameters is None)
    if footprint.stored_bytes is not None and (footprint.quantized or as_stored):
        return footprint.stored_bytes
    if footprint.parameters is None:
        return footprint.stored_bytes
    return int(footprint.parameters * _width(spec))


def _width(spec: EngineSpec) -> float:
    """Bytes per parameter: from `quantization`, else from the checkpoint's name, else from `dtype`."""
    settings = spec.settings
    for words in (settings.quantization, settings.weights if settings.dtype == "auto" else None):
        if words and _EIGHT_BITS.search(words):
            return 1.0
        if words and _FOUR_BITS.search(words):
            return 0.5
    return _DTYPE_BYTES.get(settings.dtype, 2.0)


def _devices(needs: Sequence[_Need], machine: Machine) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Indices of the GPUs of each engine, () for the processor. The engines that may choose do so largest first."""
    homes: dict[str, tuple[int, ...]] = {}
    reasons: list[str] = []
    there = {gpu.index for gpu in machine.gpus}
    free = {gpu.index: _usable(gpu) for gpu in machine.gpus}
    for need in sorted(needs, key=lambda n: (n.spec.settings.devices == "auto", -n.bytes)):
        wanted = need.spec.settings.devices
        chosen = cuda_indices(wanted) if wanted != "auto" else _roomiest(free)
        if missing := set(chosen) - there:
            reasons.append(_no_such_gpu(need.spec, missing, machine))
            continue
        homes[need.spec.id] = chosen
        for index in chosen:
            free[index] -= _gpu_need(need, len(chosen))
    return homes, reasons


def _roomiest(free: Mapping[int, int]) -> tuple[int, ...]:
    return (max(free, key=lambda index: (free[index], -index)),) if free else ()


def _on_gpus(
    needs: Sequence[_Need], homes: Mapping[str, tuple[int, ...]], machine: Machine
) -> tuple[list[tuple[Placement, Row]], list[str]]:
    shares: dict[str, float] = {}
    reasons: list[str] = []
    for gpu in machine.gpus:
        here = [need for need in needs if gpu.index in homes[need.spec.id]]
        found, refused = _share_gpu(gpu, here, homes)
        reasons += refused
        # An engine on several GPUs takes the same share of each: the least that it got.
        shares |= {id: min(share, shares.get(id, 1.0)) for id, share in found.items()}
    if reasons:
        return [], reasons
    gpus = {gpu.index: gpu for gpu in machine.gpus}
    return [_gpu_placement(n, [gpus[i] for i in homes[n.spec.id]], shares[n.spec.id]) for n in needs], []


def _share_gpu(
    gpu: Gpu, needs: Sequence[_Need], homes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, float], list[str]]:
    """The share of a GPU's memory for each engine: as its args say, the others by what they need."""
    fixed = {n.spec.id: share for n in needs if (share := _fixed_share(n.spec)) is not None}
    wanted = {n.spec.id: _gpu_need(n, len(homes[n.spec.id])) for n in needs}
    if sum(fixed.values()) > 1:
        listed = ", ".join(f"{id} {share:g}" for id, share in fixed.items())
        return {}, [f"cuda:{gpu.index}: gpu-memory-utilization adds up to more than 1 ({listed}): lower some of them"]
    left = (_usable(gpu) / gpu.total if gpu.total else GPU_SHARE) - sum(fixed.values())
    sought = sum(size for id, size in wanted.items() if id not in fixed) or 1
    shares = fixed | {id: max(left, 0) * size / sought for id, size in wanted.items() if id not in fixed}
    short = [n for n in needs if gpu.total and wanted[n.spec.id] > shares[n.spec.id] * gpu.total]
    return shares, [_gpu_refusal(n, gpu, wanted, shares, n.spec.id in fixed) for n in short]


def _gpu_placement(need: _Need, gpus: Sequence[Gpu], share: float) -> tuple[Placement, Row]:
    indices = tuple(gpu.index for gpu in gpus)
    device = "cuda:" + ",".join(map(str, indices))
    # Rounded down, so that the shares of a GPU never add up to more than there is.
    share = share if _fixed_share(need.spec) is not None else int(share * 1000 + 1e-6) / 1000
    # nvidia-smi counts in PCI order, CUDA by itself does not.
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, indices))}
    total = int(share * min(gpu.total for gpu in gpus))
    weights = None if need.weights is None else need.weights // len(gpus)
    kv = max(total - (weights or 0) - GPU_OVERHEAD, 0)
    placement = Placement(device, (), indices, environment, {"gpu-memory-utilization": share})
    return placement, Row(need.spec.id, device, weights, kv, GPU_OVERHEAD, total, share)


def _on_cpu(needs: Sequence[_Need], machine: Machine) -> tuple[list[tuple[Placement, Row]], list[str]]:
    default_kv = _default_kv(needs, machine)
    cores = _partition(machine.cores, len(needs))
    result: list[tuple[Placement, Row]] = []
    reasons: list[str] = []
    taken = 0
    for need, own in zip(needs, cores, strict=True):
        kv = _fixed_kv(need.spec)
        placement, row = _cpu_placement(need, own, default_kv if kv is None else kv, machine)
        if taken + row.total > machine.memory_available:
            reasons.append(_cpu_refusal(row, taken, machine))
        taken += row.total
        result.append((placement, row))
    return result, reasons


def _cpu_placement(need: _Need, cores: tuple[int, ...], kv: int, machine: Machine) -> tuple[Placement, Row]:
    spec = need.spec
    overhead = CPU_OVERHEAD + (0 if _in_one_process(spec) else CPU_WORKER_OVERHEAD)
    total = need.bytes + kv + overhead
    environment = {} if _fixed_kv(spec) is not None else {"VLLM_CPU_KVCACHE_SPACE": str(kv // GIB)}
    environment |= _processes(spec, cores)
    if spec.settings.args.get("enforce-eager"):
        # Or torch compiles at the first request for log probabilities: seconds, or the engine's end without a compiler.
        environment["TORCH_COMPILE_DISABLE"] = "1"
    device = f"cpu {_ranges(cores)}"
    args: dict[str, Scalar] = {"distributed-executor-backend": "uni"} if _in_one_process(spec) else {}
    row = Row(spec.id, device, need.weights, kv, overhead, total, total / max(machine.memory_available, 1))
    return Placement(device, cores, (), environment, args), row


def _processes(spec: EngineSpec, cores: tuple[int, ...]) -> dict[str, str]:
    """Keep an engine on its cores; by itself every vLLM binds to the first core of the machine. Users' settings win.

    One core of several is left to the HTTP server and the scheduler: threads that share it wait for each other.
    """
    if not _in_one_process(spec):
        ours = not _parallel(spec) and "VLLM_CPU_OMP_THREADS_BIND" not in spec.settings.env
        return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores[1:] or cores))} if ours else {}
    # Then vLLM leaves its threads unbound, and OpenMP keeps them on our cores instead.
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(len(cores) - 1, 1)),
        "OMP_PLACES": "{" + ",".join(map(str, cores)) + "}",
        "OMP_PROC_BIND": "true",
    }


def _in_one_process(spec: EngineSpec) -> bool:
    """Whether the model may run in the engine's core process, unless the user has other plans for its processes.

    Without a worker process of its own an engine starts a third faster and takes 0.6 GiB less.
    """
    own = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING")
    return not _parallel(spec) and not any(name in spec.settings.env for name in own)


def _parallel(spec: EngineSpec) -> bool:
    return any(name in spec.settings.args for name in _PARALLEL)


def _partition(cores: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """Cores for each of `count` engines: neighbours, as even as can be; in turn where there are more engines."""
    if count > len(cores):
        return [(cores[i % len(cores)],) for i in range(count)]
    bounds = [i * len(cores) // count for i in range(count + 1)] if count else []
    return [cores[start:end] for start, end in itertools.pairwise(bounds)]


def _default_kv(needs: Sequence[_Need], machine: Machine) -> int:
    """KV cache in bytes for the engines that do not say: 4 GiB each where memory is plenty, else down to 1."""
    open_ones = sum(1 for need in needs if _fixed_kv(need.spec) is None)
    rest = sum(n.bytes + CPU_OVERHEAD + (_fixed_kv(n.spec) or 0) for n in needs)
    budget = machine.memory_available * _CPU_KV_SHARE
    fitting = (gib * GIB for gib in _CPU_KV_CHOICES if rest + open_ones * gib * GIB <= budget)
    return next(fitting, _CPU_KV_CHOICES[-1] * GIB)


def _fixed_kv(spec: EngineSpec) -> int | None:
    """The KV cache that the user set, in bytes."""
    space = spec.settings.env.get("VLLM_CPU_KVCACHE_SPACE", "")
    if space.isdigit():
        return int(space) * GIB
    size = spec.settings.args.get("kv-cache-memory-bytes")
    return size if isinstance(size, int) else None


def _fixed_share(spec: EngineSpec) -> float | None:
    share = spec.settings.args.get("gpu-memory-utilization")
    return float(share) if isinstance(share, int | float) else None


def _usable(gpu: Gpu) -> int:
    return min(int(gpu.total * GPU_SHARE), gpu.free)


def _gpu_need(need: _Need, gpus: int) -> int:
    return need.bytes // gpus + GPU_OVERHEAD + GPU_LEAST_KV


def _simulated(spec: EngineSpec, machine: Machine) -> tuple[Placement, Row]:
    row = Row(spec.id, "simulator", 0, 0, SIMULATOR, SIMULATOR, SIMULATOR / max(machine.memory_available, 1))
    return Placement("simulator"), row


def _no_such_gpu(spec: EngineSpec, missing: set[int], machine: Machine) -> str:
    wanted = ", ".join(f"cuda:{index}" for index in sorted(missing))
    there = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in machine.gpus) or "no NVIDIA GPU"
    return f"{spec.id}: devices asks for {wanted}, but this machine has {there}: change `devices`"


def _gpu_refusal(need: _Need, gpu: Gpu, wanted: Mapping[str, int], shares: Mapping[str, float], fixed: bool) -> str:
    id = need.spec.id
    parts = f"weights {_gib(need.weights)}, KV cache at least {_gib(GPU_LEAST_KV)}, overhead {_gib(GPU_OVERHEAD)}"
    if fixed:
        has = f"gpu-memory-utilization {shares[id]:g} gives it {_gib(int(shares[id] * gpu.total))}"
        helps = "raise it, or"
    else:
        others = [other for other in wanted if other != id]
        beside = f" to share with {', '.join(others)}" if others else ""
        has, helps = f"it has {_gib(_usable(gpu))}{beside}", "use a smaller model,"
    more = "quantization: fp8 (half of 16 bits), or more GPUs (devices: cuda:0,1)"
    return (
        f"{id}: needs {_gib(wanted[id])} on cuda:{gpu.index} ({parts}), "
        f"but of its {_gib(gpu.total)} {has}: {helps} {more}"
    )


def _cpu_refusal(row: Row, taken: int, machine: Machine) -> str:
    parts = f"weights {_gib(row.weights)}, KV cache {_gib(row.kv)}, overhead {_gib(row.overhead)}"
    planned = f", and {_gib(taken)} of that are for the engines before it" if taken else ""
    return (
        f"{row.engine}: needs {_gib(row.total)} of memory ({parts}), but there are "
        f"{_gib(machine.memory_available)} available{planned}: use a smaller model or fewer engines, "
        "a smaller VLLM_CPU_KVCACHE_SPACE, or dtype: bfloat16"
    )


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"


def _ranges(cores: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> `0-2,5`."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
