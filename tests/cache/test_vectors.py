"""Vectors in memory: the nearest of its own partition is found, and there are never more than there may be."""

import asyncio
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache import vectors
from proxy.cache.vectors import MemoryVectors

ONE, OTHER = b"1" * 16, b"2" * 16


def toward(degrees):
    return np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))], np.float32)


def run(coroutine):
    return asyncio.run(coroutine)


def filled(capacity, *entries):
    made = MemoryVectors(capacity)

    async def fill():
        for partition, degrees, key in entries:
            await made.add(partition, toward(degrees), key)

    run(fill())
    return made


def test_the_nearest_is_found_with_its_cosine():
    made = filled(8, (ONE, 0, b"east"), (ONE, 90, b"north"), (ONE, 45, b"between"))
    near = run(made.nearest(ONE, toward(30)))
    assert near.key == b"between"
    assert near.similarity == pytest.approx(math.cos(math.radians(15)), abs=1e-6)


def test_another_partition_is_never_looked_at():
    made = filled(8, (ONE, 0, b"theirs"))
    assert run(made.nearest(OTHER, toward(0))) is None
    assert run(made.nearest(ONE[:8] + b"like one", toward(0))) is None


def test_the_oldest_gives_way():
    made = filled(2, (ONE, 0, b"a"), (ONE, 90, b"b"), (ONE, 180, b"c"))
    assert run(made.nearest(ONE, toward(0))).key == b"b"


def test_what_is_forgotten_is_not_found():
    made = filled(4, (ONE, 0, b"a"), (ONE, 90, b"b"))
    run(made.forget(ONE, b"a"))
    run(made.forget(ONE, b"a"))
    assert run(made.nearest(ONE, toward(0))).key == b"b"


def test_a_key_that_comes_again_moves():
    made = filled(2, (ONE, 0, b"a"), (ONE, 90, b"b"), (ONE, 180, b"a"))
    assert run(made.nearest(ONE, toward(90))).key == b"b"
    assert run(made.nearest(ONE, toward(180))).key == b"a"


def test_vectors_of_another_size_begin_anew():
    made = filled(4, (ONE, 0, b"a"))
    longer = np.array([1, 0, 0], np.float32)
    assert run(made.nearest(ONE, longer)) is None
    run(made.add(ONE, longer, b"b"))
    assert run(made.nearest(ONE, longer)).key == b"b"
    assert run(made.nearest(ONE, toward(0))) is None


@given(st.lists(st.tuples(st.sampled_from([ONE, OTHER]), st.integers(0, 359), st.binary(min_size=1, max_size=2))))
def test_what_is_found_is_what_a_search_through_the_newest_finds(entries):
    capacity = 5
    made = filled(capacity, *entries)
    rows: list[tuple[bytes, bytes, int] | None] = [None] * capacity
    written = 0
    for partition, degrees, key in entries:
        row = next((i for i, r in enumerate(rows) if r and r[:2] == (partition, key)), None)
        if row is None:
            row, written = written % capacity, written + 1
        rows[row] = (partition, key, degrees)
    for partition in (ONE, OTHER):
        near = run(made.nearest(partition, toward(17)))
        expected = [math.cos(math.radians(r[2] - 17)) for r in rows if r and r[0] == partition]
        assert (near is None) == (not expected)
        if near:
            assert near.similarity == pytest.approx(max(expected), abs=1e-5)


def test_a_vector_is_read_and_made_of_length_one():
    document = json.dumps({"object": "list", "data": [{"index": 0, "embedding": [3, 4.0]}], "model": "m"}).encode()
    assert vectors.read(document).tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(
    "document",
    [b"", b"no", b"{}", b'{"data":[]}', b'{"data":[{}]}', b'{"data":[{"embedding":[]}]}',
     b'{"data":[{"embedding":[0,0]}]}',
     b'{"data":[{"embedding":["x"]}]}', b'{"data":[{"embedding":[1e200]}]}', b"\xff"],
)  # fmt: skip
def test_what_is_no_vector_is_none(document):
    assert vectors.read(document) is None
