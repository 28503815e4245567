"""What only the transport to the clouds does."""

import asyncio

import pytest

from proxy.transport.cloud import CloudTransport
from tests.fakes.scripted_upstream import ok, upstream
from tests.transport.conftest import PATIENT, body_of


@pytest.mark.usefixtures("without_proxies")
def test_a_proxy_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with upstream([ok(b"through")]) as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy.address)
            monkeypatch.setenv("NO_PROXY", "")
            to = CloudTransport("http://models.invalid")
            assert await body_of(to) == b"through"
            assert proxy.requests[0].target == b"http://models.invalid/"
            await to.close()

    asyncio.run(story())


@pytest.mark.usefixtures("without_proxies")
def test_the_body_is_asked_for_and_given_as_it_is() -> None:
    async def story() -> None:
        async with upstream([ok(b"\x1f\x8bnot unpacked", b"content-encoding: gzip")]) as scripted:
            to = CloudTransport(scripted.address)
            answer = await to.send(b"GET", b"/", [(b"Accept-Encoding", b"gzip, br")], b"", PATIENT)
            assert await answer.read(100) == b"\x1f\x8bnot unpacked"
            assert scripted.requests[0].values(b"accept-encoding") == [b"identity"]
            await to.close()

    asyncio.run(story())


@pytest.mark.usefixtures("without_proxies")
def test_cookies_of_one_answer_are_not_sent_with_the_next_request() -> None:
    async def story() -> None:
        async with upstream([ok(b"1", b"set-cookie: session=1")]) as scripted:
            to = CloudTransport(scripted.address)
            assert [await body_of(to), await body_of(to)] == [b"1", b"1"]
            assert scripted.requests[1].values(b"cookie") == []
            await to.close()

    asyncio.run(story())


def test_an_address_without_a_host_is_refused() -> None:
    with pytest.raises(ValueError, match="expected https://host"):
        CloudTransport("unix:/somewhere")
