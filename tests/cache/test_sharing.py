"""Requests that are alike and under way at once, before scripted upstreams on real sockets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx2
import pytest

from proxy.cache.settings import CacheSettings
from proxy.config import Config, EndpointSettings, ModelSettings
from tests.cache.test_cached import DONE, HEAD, USAGE, ask, config, run, said, stream, whole
from tests.fakes.one_worker import ROLE, Proxy, event, proxying, text_of
from tests.fakes.scripted_upstream import Step, eventually, ok, upstream

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


def chunk(*events: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in events)


END = chunk(event(finish="stop"), USAGE, DONE) + b"0\r\n\r\n"


@contextlib.asynccontextmanager
async def streaming(proxy: Proxy, model: str = "m") -> AsyncIterator[tuple[httpx2.Response, AsyncIterator[str]]]:
    """A stream that has begun, and its text as it comes."""
    body = {**BODY, "model": model, "stream": True}
    async with proxy.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        yield answer, answer.aiter_text()


async def until(text: AsyncIterator[str], word: str) -> str:
    """Read up to a word."""
    got = ""
    while word not in got:
        got += await anext(text)
    return got


async def rest(text: AsyncIterator[str]) -> str:
    return "".join([piece async for piece in text])


def flights(proxy: Proxy) -> int:
    assert proxy.cached
    return len(proxy.cached._alone) + sum(len(flight._members) for flight in proxy.cached._flights.values())


def test_many_who_ask_the_same_at_once_share_one_generation() -> None:
    async def scenario() -> None:
        async with upstream([Step.STALL, whole("Hello")]) as up, proxying(config(up.address)) as proxy:
            asking = [asyncio.create_task(ask(proxy, stream=i % 2 == 1)) for i in range(8)]
            await eventually(lambda: flights(proxy) == 8)
            up.release()
            answers = [await task for task in asking]
            assert sorted(map(said, answers)) == ["joined"] * 7 + ["miss"]
            texts = {text_of(a.text) if i % 2 else a.json()["choices"][0]["message"]["content"]
                     for i, a in enumerate(answers)}  # fmt: skip
            assert texts == {"Hello"}
            assert len(up.requests) == 1
            page = proxy.page()
            assert page.value("polyvox_cache_requests_total", result="joined") == 7
            assert page.value("polyvox_cache_requests_total", result="miss") == 1

    run(scenario())


def test_who_comes_late_to_a_stream_gets_its_beginning_and_follows_live() -> None:
    play = [HEAD + chunk(ROLE, event(content="one ")), Step.STALL, chunk(event(content="two")) + END]

    async def scenario() -> None:
        async with upstream(play) as up, proxying(config(up.address)) as proxy, streaming(proxy) as (_, first):
            begun = await until(first, "one ")
            async with streaming(proxy, "a") as (answer, second):
                plain = asyncio.create_task(ask(proxy))
                caught_up = await until(second, "one ")
                await eventually(lambda: flights(proxy) == 3)
                up.release()
                assert text_of(begun + await rest(first)) == "one two"
                followed = caught_up + await rest(second)
                assert text_of(followed) == "one two"
                assert '"model":"a"' in followed
                assert "usage" not in followed
                assert (said(answer), said(await plain)) == ("joined", "joined")
                assert (await plain).json()["choices"][0]["message"]["content"] == "one two"
            assert len(up.requests) == 1

    run(scenario())


def test_who_began_may_leave_and_the_others_get_all() -> None:
    play = [HEAD + chunk(ROLE, event(content="one ")), Step.STALL, chunk(event(content="two")) + END]

    async def scenario() -> None:
        async with upstream(play) as up, proxying(config(up.address)) as proxy:
            async with streaming(proxy) as (_, first):
                await until(first, "one ")
                joined = asyncio.create_task(ask(proxy, stream=True))
                await eventually(lambda: flights(proxy) == 2)
            await eventually(lambda: flights(proxy) == 1)
            up.release()
            assert text_of((await joined).text) == "one two"
            assert said(await ask(proxy)) == "hit"
            await eventually(lambda: proxy.running() == 0 and proxy.in_flight() == 0)
            assert len(up.requests) == 1

    run(scenario())


def test_a_plain_request_that_began_may_leave_before_its_answer() -> None:
    async def scenario() -> None:
        async with upstream([Step.STALL, whole("late")]) as up, proxying(config(up.address)) as proxy:
            first = asyncio.create_task(ask(proxy))
            await eventually(lambda: len(up.requests) == 1)
            second = asyncio.create_task(ask(proxy))
            await eventually(lambda: flights(proxy) == 2)
            first.cancel()
            await eventually(lambda: flights(proxy) == 1)
            up.release()
            assert (said(await second), (await second).json()["choices"][0]["message"]["content"]) == ("joined", "late")
            assert len(up.requests) == 1

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("askers", [1, 2])
def test_a_generation_ends_when_all_have_left_before_it_begins(askers: int, stream: bool) -> None:
    async def scenario() -> None:
        async with upstream([Step.STALL, whole("never")], [whole("next")]) as up, proxying(config(up.address)) as proxy:
            asking = [asyncio.create_task(ask(proxy, stream=stream)) for _ in range(askers)]
            await eventually(lambda: flights(proxy) == askers and up.open == 1)
            for task in asking:
                task.cancel()
            await eventually(lambda: flights(proxy) == 0 and up.open == 0)
            await eventually(lambda: proxy.running() == 0 and proxy.in_flight() == 0)
            answer = await ask(proxy)
            assert (said(answer), answer.json()["choices"][0]["message"]["content"]) == ("miss", "next")

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("askers", [1, 2])
def test_what_is_being_made_during_a_purge_is_given_and_not_kept(askers: int, stream: bool) -> None:
    old = HEAD + chunk(ROLE, event(content="old")) + END if stream else whole("old")

    async def scenario() -> None:
        async with upstream([Step.STALL, old], [whole("new")]) as up, proxying(config(up.address)) as proxy:
            asking = [asyncio.create_task(ask(proxy, stream=stream)) for _ in range(askers)]
            await eventually(lambda: flights(proxy) == askers and up.open == 1)
            assert proxy.cached
            await proxy.cached.purge()
            up.release()
            answers = [await task for task in asking]
            said_all = [text_of(a.text) if stream else a.json()["choices"][0]["message"]["content"] for a in answers]
            assert said_all == ["old"] * askers
            assert [said(await ask(proxy)) for _ in range(2)] == ["miss", "hit"]
            assert len(up.requests) == 2

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_who_must_have_it_anew_makes_it_beside_another_and_is_the_one_whose_answer_stays(stream: bool) -> None:
    new = HEAD + chunk(ROLE, event(content="new")) + END if stream else whole("new")

    async def scenario() -> None:
        async with upstream([Step.STALL, whole("old")], [new]) as up, proxying(config(up.address)) as proxy:
            first = asyncio.create_task(ask(proxy))
            await eventually(lambda: flights(proxy) == 1 and up.open == 1)
            anew = await ask(proxy, cache={"no-cache": True}, stream=stream)
            assert said(anew) == "bypass"
            up.release()
            assert (await first).json()["choices"][0]["message"]["content"] == "old"
            kept = await ask(proxy)
            assert (said(kept), kept.json()["choices"][0]["message"]["content"]) == ("hit", "new")

    run(scenario())


def test_a_stream_that_is_purged_while_it_passes_is_not_kept() -> None:
    play = [HEAD + chunk(ROLE, event(content="one ")), Step.STALL, chunk(event(content="two")) + END]

    async def scenario() -> None:
        async with upstream(play, [whole("new")]) as up, proxying(config(up.address)) as proxy:
            async with streaming(proxy) as (_, text):
                begun = await until(text, "one ")
                assert proxy.cached
                await proxy.cached.purge()
                up.release()
                assert text_of(begun + await rest(text)) == "one two"
            assert said(await ask(proxy)) == "miss"

    run(scenario())


def test_who_reads_a_stream_alone_and_leaves_ends_it() -> None:
    play = [HEAD + chunk(ROLE, event(content="one ")), Step.STALL]

    async def scenario() -> None:
        async with upstream(play, [whole("next")]) as up, proxying(config(up.address)) as proxy:
            async with streaming(proxy) as (_, text):
                await until(text, "one ")
            await eventually(lambda: up.open == 0)
            await eventually(lambda: proxy.running() == 0 and proxy.in_flight() == 0)
            assert (flights(proxy), said(await ask(proxy))) == (0, "miss")

    run(scenario())


def test_who_joins_a_stream_after_its_first_reader_has_begun_outlives_him_and_ends_it() -> None:
    play = [HEAD + chunk(ROLE, event(content="one ")), Step.STALL]

    async def scenario() -> None:
        async with upstream(play) as up, proxying(config(up.address)) as proxy:
            async with streaming(proxy) as (_, second_text):
                await until(second_text, "one ")
                async with streaming(proxy) as (_, third):
                    await until(third, "one ")
                await eventually(lambda: flights(proxy) == 1)
                assert up.open == 1
            await eventually(lambda: flights(proxy) == 0 and up.open == 0)
            await eventually(lambda: proxy.running() == 0 and proxy.in_flight() == 0)

    run(scenario())


def test_the_last_to_leave_ends_the_generation() -> None:
    play = [HEAD + chunk(ROLE, event(content="one ")), Step.STALL]

    async def scenario() -> None:
        async with upstream(play) as up, proxying(config(up.address)) as proxy:
            async with streaming(proxy) as (_, first), streaming(proxy) as (_, second):
                await until(first, "one ")
                await until(second, "one ")
                assert up.open == 1
            await eventually(lambda: up.open == 0)
            await eventually(lambda: proxy.running() == 0 and proxy.in_flight() == 0)
            assert flights(proxy) == 0

    run(scenario())


def test_when_it_fails_each_goes_its_own_way() -> None:
    failing = [Step.STALL, ok(b"{}", status=b"500 Internal Server Error")]

    async def scenario() -> None:
        async with upstream(failing, [whole("mine")]) as up, proxying(config(up.address)) as proxy:
            asking = [asyncio.create_task(ask(proxy)) for _ in range(3)]
            await eventually(lambda: flights(proxy) == 3)
            up.release()
            answers = [await task for task in asking]
            assert sorted(a.status_code for a in answers) == [200, 200, 500]
            assert {said(a) for a in answers if a.status_code == 200} == {"miss"}
            assert len(up.requests) == 3

    run(scenario())


def test_a_stream_that_breaks_for_all_ends_in_an_error_for_all_who_had_a_part_of_it() -> None:
    play = [HEAD + chunk(ROLE, event(content="one ")), Step.STALL, Step.CLOSE]

    async def scenario() -> None:
        async with upstream(play, [whole("mine")]) as up, proxying(config(up.address)) as proxy:
            async with streaming(proxy) as (_, first), streaming(proxy) as (_, second):
                await until(first, "one ")
                await until(second, "one ")
                plain = asyncio.create_task(ask(proxy))
                await eventually(lambda: flights(proxy) == 3)
                up.release()
                for text in (first, second):
                    ending = await rest(text)
                    assert '"error"' in ending
                    assert "[DONE]" not in ending
                assert (await plain).json()["choices"][0]["message"]["content"] == "mine"
            assert "one " not in (await ask(proxy)).text

    run(scenario())


def test_a_stream_that_goes_on_elsewhere_goes_on_for_all_and_is_not_kept() -> None:
    broken = [HEAD + chunk(ROLE, event(content="one ")), Step.STALL, Step.CLOSE]

    async def scenario() -> None:
        async with upstream(broken) as bad, upstream([stream("two")]) as good:
            addresses = (bad.address, good.address)
            endpoints = tuple(EndpointSettings(base_url=f"{a}/v1", continues=True) for a in addresses)
            model = ModelSettings(endpoints=endpoints, balance="round_robin")
            async with proxying(Config(models={"m": model})) as proxy:
                async with streaming(proxy) as (_, first), streaming(proxy) as (_, second):
                    begun = await until(first, "one "), await until(second, "one ")
                    bad.release()
                    assert text_of(begun[0] + await rest(first)) == "one two"
                    assert text_of(begun[1] + await rest(second)) == "one two"
                assert len(good.requests) == 1
                assert proxy.cached
                assert proxy.cached.sums().entries == 0

    run(scenario())


def test_who_reads_slowly_holds_nobody_up() -> None:
    text = "x" * 1000
    play = [HEAD + chunk(ROLE), Step.STALL, chunk(*[event(content=text)] * 3000) + END]

    async def scenario() -> None:
        cache = CacheSettings(max_entry_bytes=500_000)
        async with upstream(play) as up, proxying(config(up.address, cache=cache)) as proxy:
            async with streaming(proxy) as (_, first):
                await until(first, "assistant")
                _, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1)
                slow = httpx2.Request("POST", "http://x/v1/chat/completions", json={**BODY, "stream": True})
                head = b"".join(b"%b: %b\r\n" % pair for pair in slow.headers.raw)
                writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n" + head + b"\r\n" + slow.content)
                await eventually(lambda: flights(proxy) == 2)
                up.release()
                got = await rest(first)
                assert got.count(text) == 3000
                assert got.endswith(DONE.decode())
                writer.transport.abort()
            await eventually(lambda: flights(proxy) == 0)

    run(scenario())
