"""Who is trusted, what is spoken over TLS, and the way through a proxy."""

import asyncio
import ssl
import traceback
from base64 import b64encode
from datetime import UTC, datetime

import pytest
import trustme

from proxy.errors import ConnectFailed, ConnectTimeout, UpstreamError
from proxy.transport import Timeouts
from proxy.transport.cloud import CloudTransport
from proxy.transport.dialing import CloudLimits
from tests.fakes.connect_proxy import connect_proxy
from tests.fakes.scripted_http2 import http2_upstream
from tests.fakes.scripted_upstream import ok, upstream
from tests.transport.conftest import BODY_LIMIT, PATIENT, body_of, get, server_tls

SECRET = "sentinel-5e1f"
HASTY = Timeouts(connect=0.05, first_byte=None, between_bytes=None)


async def failure(address: str, timeouts: Timeouts = PATIENT) -> UpstreamError:
    to = CloudTransport(address)
    try:
        with pytest.raises(UpstreamError) as caught:
            await get(to, timeouts)
    finally:
        await to.close()
    return caught.value


def expired(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    then = datetime(2020, 1, 1, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC)
    authority.issue_cert("127.0.0.1", not_before=then[0], not_after=then[1]).configure_cert(context)
    return context


@pytest.mark.parametrize("wrong", ["authority", "host", "time"])
def test_a_certificate_that_does_not_hold_is_refused(trusted: trustme.CA, wrong: str) -> None:
    async def story() -> None:
        contexts = {
            "authority": lambda: server_tls(trustme.CA()),
            "host": lambda: server_tls(trusted, "example.org"),
            "time": lambda: expired(trusted),
        }
        async with upstream([ok()], tls=contexts[wrong]()) as scripted:
            error = await failure(scripted.address)
            assert isinstance(error, ConnectFailed)
            assert "SSL" in str(error)
            assert scripted.address not in str(error)
            assert scripted.requests == []

    asyncio.run(story())


def test_an_authority_that_neither_system_nor_environment_know_is_refused(
    trusted: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with upstream([ok()], tls=server_tls(trusted)) as scripted:
            monkeypatch.delenv("SSL_CERT_FILE")
            monkeypatch.delenv("SSL_CERT_DIR", raising=False)
            assert isinstance(await failure(scripted.address), ConnectFailed)

    asyncio.run(story())


@pytest.mark.usefixtures("trusted")
def test_an_upstream_without_tls_is_refused() -> None:
    async def story() -> None:
        async with upstream([b"SSH-2.0-OpenSSH\r\n"], read_requests=False) as scripted:
            assert isinstance(await failure(scripted.address.replace("http:", "https:")), ConnectFailed)

    asyncio.run(story())


@pytest.mark.usefixtures("trusted")
def test_a_handshake_that_stands_still_is_given_up_as_not_sent() -> None:
    async def story() -> None:
        server = await asyncio.start_server(lambda reader, writer: asyncio.sleep(0), "127.0.0.1", 0)
        address = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert isinstance(await failure(address, HASTY), ConnectTimeout)
        server.close()

    asyncio.run(story())


@pytest.mark.parametrize("offered", [["http/1.1"], []])
def test_an_upstream_that_knows_no_http2_is_spoken_to_in_http1(trusted: trustme.CA, offered: list[str]) -> None:
    async def story() -> None:
        tls = server_tls(trusted)
        tls.set_alpn_protocols(offered) if offered else None
        async with upstream([ok(b"1.1")], tls=tls) as scripted:
            to = CloudTransport(scripted.address)
            assert await asyncio.gather(*[body_of(to) for _ in range(5)]) == [b"1.1"] * 5
            await to.close()

    asyncio.run(story())


def test_http2_can_be_left_out(trusted: trustme.CA) -> None:
    async def story() -> None:
        tls = server_tls(trusted)
        tls.set_alpn_protocols(["h2", "http/1.1"])
        async with upstream([ok(b"1.1")], tls=tls) as scripted:
            to = CloudTransport(scripted.address, CloudLimits(http2=False))
            assert await body_of(to) == b"1.1"
            await to.close()

    asyncio.run(story())


def test_requests_at_once_share_a_connection_that_speaks_http2(trusted: trustme.CA) -> None:
    async def story() -> None:
        async with http2_upstream([ok(b"2")], tls=server_tls(trusted)) as scripted:
            to = CloudTransport(scripted.address)
            assert await asyncio.gather(*[body_of(to) for _ in range(20)]) == [b"2"] * 20
            assert scripted.connections == 1
            await to.close()

    asyncio.run(story())


# Proxies


@pytest.mark.parametrize("http2", [True, False], ids=["http2", "http1"])
def test_a_tunnel_through_the_proxy_of_the_environment_is_used(
    trusted: trustme.CA, monkeypatch: pytest.MonkeyPatch, http2: bool
) -> None:
    async def story() -> None:
        tls = server_tls(trusted)
        serving = http2_upstream([ok(b"through")], tls=tls) if http2 else upstream([ok(b"through")], tls=tls)
        async with serving as scripted, connect_proxy() as proxy:
            monkeypatch.setenv("HTTPS_PROXY", f"http://user:{SECRET}@{proxy.address}")
            to = CloudTransport(scripted.address)
            answer = await to.send(b"POST", b"/x", [(b"authorization", b"Bearer key")], b"{}", PATIENT)
            assert await answer.read(BODY_LIMIT) == b"through"
            await answer.close()
            await to.close()
            assert len(proxy.asked) == 1
            assert proxy.asked[0].startswith(b"CONNECT %b HTTP/1.1\r\n" % scripted.address[8:].encode())
            assert b"Basic " + b64encode(f"user:{SECRET}".encode()) in proxy.asked[0]
            assert b"Bearer" not in proxy.asked[0]
            assert scripted.requests[0].values(b"proxy-authorization") == []

    asyncio.run(story())


def test_certificates_are_verified_through_a_tunnel(trusted: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with upstream([ok()], tls=server_tls(trusted, "example.org")) as scripted, connect_proxy() as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.address)
            assert isinstance(await failure(scripted.address), ConnectFailed)
            assert len(proxy.asked) == 1

    asyncio.run(story())


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("status", [b"407 Proxy Authentication Required", b"502 Bad Gateway", b"nonsense"])
def test_a_proxy_that_refuses_is_an_error_that_tells_no_password(
    monkeypatch: pytest.MonkeyPatch, status: bytes
) -> None:
    async def story() -> None:
        async with connect_proxy(status) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", f"http://user:{SECRET}@{proxy.address}")
            error = await failure("https://models.invalid")
            assert len(proxy.asked) == 1
            told = "".join(traceback.format_exception(error)) + repr(error) + str(error.address)
            assert SECRET not in told
            assert b64encode(f"user:{SECRET}".encode()).decode() not in told

    asyncio.run(story())


@pytest.mark.usefixtures("trusted")
def test_a_proxy_that_says_nothing_is_given_up_as_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with connect_proxy(b"") as proxy:
            monkeypatch.setenv("ALL_PROXY", f"http://{proxy.address}")
            assert isinstance(await failure("https://models.invalid", HASTY), ConnectTimeout)

    asyncio.run(story())


@pytest.mark.parametrize("names", ["127.0.0.1", "example.org, 127.0.0.1", "*"])
def test_no_proxy_is_used_for_hosts_that_the_environment_excepts(
    trusted: trustme.CA, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    async def story() -> None:
        async with upstream([ok(b"direct")], tls=server_tls(trusted)) as scripted, connect_proxy() as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.address)
            monkeypatch.setenv("NO_PROXY", names)
            to = CloudTransport(scripted.address)
            assert await body_of(to) == b"direct"
            assert proxy.asked == []
            await to.close()

    asyncio.run(story())


@pytest.mark.usefixtures("without_proxies")
@pytest.mark.parametrize("scheme", ["socks5", "ftp"])
def test_a_proxy_of_another_kind_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://user:{SECRET}@127.0.0.1:1")
    with pytest.raises(ValueError, match="ALL_PROXY: expected http") as refused:
        CloudTransport("https://models.invalid")
    assert SECRET not in "".join(traceback.format_exception(refused.value))
