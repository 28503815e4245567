"""What `make chaos` takes for a sound answer, and what its relay does. The run itself: tests/real/test_chaos.py."""

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks.faults import Relay
from benchmarks.questions import FAR, HOME, Question, Said, Unsound, judge, read, simulated

STREAM = Question(HOME, 0, stream=True)
PLAIN = Question(HOME, 0, stream=False)
KNOWN = Said("The capital of France is Paris.", "stop", 8)


def chunk(id_: str = "a", **choice: object) -> dict[str, object]:
    return {"id": id_, "choices": [{"delta": {}, "finish_reason": None, **choice}]}


WHOLE = [
    chunk(delta={"role": "assistant", "content": ""}),
    chunk(delta={"content": "Paris"}),
    chunk(delta={"content": "."}, finish_reason="stop"),
    {"id": "a", "choices": [], "usage": {"completion_tokens": 2}},
]


def framed(events: list[dict[str, object]], end: str = "data: [DONE]\n\n") -> bytes:
    return ("".join(f"data: {json.dumps(e)}\n\n" for e in events) + end).encode()


def test_a_whole_stream_is_read():
    assert read(STREAM, 200, framed(WHOLE)) == Said("Paris.", "stop", 2)


def test_a_whole_document_is_read():
    message = {"message": {"content": "Paris."}, "finish_reason": "stop"}
    body = json.dumps({"choices": [message], "usage": {"completion_tokens": 2}})
    assert read(PLAIN, 200, body.encode()) == Said("Paris.", "stop", 2)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (framed(WHOLE, end=""), "DONE"),
        (framed(WHOLE, end="data: [DONE]\n\ndata: [DONE]\n\n"), "DONE"),
        (framed([WHOLE[0], *WHOLE]), "2 roles"),
        (framed(WHOLE[1:]), "0 roles"),
        (framed([*WHOLE[:2], WHOLE[3]]), "0 finishes"),
        (framed([*WHOLE[:3], *WHOLE[2:]]), "2 finishes"),
        (framed(WHOLE[:3]), "0 usages"),
        (framed([*WHOLE[:3], {**WHOLE[3], "id": "b"}]), "2 ids"),
        (framed([*WHOLE, {"error": {"message": "broken"}}]), "broken"),
        (b"data: {\n\ndata: [DONE]\n\n", "not an answer"),
        (b"", "DONE"),
    ],
)
def test_a_stream_that_is_not_whole_is_unsound(body: bytes, problem: str):
    with pytest.raises(Unsound, match=problem):
        read(STREAM, 200, body)


@pytest.mark.parametrize(("status", "body"), [(503, b'{"error": {}}'), (200, b'{"choices": ['), (200, b"{}")])
def test_a_document_that_is_no_answer_is_unsound(status: int, body: bytes):
    with pytest.raises(Unsound):
        read(PLAIN, status, body)


def test_who_has_spoken_is_told_from_the_words():
    count = STREAM.max_tokens
    begun = "The capital of"
    rest = simulated(3, count - 3)
    assert judge(STREAM, KNOWN, KNOWN) == "engine"
    assert judge(STREAM, Said(simulated(0, count), "length", count), KNOWN) == "cloud"
    assert judge(STREAM, Said(f"{begun} {rest}", "length", count), KNOWN) == "engine, cloud"
    assert judge(Question(FAR, 0, stream=True), Said("simulated token 1 is a", "stop", 6), KNOWN) == "cloud, engine"
    assert judge(STREAM, Said("The capital of France is simulated", "length", count), KNOWN) == "engine, cloud"
    assert judge(STREAM, Said(f"{begun} simulated token of Paris", "stop", 6), KNOWN) == "engine, cloud, engine"


@pytest.mark.parametrize(
    "said",
    [
        Said("", "stop", 0),
        Said("The capital of France is", "stop", 5),
        Said("The capital of France is Paris.", "length", 8),
        Said("The capital of of France is Paris.", "stop", 9),
        Said("The capital simulated token 2", "length", 5),
        Said("Nothing simulated token of this", "stop", 6),
    ],
)
def test_words_that_nobody_said_are_unsound(said: Said):
    with pytest.raises(Unsound):
        judge(STREAM, said, KNOWN)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(100):
        writer.write(data)
    writer.close()


async def ask(path: Path, word: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(word)
    answer = await reader.read(100)
    writer.close()
    return answer


def test_a_relay_passes_bytes_and_cuts_connections(tmp_path: Path):
    path = tmp_path / "engine.sock"

    async def story() -> None:
        async with await asyncio.start_unix_server(echo, str(path)):
            relay = Relay(path)
            await relay.step_between()
            assert await ask(path, b"first") == b"first"
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(b"second")
            assert await reader.read(100) == b"second"
            assert relay.cut() == 1
            assert await reader.read(100) == b""
            writer.close()
            await relay.close()

    asyncio.run(story())


def test_a_relay_holds_back_what_an_engine_says_until_it_is_healed(tmp_path: Path):
    path = tmp_path / "engine.sock"

    async def story() -> None:
        async with await asyncio.start_unix_server(echo, str(path)):
            relay = Relay(path)
            await relay.step_between()
            relay.silence(3600)
            asked = asyncio.create_task(ask(path, b"first"))
            done, _ = await asyncio.wait((asked,), timeout=0.1)
            assert not done
            relay.heal()
            assert await ask(path, b"second") == b"second"
            relay.cut()
            assert await asked == b""
            await relay.close()

    asyncio.run(story())
