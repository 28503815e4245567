"""The memory plan: which engine runs on what, and what is refused before a process is started."""

from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.devices import Gpu, Machine, parse_gpus, read_machine, read_memory, visible
from engines.memory import GIB, Footprint, Plan, PlanRefused, footprint_of_name, placed, plan, weights_bytes
from engines.spec import EngineSettings, EngineSpec, Simulation, command_line

SMALL = Footprint(parameters=134_515_008, stored_bytes=538_090_408)


def spec(model: str = "m", replica: int = 0, **settings: object) -> EngineSpec:
    return EngineSpec(model, replica, EngineSettings(**{"weights": "org/model", **settings}))  # type: ignore[arg-type]


def machine(gib: float = 16, cores: int = 4, *gpus: Gpu) -> Machine:
    return Machine(int(gib * GIB), int(gib * GIB), tuple(range(cores)), gpus)


def gpu(index: int = 0, gib: float = 80, free: float | None = None) -> Gpu:
    return Gpu(index, "NVIDIA H200", int(gib * GIB), int((gib if free is None else free) * GIB))


def planned(specs: list[EngineSpec], where: Machine, size: Footprint = SMALL) -> Plan:
    return plan(specs, {s.id: size for s in specs}, where)


def refusal(specs: list[EngineSpec], where: Machine, size: Footprint = SMALL) -> str:
    with pytest.raises(PlanRefused) as caught:
        planned(specs, where, size)
    return str(caught.value)


def of_name(one: EngineSpec) -> Footprint:
    return footprint_of_name(one.settings.weights or "")


def test_an_mlx_checkpoint_is_refused_with_the_checkpoint_to_use_instead() -> None:
    text = refusal([spec("vistral", weights="Vikhrmodels/Vistral-24B-Instruct-MLX_8bit")], machine())
    assert text == (
        "vistral/0: vLLM does not load MLX checkpoints; use Vikhrmodels/Vistral-24B-Instruct with quantization: fp8 "
        "in place of Vikhrmodels/Vistral-24B-Instruct-MLX_8bit"
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mlx-community/Qwen2.5-3B-Instruct-4bit", "use the original checkpoint or an AWQ checkpoint of it"),
        ("org/Qwen2.5-3B-Instruct-GGUF", "use the original, org/Qwen2.5-3B-Instruct or alike"),
    ],
)
def test_what_vllm_does_not_load_is_refused_with_a_hint(name: str, hint: str) -> None:
    assert hint in refusal([spec(weights=name)], machine())


def test_24_billion_parameters_in_8_bits_do_not_fit_into_14_gib() -> None:
    vistral = spec("vistral", weights="Vikhrmodels/Vistral-24B-Instruct", quantization="fp8", devices="cuda:0")
    text = refusal([vistral], machine(64, 4, gpu(0, 14)), of_name(vistral))
    assert "vistral/0: needs 24.9 GiB on cuda:0 (weights 22.4 GiB" in text
    assert "of its 14.0 GiB it has 12.9 GiB" in text
    assert "devices: cuda:0,1" in text


def test_the_share_that_the_user_gives_is_held_against_what_is_needed() -> None:
    vistral = spec("v", weights="org/V-24B", quantization="fp8", args={"gpu-memory-utilization": 0.175})
    text = refusal([vistral], machine(64, 4, gpu(0, 80)), of_name(vistral))
    assert "of its 80.0 GiB gpu-memory-utilization 0.175 gives it 14.0 GiB: raise it" in text


def test_an_engine_that_does_not_fit_into_memory_is_refused_with_both_figures() -> None:
    text = refusal([spec("big", weights="org/B-8B")], machine(14), Footprint(8_000_000_000))
    assert "big/0: needs 17.5 GiB of memory (weights 14.9 GiB, KV cache 1.0 GiB, overhead 1.6 GiB)" in text
    assert "but there are 14.0 GiB available" in text


def test_engines_that_fit_alone_but_not_together_are_refused_by_name() -> None:
    text = refusal([spec("a"), spec("b"), spec("c")], machine(8))
    assert text.startswith("c/0: needs 3.1 GiB")
    assert "6.2 GiB of that are for the engines before it" in text


def test_every_refusal_is_told_at_once() -> None:
    text = refusal([spec("a", devices="cuda:3"), spec("b", devices="cuda:1")], machine(16, 4, gpu(0)))
    assert "a/0: devices asks for cuda:3, but this machine has cuda:0 (NVIDIA H200)" in text
    assert "b/0: devices asks for cuda:1" in text


def test_without_a_gpu_an_engine_runs_on_the_processor_on_all_cores() -> None:
    found = planned([spec(dtype="float32")], machine(16, 4))
    placement, (row,) = found.placements["m/0"], found.rows
    assert placement.device == row.device == "cpu 0-3"
    assert placement.environment["OMP_PLACES"] == "{0,1,2,3}"
    assert placement.environment["OMP_NUM_THREADS"] == "3"
    assert row.weights == 134_515_008 * 4
    assert row.total == row.weights + row.kv + row.overhead
    assert row.share == pytest.approx(row.total / (16 * GIB))


