"""Rows on disk: what was appended is read, whatever has become of the last line."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.ledger import journal
from proxy.ledger.journal import JournalFull, Writer
from tests.ledger.rows import row

GENEROUS = 1024 * 1024 * 1024
texts = st.text(max_size=20)
rows = st.builds(row, st.integers(0, 99), alias=texts, request_id=texts, usd=st.none() | st.floats(0, 1e6))


def read_all(path: Path) -> list[object]:
    found, offset = [], 0
    while True:
        some, end = journal.read(path, offset)
        if end == offset:
            return found
        found, offset = found + some, end


def written(folder: Path, some: list[object]) -> Path:
    writer = Writer(folder, GENEROUS)
    writer.append(some)
    writer.close()
    (path,) = journal.segments(folder)
    return path


@given(st.lists(rows, min_size=1, max_size=8))
def test_what_is_appended_is_read(some):
    with TemporaryDirectory() as folder:
        assert read_all(written(Path(folder), some)) == some


@given(st.lists(rows, min_size=1, max_size=5), st.data())
def test_a_segment_cut_anywhere_gives_all_whole_lines_before_the_cut(some, data):
    with TemporaryDirectory() as folder:
        path = written(Path(folder), some)
        content = path.read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:cut])
        assert read_all(path) == some[: content[:cut].count(b"\n")]


@given(st.lists(rows, min_size=2, max_size=5), st.data())
def test_a_byte_that_has_changed_costs_no_other_line(some, data):
    with TemporaryDirectory() as folder:
        path = written(Path(folder), some)
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1).filter(lambda i: content[i] != 10))
        content[at] ^= data.draw(st.sampled_from([1, 2, 4, 64]))
        path.write_bytes(content)
        line = content[:at].count(10)
        found = read_all(path)
        if content[at] == 10:  # a line became two, of which neither is whole
            assert found == some[:line] + some[line + 1 :]
        else:
            assert found in (some[:line] + some[line + 1 :], some)


def test_a_segment_is_complete_once_its_writer_is_gone(tmp_path):
    writer = Writer(tmp_path, GENEROUS)
    writer.append([row(1)])
    (path,) = journal.segments(tmp_path)
    assert not journal.is_complete(path)
    writer.close()
    assert journal.is_complete(path)


def test_a_long_segment_is_followed_by_another(tmp_path):
    writer = Writer(tmp_path, GENEROUS)
    for number in range(5):
        writer.append([row(number, request_id="x" * 1_500_000)])
    assert [journal.is_complete(path) for path in journal.segments(tmp_path)] == [True, True, False]
    writer.close()


def test_all_writers_together_stay_below_the_limit(tmp_path):
    writers = [Writer(tmp_path, 1000), Writer(tmp_path, 1000)]
    appended = 0
    with pytest.raises(JournalFull):
        while True:
            writers[appended % 2].append([row(appended)])
            appended += 1
    assert appended >= 2
    assert journal.size(tmp_path) <= 1000
    for writer in writers:
        writer.close()
