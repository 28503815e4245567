"""Which proxy the environment names for an origin: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY."""

import ssl
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2


def proxy_for(scheme: str, host: str, port: int) -> httpcore2.Proxy | None:
    """Return the proxy for an origin; ValueError, which never shows the address, for one that is not HTTP's.

    Names in NO_PROXY are read as Python's urllib reads them: hosts, domains, host:port, or * for all.
    """
    proxies = getproxies()
    if proxy_bypass(host) or proxy_bypass(f"{host}:{port}"):
        return None
    for kind in (scheme, "all"):
        if address := proxies.get(kind):
            return _proxy(f"{kind.upper()}_PROXY", address)
    return None


def _proxy(variable: str, address: str) -> httpcore2.Proxy:
    try:
        parsed = httpx2.Proxy(address if "://" in address else f"http://{address}")
        if parsed.url.scheme not in ("http", "https") or not parsed.url.host:
            raise ValueError
    except (ValueError, httpx2.InvalidURL):
        raise ValueError(f"{variable}: expected http://[user:password@]host[:port], or https://") from None
    url = httpcore2.URL(scheme=parsed.url.raw_scheme, host=parsed.url.raw_host, port=parsed.url.port, target=b"/")
    tls: ssl.SSLContext | None = httpx2.create_ssl_context() if parsed.url.scheme == "https" else None
    return httpcore2.Proxy(url, auth=parsed.raw_auth, ssl_context=tls)