def test_the_default_kv_cache_grows_with_memory_and_the_users_stays() -> None:
    roomy = planned([spec("a"), spec("b", env={"VLLM_CPU_KVCACHE_SPACE": "2"})], machine(64))
    assert [row.kv // GIB for row in roomy.rows] == [4, 2]
    assert roomy.placements["a/0"].environment["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert "VLLM_CPU_KVCACHE_SPACE" not in roomy.placements["b/0"].environment
    assert [row.kv // GIB for row in planned([spec("a"), spec("b")], machine(7)).rows] == [1, 1]


def test_the_users_own_binding_of_threads_is_left_alone() -> None:
    found = planned([spec(env={"VLLM_CPU_OMP_THREADS_BIND": "0-1"})], machine())
    assert set(found.placements["m/0"].environment) == {"VLLM_CPU_KVCACHE_SPACE"}
    assert found.placements["m/0"].args == {}


def test_an_engine_that_is_not_to_compile_needs_no_compiler() -> None:
    asked = [spec("a", args={"enforce-eager": True}), spec("b"), spec("c", args={"enforce-eager": False})]
    found = planned(asked, machine())
    eager = [name for name, placed in found.placements.items() if "TORCH_COMPILE_DISABLE" in placed.environment]
    assert eager == ["a/0"]


def test_an_engine_of_several_workers_keeps_its_worker_processes() -> None:
    found = planned([spec(args={"tensor-parallel-size": 2})], machine())
    assert found.placements["m/0"].args == {}
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in found.placements["m/0"].environment


def test_a_placement_is_added_to_the_command_line_and_the_users_settings_win() -> None:
    one = spec(args={"gpu-memory-utilization": 0.5, "max-num-seqs": 16}, env={"CUDA_VISIBLE_DEVICES": "7"})
    placement = planned([one], machine(16, 4, gpu(0))).placements["m/0"]
    result = placed(one, placement)
    words = command_line(result, "python", "/weights", "unix:/s")
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.5"
    assert "--max-num-seqs" in words
    assert result.settings.env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "7"}


def test_with_a_gpu_an_engine_takes_it_unless_it_asks_for_the_processor() -> None:
    found = planned([spec("a"), spec("b", devices="cpu")], machine(16, 4, gpu(1)))
    assert found.placements["a/0"].gpus == (1,)
    assert found.placements["a/0"].environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert found.placements["b/0"].device == "cpu 0-3"


def test_engines_that_may_choose_spread_over_the_gpus_largest_first() -> None:
    specs = [spec("small"), spec("large"), spec("medium")]
    sizes = {f"{s.model}/0": Footprint(n) for s, n in zip(specs, (1 * 10**9, 30 * 10**9, 8 * 10**9), strict=True)}
    found = plan(specs, sizes, machine(64, 4, gpu(0), gpu(1)))
    assert {id: p.gpus for id, p in found.placements.items()} == {"small/0": (1,), "large/0": (0,), "medium/0": (1,)}


def test_engines_on_one_gpu_share_it_by_what_they_need() -> None:
    specs = [spec("small"), spec("large")]
    found = plan(specs, {"small/0": Footprint(10**9), "large/0": Footprint(14 * 10**9)}, machine(64, 4, gpu(0)))
    small, large = (row.share for row in found.rows)
    assert small + large <= 0.92
    assert large > 5 * small


def test_an_engine_on_two_gpus_has_half_of_its_weights_on_each() -> None:
    one = spec(devices="cuda:0,1")
    found = planned([one], machine(64, 4, gpu(0, 24), gpu(1, 24)), Footprint(16 * 10**9))
    assert found.rows[0].weights == 16 * 10**9
    assert found.placements["m/0"].environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "--tensor-parallel-size" in command_line(one, "python", "/w", "unix:/s")


def test_memory_that_others_use_on_a_gpu_is_not_given_away() -> None:
    row = planned([spec()], machine(64, 4, gpu(0, 80, free=20))).rows[0]
    assert row.total <= 20 * GIB


def test_shares_over_the_whole_of_a_gpu_are_refused() -> None:
    specs = [spec(model, args={"gpu-memory-utilization": 0.6}) for model in "ab"]
    assert "cuda:0: gpu-memory-utilization adds up to more than 1 (a/0 0.6, b/0 0.6)" in refusal(
        specs, machine(64, 4, gpu(0))
    )


def test_a_gpu_whose_memory_nobody_tells_is_not_refused() -> None:
    found = planned([spec()], machine(16, 4, Gpu(0, "NVIDIA GPU", 0, 0)))
    assert found.placements["m/0"].args == {"gpu-memory-utilization": 0.92}


def test_a_simulator_needs_next_to_nothing() -> None:
    found = plan([spec(weights=None, simulator=Simulation())], {}, machine(0.1))
    assert found.rows[0].total == 60 * 2**20
    assert found.placements["m/0"].device == "simulator"


def test_weights_of_unknown_size_are_shown_as_unknown() -> None:
    row = plan([spec()], {}, machine()).rows[0]
    assert row.weights is None
    assert row.total == row.kv + row.overhead


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Vikhrmodels/Vistral-24B-Instruct", 24e9),
        ("Qwen/Qwen2.5-3B-Instruct", 3e9),
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135e6),
        ("mistralai/Mixtral-8x7B-v0.1", 56e9),
        ("Qwen/Qwen3-30B-A3B", 30e9),
        ("google/gemma-2-2b-it", 2e9),
        ("Qwen/Qwen2.5-0.5B", 0.5e9),
        ("org/model-8bit", None),
        ("BAAI/bge-m3", None),
    ],
)
def test_parameters_are_read_from_a_name(name: str, parameters: float | None) -> None:
    assert footprint_of_name(name).parameters == parameters


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({}, 2),
        ({"dtype": "float32"}, 4),
        ({"dtype": "bfloat16"}, 2),
        ({"quantization": "fp8"}, 1),
        ({"quantization": "int8_per_channel_weight_only"}, 1),
        ({"quantization": "awq", "dtype": "float16"}, 0.5),
        ({"quantization": "gptq_marlin"}, 0.5),
        ({"quantization": "bitsandbytes"}, 0.5),
        ({"weights": "org/Model-7B-AWQ"}, 0.5),
        ({"weights": "org/Model-7B-FP8"}, 1),
    ],
)
def test_bytes_per_parameter_follow_quantization_then_name_then_dtype(
    settings: dict[str, object], width: float
) -> None:
    assert weights_bytes(spec(**settings), Footprint(1000)) == 1000 * width


