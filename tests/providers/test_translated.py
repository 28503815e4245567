"""A translated answer on real sockets: it is closed, cut and limited as the one below it is."""

import asyncio

import pytest

from proxy.errors import MalformedAnswer, TruncatedAnswer, UpstreamError
from proxy.providers.anthropic.stream import Stream
from proxy.providers.translated import Document, Translated
from proxy.transport import Timeouts
from proxy.transport.local import LocalTransport
from tests.fakes.scripted_upstream import Play, ScriptedUpstream, Step, chunked, eventually, ok, upstream
from tests.providers.test_anthropic_answer import END, chunks, collected, event, start, stop, text

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
WHOLE = b"".join(map(event, [start(), *text(0, "Pa", "ris"), stop(), END]))


def run(play: Play, story) -> None:
    async def with_answer() -> None:
        async with upstream(play) as scripted:
            transport = LocalTransport(scripted.address)
            answer = await transport.send(b"POST", b"/v1/messages", [], b"{}", Timeouts(5, 5, 5))
            try:
                await story(answer, scripted)
            finally:
                await answer.close()
                await transport.close()

    asyncio.run(with_answer())


def test_a_stream_that_comes_byte_by_byte_is_translated_event_by_event():
    async def story(answer, _: ScriptedUpstream) -> None:
        translated = Translated(answer, [], Stream(1700000000))
        parts = [part async for part in translated]
        assert len(parts) == 4  # the role, two pieces, and the end with usage and [DONE]
        assert collected(chunks(b"".join(parts)))["content"] == "Paris"

    run([HEAD, *(b"1\r\n%c\r\n" % byte for byte in WHOLE), b"0\r\n\r\n"], story)


@pytest.mark.parametrize("end", [Step.CLOSE, Step.RESET])
def test_a_connection_that_ends_too_early_is_an_error(end: Step):
    async def story(answer, _: ScriptedUpstream) -> None:
        translated = Translated(answer, [], Stream(0))
        with pytest.raises(UpstreamError):
            [part async for part in translated]

    run([HEAD, chunked(WHOLE[:-20])[:-5], end], story)


def test_a_body_that_ends_well_but_too_early_is_an_error():
    async def story(answer, _: ScriptedUpstream) -> None:
        with pytest.raises(TruncatedAnswer):
            await Translated(answer, [], Stream(0)).read(1 << 20)

    run([HEAD, chunked(WHOLE[:-20])], story)


def test_what_happens_after_the_last_event_is_no_error():
    async def story(answer, _: ScriptedUpstream) -> None:
        assert (await Translated(answer, [], Stream(0)).read(1 << 20)).endswith(b"[DONE]\n\n")

    run([HEAD, chunked(WHOLE)[:-5], Step.CLOSE], story)


def test_abandoning_it_ends_the_exchange_below():
    async def story(answer, scripted: ScriptedUpstream) -> None:
        translated = Translated(answer, [], Stream(0))
        assert b"assistant" in await anext(translated)
        translated.abort()
        await eventually(lambda: scripted.open == 0)

    run([HEAD, chunked(event(start()))[:-5], Step.STALL], story)


def test_a_document_is_read_up_to_a_limit():
    async def story(answer, _: ScriptedUpstream) -> None:
        with pytest.raises(MalformedAnswer, match="larger"):
            await Translated(answer, [], Document(lambda body: body * 2)).read(150)

    run([ok(b"x" * 100)], story)
