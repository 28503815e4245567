"""Framing of server-sent events over any cut of the bytes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import sse
from proxy.errors import MalformedAnswer

EVENTS = [
    b'data: {"a": 1}\n\n',
    b"event: x\ndata: {}\n\n",
    b": comment\n\n",
    b"data: one\ndata: two\r\n\r\n",
    'data: {"t": "Привет 日本語"}\n\n'.encode(),
    b"data: [DONE]\n\n",
]


@given(st.lists(st.sampled_from(EVENTS), max_size=8), st.lists(st.integers(0, 200), max_size=12))
def test_events_come_whole_however_the_bytes_are_cut(events, cuts):
    stream, framer, got = b"".join(events), sse.Events(), []
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for start, end in itertools.pairwise(edges):
        got += framer.feed(stream[start:end])
    assert got == events
    assert framer.rest == b""


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=8))
def test_no_byte_is_lost_or_added(stream, cuts):
    framer, got = sse.Events(), b""
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for start, end in itertools.pairwise(edges):
        got += b"".join(framer.feed(stream[start:end]))
    assert got + framer.rest == stream


def test_an_event_without_end_is_refused_before_it_fills_the_memory():
    framer = sse.Events()
    with pytest.raises(MalformedAnswer):
        for _ in range(20):
            framer.feed(b"x" * 1024 * 1024)


def test_only_objects_in_data_lines_are_changed_and_line_ends_stay():
    event = b'event: {"a"}\ndata: {"a": 1}\r\ndata:{"b": 2}\ndata: [DONE]\nid: 7\n\n'
    changed = event.replace(b'{"a": 1}', b"!").replace(b'{"b": 2}', b"!")
    assert sse.map_data(event, lambda data: b"!") == changed


@given(st.lists(st.sampled_from(EVENTS), max_size=8))
def test_events_that_nothing_changes_in_stay_byte_for_byte(events):
    assert [sse.map_data(event, lambda data: data) for event in events] == events