def test_files_count_as_they_are_unless_they_are_loaded_otherwise() -> None:
    files = Footprint(parameters=100, stored_bytes=410)
    assert weights_bytes(spec(), files) == 410
    assert weights_bytes(spec(dtype="bfloat16"), files) == 200
    assert weights_bytes(spec(dtype="float16"), Footprint(100, 60, quantized=True)) == 60


@given(st.integers(1, 12), st.integers(1, 16))
def test_engines_never_leave_the_cores_of_the_machine_and_share_none_needlessly(engines: int, cores: int) -> None:
    found = planned([spec("m", n) for n in range(engines)], machine(1000, cores))
    own = [p.cores for p in found.placements.values()]
    used = [core for each in own for core in each]
    assert set(used) <= set(range(cores))
    assert all(own)
    if engines <= cores:
        assert sorted(used) == list(range(cores))
        assert max(map(len, own)) - min(map(len, own)) <= 1
    else:
        assert max(used.count(core) for core in range(cores)) <= -(-engines // cores)


@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["auto", "cuda:0", "cuda:1", "cuda:0,1"])), max_size=8))
def test_no_gpu_is_ever_promised_more_than_once(wanted: list[tuple[int, str]]) -> None:
    specs = [spec(f"m{n}", devices=devices) for n, (_, devices) in enumerate(wanted)]
    sizes = {s.id: Footprint(billions * 10**9) for s, (billions, _) in zip(specs, wanted, strict=True)}
    try:
        found = plan(specs, sizes, machine(1000, 4, gpu(0), gpu(1)))
    except PlanRefused as refused:
        assert refused.reasons
        return
    sums: dict[int, float] = defaultdict(float)
    for row in found.rows:
        assert row.total >= (row.weights or 0) + row.overhead
        for index in found.placements[row.engine].gpus:
            sums[index] += row.share
    assert all(total <= 0.921 for total in sums.values())


MEMINFO = "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:   8388608 kB\nHugePages_Total:       0\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_memory_without_control_groups_is_that_of_the_machine(tmp_path: Path) -> None:
    assert read_memory(tree(tmp_path, {})) == (16 * GIB, 8 * GIB)


def test_the_limit_of_a_container_counts_less_what_it_uses_but_for_unused_file_cache(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {GIB}\n",
    }
    assert read_memory(tree(tmp_path, files)) == (4 * GIB, 2 * GIB)


def test_the_limit_of_an_old_control_group_counts_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/x\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    }
    assert read_memory(tree(tmp_path, files)) == (2 * GIB, GIB)


def test_this_machine_can_be_read() -> None:
    found = read_machine()
    assert 0 < found.memory_available <= found.memory_total
    assert found.cores


def test_the_answer_of_nvidia_smi_is_understood() -> None:
    csv = "0, NVIDIA H200, 143771, 143000\n1, NVIDIA GB10, [N/A], [N/A]\nNo devices were found\n"
    mib = 2**20
    assert parse_gpus(csv) == (Gpu(0, "NVIDIA H200", 143771 * mib, 143000 * mib), Gpu(1, "NVIDIA GB10", 0, 0))


@pytest.mark.parametrize(("setting", "seen"), [(None, [0, 1]), ("1", [1]), ("", []), ("-1", []), ("GPU-ab", [0, 1])])
def test_gpus_that_the_user_hides_are_not_used(setting: str | None, seen: list[int]) -> None:
    assert [g.index for g in visible((gpu(0), gpu(1)), setting)] == seen
