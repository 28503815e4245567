"""A short run of the proof that nobody is given what is not his. See benchmarks/cache_safety.py."""

import asyncio

import pytest

from benchmarks.cache_safety import prove


@pytest.mark.parametrize("faults", [0.0, 0.15])
def test_nobody_gets_a_foreign_or_incomplete_answer(faults: float) -> None:
    found = asyncio.run(prove(1500, 32, 5, faults=faults))
    assert (found.requests, found.foreign, found.broken) == (1500, 0, 0)
    assert min(found.results[result] for result in ("hit", "miss", "joined")) > 0
    assert faults or (found.doubled, found.failed) == (0, 0)
