"""Real engines that are killed, stopped, cut off and slowed while clients ask: `make chaos`, but shorter."""

import asyncio

import pytest

from benchmarks import chaos

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300, func_only=True)]


@pytest.mark.usefixtures("interpreter")  # its installation is no part of this
def test_no_client_sees_that_engines_are_killed_stopped_cut_off_and_slowed() -> None:
    report = asyncio.run(chaos.run(seconds=12, rate=2, seed=3))
    assert report.missed == []
    assert report.restarts >= 1
    assert sum(report.faults.values()) >= 3
    assert len(report.stormy) >= 20
