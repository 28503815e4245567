"""A worker's rows on their way to disk."""

import asyncio
from pathlib import Path

from proxy.ledger import Row, journal
from proxy.ledger.journal import Writer
from proxy.ledger.recorder import Both, Recorder
from proxy.metrics import Metrics
from proxy.telemetry import UNKNOWN
from tests.ledger.rows import finished

GENEROUS = 1024 * 1024 * 1024


def on_disk(folder: Path) -> list[Row]:
    return [row for path in journal.segments(folder) for row in journal.read(path, 0)[0]]


def test_each_request_becomes_one_row_with_an_id_of_its_own(tmp_path):
    recorder = Recorder(Writer(tmp_path, GENEROUS), clock=lambda: 1_800_000_000.0)
    for number in range(3):
        recorder.finished(finished(tokens_out=number))
    recorder.flush()
    recorder.flush()
    rows = on_disk(tmp_path)
    assert [row.tokens_out for row in rows] == [0, 1, 2]
    assert len({row.id for row in rows}) == 3
    assert {(r.day, r.alias, r.model, r.key_id, r.request_id, r.usd) for r in rows} == {
        ("2027-01-15", "gpt", "small", "0123456789abcdef", "abc", 0.25)
    }


def test_what_named_no_model_is_not_noted(tmp_path):
    recorder = Recorder(Writer(tmp_path, GENEROUS))
    recorder.finished(finished(model=UNKNOWN, endpoint=""))
    recorder.flush()
    assert on_disk(tmp_path) == []


def test_rows_that_the_disk_does_not_take_are_written_later_in_their_order(tmp_path):
    folder = tmp_path / "journal"
    folder.write_text("in the way")
    recorder = Recorder(Writer(folder, GENEROUS))
    recorder.finished(finished(tokens_in=1))
    recorder.flush()
    folder.unlink()
    recorder.finished(finished(tokens_in=2))
    recorder.flush()
    assert [row.tokens_in for row in on_disk(folder)] == [1, 2]


def test_a_recorder_that_is_stopped_writes_what_it_has(tmp_path):
    async def scenario() -> None:
        recorder = Recorder(Writer(tmp_path, GENEROUS))
        running = asyncio.create_task(recorder.run())
        await asyncio.sleep(0)
        recorder.finished(finished())
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scenario())
    assert len(on_disk(tmp_path)) == 1
    assert journal.is_complete(journal.segments(tmp_path)[0])


def test_the_ledger_takes_nothing_away_from_the_metrics(tmp_path):
    from proxy.config import Config

    metrics, recorder = Metrics(Config()), Recorder(Writer(tmp_path, GENEROUS))
    both = Both(metrics, recorder)
    both.finished(finished())
    recorder.flush()
    assert len(on_disk(tmp_path)) == 1
    assert b"polyvox_requests_total" in metrics.page("")[1]
