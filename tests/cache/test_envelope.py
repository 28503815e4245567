"""Entries as bytes: what was not written for this key by this version is nothing."""

from hypothesis import given
from hypothesis import strategies as st

from proxy.accounting import Usage
from proxy.cache import Entry, envelope

KEY = b"k" * 32
ENTRY = Entry("m", "m/0", "a", "chat", True, b"text/event-stream", b"data: {}\n\n", 1.5, 60.0, Usage(1, 2), "stop")


def test_an_entry_comes_back_as_it_was() -> None:
    assert envelope.decode(KEY, envelope.encode(KEY, ENTRY)) == ENTRY


def test_an_entry_is_none_under_another_key() -> None:
    assert envelope.decode(b"j" * 32, envelope.encode(KEY, ENTRY)) is None


@given(st.binary(max_size=200))
def test_foreign_bytes_are_no_entry(data: bytes) -> None:
    assert envelope.decode(KEY, data) is None
    assert envelope.decode(KEY, envelope.MAGIC + data) is None


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_makes_it_none(at: int, change: int) -> None:
    data = bytearray(envelope.encode(KEY, ENTRY))
    data[at % len(data)] ^= change
    assert envelope.decode(KEY, bytes(data)) is None


@given(st.integers(0, 10_000))
def test_a_part_of_an_entry_is_none(length: int) -> None:
    data = envelope.encode(KEY, ENTRY)
    assert envelope.decode(KEY, data[: length % len(data)]) is None
