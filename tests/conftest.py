"""How property tests choose their examples: the same each time in `make test`, new ones in `make search`.

And one TLS context for the clients of all tests: each would read the certificates that the system trusts, for 20 ms,
though none of them speaks TLS.
"""

import functools

from httpx2._transports import default as httpx2_transports
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# How long it takes to make examples depends on what else the machine does.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "search", max_examples=3000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")

_constants_of_ours = providers._get_local_constants


def _constants() -> providers.Constants:
    """Return what is tried besides chance: in a search, the constants in our own modules.

    Where examples are to be the same each time there are none: another constant anywhere, or another module imported
    before, would change every example of every test.
    """
    return providers.Constants() if settings.default.derandomize else _constants_of_ours()


providers._get_local_constants = _constants

httpx2_transports.create_ssl_context = functools.cache(httpx2_transports.create_ssl_context)
