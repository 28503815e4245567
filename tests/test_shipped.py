"""What we ship in config/ fits the machines it is meant for."""

from pathlib import Path

import pytest

from engines.devices import Gpu, Machine
from engines.memory import GIB, PlanRefused, plan
from engines.weights import footprint_of_name
from proxy import config

CONFIG = Path(__file__).parent.parent / "config"


def machine(gpu_gib: int) -> Machine:
    gpu = Gpu(0, "a GPU", gpu_gib * GIB, gpu_gib * GIB)
    return Machine(64 * GIB, 60 * GIB, tuple(range(8)), (gpu,))


def gpu_engines():
    specs = config.load(CONFIG / "gpu.yaml", {}).config.engines()
    return specs, {spec.id: footprint_of_name(str(spec.settings.weights)) for spec in specs}


def test_the_three_models_of_the_gpu_configuration_share_a_gpu_of_80_gb():
    specs, sizes = gpu_engines()
    placed = plan(specs, sizes, machine(80))
    weights = {row.engine: round((row.weights or 0) / 1e9) for row in placed.rows}
    assert weights == {"vistral/0": 24, "qwen/0": 6, "llama/0": 16}
    assert sum(row.share for row in placed.rows) <= 0.92


def test_a_gpu_that_is_too_small_for_them_is_refused_with_both_figures():
    specs, sizes = gpu_engines()
    with pytest.raises(PlanRefused, match=r"vistral/0: needs 24\.9 GiB on cuda:0 .* of its 24\.0 GiB it has"):
        plan(specs, sizes, machine(24))
