"""What of a prompt an endpoint has in its cache."""

import random
import re
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer import prefixes
from proxy.balancer.prefixes import PrefixTable

TEXT = st.binary(max_size=4000)
ROOM = 1e9


def read(text: bytes, **fields: bytes) -> prefixes.Prompt:
    return prefixes.read({"messages": text, **fields})


def table(endpoints: int = 2) -> PrefixTable:
    return PrefixTable(memoryview(array("d", bytes(8 * PrefixTable.size(endpoints)))), endpoints)


@given(TEXT, TEXT, TEXT)
def test_prompts_share_marks_as_far_as_they_share_blocks(common, one, other):
    a, b = read(common + one), read(common + other)
    shared = sum(x == y for x, y in zip(a.marks, b.marks, strict=False))
    assert shared >= len(read(common).marks)
    if one[:1] != other[:1]:
        assert a.marks[:shared] == read(common).marks[:shared]


@given(TEXT, st.binary(min_size=1, max_size=10))
def test_a_change_at_the_start_changes_every_mark(text, before):
    a, b = read(text), read(before + text)
    if not text.startswith(before):
        assert not set(a.marks) & set(b.marks)


def test_a_long_prompt_has_few_marks():
    assert len(read(b"x" * 100 * 1024).marks) < 40
    assert len(read(b"x" * 1024).marks) == 2


@pytest.mark.parametrize("field", ["tools", "system", "instructions", "prompt", "input"])
def test_every_field_that_makes_the_prompt_counts(field):
    assert read(b"x" * 1000, **{field: b"y" * 300}).marks != read(b"x" * 1000).marks


@pytest.mark.parametrize("field", ["temperature", "max_tokens", "user", "stream"])
def test_no_other_field_does(field):
    assert read(b"x" * 1000, **{field: b"1"}) == read(b"x" * 1000)


def test_equal_text_of_two_tenants_is_not_shared():
    text = {"messages": b"x" * 1000}
    assert not set(prefixes.read(text, "a").marks) & set(prefixes.read(text, "b").marks)
    assert not set(prefixes.read({**text, "cache_salt": b'"u"'}, "a").marks) & set(prefixes.read(text, "a").marks)


def test_a_picture_counts_for_what_it_is_and_not_for_its_bytes():
    picture = b'{"url":"data:image/png;base64,' + b"QUJD" * 100_000 + b'"}'
    assert read(picture).size < 5000
    assert read(picture + b"a" * 10_000).size > read(picture).size + 9_000


@given(st.lists(st.sampled_from([b";", b"; ", b";base64,QUJD", b";base64,", b"base64,", b"text"]), max_size=80))
def test_media_are_found_among_however_many_semicolons(pieces):
    text = b"".join(pieces)
    media = re.findall(rb";base64,[A-Za-z0-9+/=]*", text)
    assert read(text).size == len(text) - sum(map(len, media)) + 4000 * len(media)


def test_a_prompt_is_found_where_it_was_sent_and_nowhere_else():
    rows, prompt = table(), read(b"x" * 10_000)
    rows.note(prompt, 1, 10_000.0)
    nowhere, here = rows.found(prompt, [-ROOM, -ROOM])
    assert nowhere == 0
    assert 8_000 < here <= 10_000


def test_a_longer_prompt_is_found_as_far_as_the_shorter_one_goes():
    rows = table()
    rows.note(read(b"x" * 10_000), 0, 1.0)
    found = rows.found(read(b"x" * 10_000 + b"y" * 50_000), [-ROOM, -ROOM])
    assert 8_000 < found[0] <= 10_000


def test_what_was_sent_longer_ago_than_the_cache_holds_is_gone():
    rows, old, new = table(), read(b"x" * 10_000), read(b"y" * 10_000)
    rows.note(old, 0, 10_000.0)
    rows.note(new, 0, 20_000.0)
    assert rows.found(old, [20_000.0 - 15_000.0, 0.0])[0] > 0
    assert rows.found(old, [20_000.0 - 5_000.0, 0.0])[0] == 0
    assert rows.found(new, [20_000.0 - 5_000.0, 0.0])[0] > 0


def test_a_prompt_is_still_found_when_another_took_one_of_its_rows():
    rows, prompt = table(), read(b"x" * 50_000)
    rows.note(prompt, 0, 1.0)
    other = prefixes.Prompt(512, [prompt.marks[3] + prefixes.ROWS])
    rows.note(other, 1, 1.0)
    assert rows.found(prompt, [-ROOM, -ROOM])[0] > 40_000
    assert rows.found(other, [-ROOM, -ROOM]) == [0, 512]


@given(st.lists(st.tuples(st.integers(0, 2), TEXT), max_size=20), TEXT)
def test_no_more_is_found_than_the_prompt_has(sent, text):
    rows, prompt = table(3), read(text)
    for clock, (endpoint, other) in enumerate(sent):
        rows.note(read(other), endpoint, float(clock))
    assert all(0 <= found <= len(text) for found in rows.found(prompt, [-ROOM] * 3))


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3000)), max_size=20), st.integers(0, 20), st.integers(0, 3000)
)
def test_each_endpoint_is_found_to_have_the_longest_part_that_it_was_sent_of_late(sent, oldest, size):
    rows, text = table(3), random.Random(1).randbytes(3000)
    longest = [0, 0, 0]
    for clock, (endpoint, shared) in enumerate(sent):
        rows.note(read(text[:shared] + b"other" * 300), endpoint, float(clock))
        if clock > oldest:
            longest[endpoint] = max(longest[endpoint], shared)
    for have, found in zip(longest, rows.found(read(text[:size]), [float(oldest)] * 3), strict=True):
        assert min(have, size) - 600 < found <= min(have, size)
