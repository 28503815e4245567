"""What a worker knows of endpoints while its configuration changes."""

import msgspec

from proxy.breaker import Outcome, State
from proxy.config import BreakerSettings, RetrySettings
from proxy.endpoints import Endpoints, Standing
from proxy.registry import Endpoint, Model
from proxy.telemetry import BreakerChanged

FIRST = BreakerSettings(failures=1)


class Told:
    """Keeps what becomes of breakers, as a sink does."""

    def __init__(self) -> None:
        self.states: list[str] = []

    def changed(self, event: BreakerChanged) -> None:
        self.states.append(event.state)


def model(address: str = "http://one", **settings: object) -> Model:
    endpoint = Endpoint(name="m/0", model="m", address=address, serves="m")
    return Model(name="m", endpoints=(endpoint,), state="ready", **{"breaker": FIRST, **settings})  # type: ignore[arg-type]


def made() -> tuple[Endpoints, Told]:
    told = Told()
    return Endpoints(told, clock=lambda: 0.0, chance=lambda: 0.5), told  # type: ignore[arg-type]


def open_breaker(endpoints: Endpoints, of: Model) -> Standing:
    (standing,) = endpoints.allowed(of, 0.0)
    standing.breaker.record(Outcome.FAILURE, 0.0, standing.breaker.begin(0.0))
    assert standing.breaker.state is State.OPEN
    return standing


def test_an_endpoint_with_another_address_begins_anew():
    endpoints, _ = made()
    standing = open_breaker(endpoints, model())
    assert endpoints.allowed(model("http://two"), 0.0) == [standing]
    assert standing.endpoint.address == "http://two"


def test_an_endpoint_that_is_as_it_was_stays_given_up():
    endpoints, _ = made()
    open_breaker(endpoints, model())
    assert endpoints.allowed(model(), 0.0) == []


def test_breakers_and_budgets_go_by_the_newest_settings():
    endpoints, _ = made()
    (standing,) = endpoints.allowed(model(), 0.0)
    assert endpoints.budget(model()).spend(0.0)
    new = model(breaker=BreakerSettings(failures=3), retries=RetrySettings(share=0.0, per_second=0.0))
    endpoints.allowed(new, 0.0)
    for state in (State.CLOSED, State.CLOSED, State.OPEN):
        standing.breaker.record(Outcome.FAILURE, 0.0, standing.breaker.begin(0.0))
        assert standing.breaker.state is state
    while endpoints.budget(new).spend(0.0):
        pass
    endpoints.budget(new).earn()
    assert not endpoints.budget(new).spend(1000.0)


def test_an_endpoint_that_is_gone_is_forgotten_and_its_breaker_told_to_be_closed():
    endpoints, told = made()
    standing = open_breaker(endpoints, model())
    endpoints.keep([])
    assert told.states == ["open", "closed"]
    standing.breaker.record(Outcome.FAILURE, 0.0, standing.breaker.begin(0.0))
    assert told.states == ["open", "closed"]
    assert len(endpoints.allowed(msgspec.structs.replace(model(), detail="new"), 0.0)) == 1
