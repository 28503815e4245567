"""What is counted, how it is shown, and that one close() settles a request however it ends."""

import asyncio
import os

import pytest

from engines.spec import EngineSettings, FleetStatus, Simulation
from proxy import errors, telemetry
from proxy.accounting import StreamAccount, Usage
from proxy.api import MODEL_PATHS
from proxy.balancer import Load
from proxy.breaker import Breaker, Outcome, State
from proxy.config import BreakerSettings, Config, EndpointSettings, ModelSettings, Server
from proxy.cost import Hosting, Price
from proxy.errors import ConnectFailed, DeadlinePassed, PoolTimeout, UnknownModel, WrongKey
from proxy.metrics import Metrics, note_reload
from proxy.prices import Prices
from proxy.registry import build
from proxy.relay import Exchange
from proxy.shared import shared_memory, slots_of
from proxy.telemetry import AttemptFailed, RequestFinished, RequestStarted
from tests.scraping import Page

CONFIG = Config(
    server=Server(workers=2),
    models={
        "local": ModelSettings(engine=EngineSettings(simulator=Simulation(), replicas=2)),
        "remote": ModelSettings(endpoints=(EndpointSettings(base_url="http://x/v1"),)),
    },
)
STREAM = b"""data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}

data: {"choices":[{"delta":{},"finish_reason":"stop"}]}

data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":3}}}

"""


def page_of(metrics: Metrics) -> Page:
    return Page.of(metrics.page("")[1].decode())


def finished(**changed: object) -> RequestFinished:
    usual = {
        "model": "local", "endpoint": "local/0", "operation": "chat", "status": 200, "error": None,
        "finish_reason": "stop", "seconds": 1.5, "to_first_token": 0.2, "per_token": 0.02, "overhead": 0.0001,
        "tokens_in": 10, "tokens_out": 20, "tokens_cached": 4,
    }  # fmt: skip
    return RequestFinished(**{**usual, **changed})  # type: ignore[arg-type]


LOCAL = {"model_name": "local", "endpoint": "local/0", "operation": "chat"}


def test_a_request_is_counted_with_its_tokens_times_and_end():
    metrics = Metrics(CONFIG)
    metrics.finished(finished())
    metrics.finished(finished(finish_reason="abort", tokens_out=0, per_token=None))
    metrics.finished(finished(error="connect_failed", to_first_token=None, per_token=None, overhead=None))
    page = page_of(metrics)
    for name, labels, expected in [
        ("requests_total", {}, 3),
        ("request_success_total", {"finished_reason": "stop"}, 1),
        ("request_success_total", {"finished_reason": "abort"}, 1),
        ("request_errors_total", {"error_type": "connect_failed"}, 1),
        ("prompt_tokens_total", {}, 30),
        ("prompt_tokens_cached_total", {}, 12),
        ("generation_tokens_total", {}, 40),
        ("time_to_first_token_seconds_count", {}, 2),
        ("time_to_first_token_seconds_bucket", {"le": "0.1"}, 0),
        ("time_to_first_token_seconds_bucket", {"le": "0.25"}, 2),
        ("request_time_per_output_token_seconds_sum", {}, 0.02),
        ("e2e_request_latency_seconds_bucket", {"le": "+Inf"}, 3),
        ("e2e_request_latency_seconds_sum", {}, 4.5),
        ("request_overhead_seconds_count", {}, 2),
    ]:
        assert page.value(f"polyvox_{name}", **LOCAL, **labels) == expected, name


def test_every_worker_shows_the_sum_of_all():
    memory = shared_memory()
    try:
        workers = [Metrics(CONFIG, number, memory) for number in (0, 1)]
        for worker in workers:
            worker.started(RequestStarted("local", "local/0"))
            worker.finished(finished(model="remote", endpoint="remote/0"))
        pages = [page_of(worker) for worker in workers]
        assert [page.value("polyvox_requests_total", endpoint="remote/0") for page in pages] == [2, 2]
        assert [page.value("polyvox_num_requests_running", endpoint="local/0") for page in pages] == [2, 2]
    finally:
        os.close(memory)


def test_a_worker_that_replaces_another_keeps_its_counts_but_not_what_it_had_under_way():
    memory = shared_memory()
    try:
        dead = Metrics(CONFIG, 1, memory)
        dead.started(RequestStarted("local", "local/1"))
        dead.finished(finished())
        page = page_of(Metrics(CONFIG, 1, memory))
        assert page.value("polyvox_num_requests_running", endpoint="local/1") == 0
        assert page.value("polyvox_requests_total", **LOCAL) == 1
    finally:
        os.close(memory)


def test_what_no_configuration_names_is_counted_in_one_series():
    metrics = Metrics(CONFIG)
    for i in range(300):
        metrics.started(RequestStarted(f"m{i}", f"e{i}"))
        metrics.finished(finished(model=f"m{i}", endpoint=f"e{i}", operation=f"o{i}"))
    page = page_of(metrics)
    assert page.series("polyvox_requests_total") == [{"model_name": "unknown", "endpoint": "", "operation": "other"}]
    assert page.value("polyvox_requests_total") == 300


def test_every_endpoint_of_the_registry_has_its_gauge():
    shown = {(s["model_name"], s["endpoint"]) for s in page_of(Metrics(CONFIG)).series("polyvox_num_requests_running")}
    remote = build(CONFIG, FleetStatus(version=0)).models["remote"].endpoints
    assert shown == {(e.model, e.id) for e in CONFIG.engines()} | {(e.model, e.name) for e in remote}


def test_openmetrics_is_spoken_to_those_who_ask_for_it():
    metrics = Metrics(CONFIG)
    metrics.finished(finished())
    kind, page = metrics.page("application/openmetrics-text; version=1.0.0")
    assert kind.startswith(b"application/openmetrics-text")
    assert page.endswith(b"# EOF\n")


def test_every_error_has_a_type_from_a_fixed_set():
    assert telemetry.error_type(PoolTimeout()) == "pool_timeout"
    assert telemetry.error_type(WrongKey()) == "wrong_key"
    assert telemetry.error_type(RuntimeError("secret")) == "internal_error"
    assert telemetry.error_type(type("Later", (ConnectFailed,), {})()) == "connect_failed"
    raised = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.RequestError)]
    assert {telemetry._type_name(e) for e in raised} <= set(telemetry.ERROR_TYPES)


def test_every_path_for_models_has_an_operation():
    assert set(MODEL_PATHS) == set(telemetry.OPERATIONS)


# One close() for all


class Recorded:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.under_way = 0
        self.events: list[RequestFinished] = []

    def started(self, event: RequestStarted) -> None:
        self.under_way += 1

    def failed(self, event: AttemptFailed) -> None:
        self.under_way -= 1

    def finished(self, event: RequestFinished) -> None:
        self.under_way -= bool(event.endpoint)
        self.events.append(event)


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


class FakeAnswer:
    status = 200

    def __init__(self) -> None:
        self.closed = 0

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sink() -> Recorded:
    return Recorded()


def under_way(sink: Recorded, clock: Clock, load: Load) -> tuple[Exchange, FakeAnswer, StreamAccount]:
    """Return an exchange whose answer has begun."""
    exchange, answer, account = Exchange(sink, "chat", clock), FakeAnswer(), StreamAccount(hide_usage=True)
    clock.tick(5.0)  # a slow upload is not our overhead
    exchange.received()
    exchange.model = "local"
    clock.tick(0.001)
    exchange.hold(load.lease())
    exchange.begin("local/0")
    clock.tick(2.0)
    exchange.answered(answer)  # type: ignore[arg-type]
    clock.tick(0.002)
    exchange.passes(account, streamed=True)
    return exchange, answer, account


def test_a_stream_is_timed_from_the_request_being_here(sink: Recorded, clock: Clock):
    exchange, _, account = under_way(sink, clock, Load())
    exchange.token()
    account.feed(STREAM)
    clock.tick(0.8)
    exchange.complete()
    asyncio.run(exchange.close())
    (event,) = sink.events
    assert event.overhead == pytest.approx(0.003)
    assert event.to_first_token == pytest.approx(2.003)
    assert event.per_token == pytest.approx(0.2)
    assert event.seconds == pytest.approx(2.803)
    assert (event.tokens_in, event.tokens_out, event.tokens_cached) == (11, 5, 3)
    assert (event.finish_reason, event.error, event.status) == ("stop", None, 200)


@pytest.mark.parametrize("error", [None, ConnectFailed(), asyncio.CancelledError()])
def test_whatever_happens_all_is_settled_once(sink: Recorded, clock: Clock, error: BaseException | None):
    load = Load()
    exchange, answer, _ = under_way(sink, clock, load)
    if error:
        exchange.fail(error)
    for _ in range(3):
        asyncio.run(exchange.close())
    assert (load.in_flight, answer.closed, sink.under_way, len(sink.events)) == (0, 1, 0, 1)


def test_a_client_that_goes_is_no_error_of_the_endpoint(sink: Recorded, clock: Clock):
    exchange, _, _ = under_way(sink, clock, Load())
    exchange.fail(asyncio.CancelledError())
    asyncio.run(exchange.close())
    assert (sink.events[0].finish_reason, sink.events[0].error) == ("abort", None)


def test_an_error_of_the_client_is_told_from_one_of_the_endpoint(sink: Recorded, clock: Clock):
    refused = Exchange(sink, "chat", clock)
    refused.fail(UnknownModel("nope", []), 404)
    asyncio.run(refused.close())
    failing, answer, _ = under_way(sink, clock, Load())
    answer.status = 429
    failing.answered(answer)  # type: ignore[arg-type]
    failing.complete()
    asyncio.run(failing.close())
    assert [event.error for event in sink.events] == ["unknown_model", "upstream_4xx"]
    assert sink.events[0].model == "unknown"


def test_waiting_for_an_engine_that_starts_is_not_our_overhead(sink: Recorded, clock: Clock):
    exchange = Exchange(sink, "chat", clock)
    clock.tick(30.0)
    exchange.waited()
    exchange.hold(Load().lease())
    exchange.begin("local/0")
    exchange.passes(StreamAccount(), streamed=True)
    asyncio.run(exchange.close())
    assert sink.events[0].overhead == 0
    assert sink.events[0].seconds == 30


def test_a_deadline_that_passes_in_an_answer_says_nothing_good_of_the_endpoint(sink: Recorded, clock: Clock):
    breaker = Breaker(BreakerSettings(failures=2), lambda: 0.5)
    breaker.record(Outcome.FAILURE, clock(), breaker.begin(clock()))
    exchange = Exchange(sink, "chat", clock)
    exchange.hold(Load().lease())
    exchange.begin("local/0", breaker, breaker.begin(clock()))
    exchange.fail(DeadlinePassed())
    exchange.complete()  # the client was told
    asyncio.run(exchange.close())
    breaker.record(Outcome.FAILURE, clock(), breaker.begin(clock()))
    assert breaker.state is State.OPEN


HOSTED = Config(
    server=Server(workers=2),
    models={
        "local": ModelSettings(
            engine=EngineSettings(simulator=Simulation(), replicas=2), hosting=Hosting(usd_per_hour=3600.0)
        )
    },
)


def test_an_engine_is_busy_while_any_worker_has_a_request_there(clock: Clock):
    memory = shared_memory()
    try:
        one, two = (Metrics(HOSTED, number, memory, clock) for number in (0, 1))
        one.started(RequestStarted("local", "local/0"))
        clock.tick(1.0)
        two.started(RequestStarted("local", "local/0"))
        clock.tick(2.0)
        one.finished(finished(tokens_in=10, tokens_cached=10, tokens_out=100))
        clock.tick(4.0)
        two.finished(finished(tokens_in=0, tokens_cached=0, tokens_out=50))
        clock.tick(100.0)
        one.started(RequestStarted("local", "local/0"))
        clock.tick(8.0)
        one.failed(AttemptFailed("local", "local/0", "connect_failed"))
        for metrics in (one, two):
            busy, done = metrics.throughput("local", "local/0")
            assert busy == pytest.approx(15.0, rel=0.01)
            assert done == pytest.approx(150 * 4.0, rel=0.01)
        assert one.throughput("local", "local/1") == (0.0, 0.0)
    finally:
        os.close(memory)


def test_the_tokens_of_a_hosted_engine_cost_what_its_machine_does(clock: Clock):
    metrics = Metrics(HOSTED, clock=clock)
    prices = Prices(HOSTED, metrics.throughput)
    usage = Usage(tokens_in=0, tokens_out=100)
    assert prices.cost("local", "local/0", usage) is None
    metrics.started(RequestStarted("local", "local/0"))
    clock.tick(2.0)
    metrics.finished(finished(tokens_in=0, tokens_cached=0, tokens_out=100))
    assert prices.cost("local", "local/0", usage) == pytest.approx(2.0)
    assert prices.cost("local", "local/1", usage) is None


def test_the_first_request_of_a_hosted_engine_costs_what_its_machine_does_meanwhile(sink: Recorded, clock: Clock):
    prices = Prices(HOSTED, Metrics(HOSTED, clock=clock).throughput)
    exchange = Exchange(sink, "chat", clock, prices)
    exchange.model = "local"
    clock.tick(30.0)  # until the engine was there
    exchange.begin("local/0")
    clock.tick(2.0)
    assert exchange.cost(Usage(tokens_in=25, tokens_out=100)) == pytest.approx(2.0)


def test_what_is_known_to_cost_something_is_added_up():
    metrics = Metrics(CONFIG)
    for usd in (0.25, None, 0.5):
        metrics.finished(finished(usd=usd))
    assert page_of(metrics).value("polyvox_cost_usd_total", **LOCAL) == 0.75


def priced(sink: Recorded, clock: Clock) -> Exchange:
    models = {name: ModelSettings(endpoints=(EndpointSettings("http://x/v1"),) * 2, price=Price(input=price, output=10))
              for name, price in (("one", 1), ("two", 2))}  # fmt: skip
    exchange = Exchange(sink, "chat", clock, Prices(Config(models=models)))
    exchange.received()
    return exchange


def test_each_endpoint_that_has_read_the_prompt_of_a_stream_is_paid(sink: Recorded, clock: Clock):
    exchange, account = priced(sink, clock), StreamAccount()

    async def scenario() -> None:
        for model in ("one", "two"):
            exchange.model = model
            exchange.begin(f"{model}/0")
            exchange.answered(FakeAnswer())  # type: ignore[arg-type]
            exchange.passes(account, streamed=True)
            exchange.token()
            if model == "one":
                await exchange.retreat(ConnectFailed(), Outcome.FAILURE)
        account.feed(STREAM)
        exchange.complete()
        await exchange.close()

    asyncio.run(scenario())
    (event,) = sink.events
    assert event.usd == pytest.approx((11 * 2 + 11 * 1 + 5 * 10) / 1e6)
    assert event.attempts == 2


def test_an_attempt_that_gave_nothing_costs_nothing_more(sink: Recorded, clock: Clock):
    exchange, account = priced(sink, clock), StreamAccount()

    async def scenario() -> None:
        exchange.model = "one"
        exchange.begin("one/0")
        await exchange.retreat(ConnectFailed(), Outcome.FAILURE)
        exchange.begin("one/1")
        exchange.passes(account, streamed=True)
        account.feed(STREAM)
        await exchange.close()

    asyncio.run(scenario())
    assert sink.events[0].usd == pytest.approx((11 + 50) / 1e6)


def test_tokens_that_nobody_told_have_no_known_cost_and_a_refusal_has_none(sink: Recorded, clock: Clock):
    for status, usd in ((200, None), (429, 0.0)):
        exchange, answer = priced(sink, clock), FakeAnswer()
        answer.status = status
        exchange.model = "one"
        exchange.begin("one/0")
        exchange.answered(answer)  # type: ignore[arg-type]
        asyncio.run(exchange.close())
        assert sink.events[-1].usd == usd


# Another configuration


def test_what_was_counted_stays_in_its_place_whatever_models_come_and_go():
    memory = shared_memory()
    try:
        one, two = (Metrics(CONFIG, number, memory) for number in (0, 1))
        one.started(RequestStarted("local", "local/0"))
        two.finished(finished(model="remote", endpoint="remote/0", under_way=False))
        more = Config(server=CONFIG.server, models={"new": CONFIG.models["remote"], "local": CONFIG.models["local"]})
        slots = slots_of(more, slots_of(CONFIG).given)
        one.follow(more, slots)
        one.finished(finished(model="new", endpoint="new/0", under_way=False))
        one.finished(finished())
        two.follow(more, slots)
        for page in (page_of(one), page_of(two), page_of(Metrics(more, 0, memory, slots=slots))):
            assert page.value("polyvox_requests_total", model_name="local") == 1
            assert page.value("polyvox_requests_total", model_name="remote") == 1
            assert page.value("polyvox_requests_total", model_name="new") == 1
            assert page.value("polyvox_num_requests_running") == 0
            assert page.series("polyvox_num_requests_running", model_name="remote") == []
            assert page.series("polyvox_breakers", model_name="remote") == []
    finally:
        os.close(memory)


def test_an_engine_whose_hosting_is_said_later_is_busy_from_then_on(clock: Clock):
    clock.tick(1000.0)
    metrics = Metrics(CONFIG, clock=clock)
    metrics.started(RequestStarted("local", "local/0"))
    clock.tick(5.0)
    metrics.follow(HOSTED, slots_of(HOSTED))
    clock.tick(2.0)
    metrics.finished(finished())
    assert metrics.throughput("local", "local/0")[0] == pytest.approx(2.0, rel=0.01)


def test_what_became_of_a_new_configuration_is_shown():
    memory = shared_memory()
    try:
        metrics = Metrics(CONFIG, 0, memory)
        note_reload(memory, 2, 1700000000.5)
        note_reload(memory, 2, None)
        page = page_of(metrics)
        assert page.value("polyvox_config_generation") == 2
        assert page.value("polyvox_config_last_reload_success_timestamp_seconds") == 1700000000.5
        assert page.value("polyvox_config_last_reload_successful") == 0
    finally:
        os.close(memory)


def test_a_request_costs_what_those_did_that_were_made_for_it_and_answered(sink: Recorded, clock: Clock):
    exchange = priced(sink, clock)
    exchange.alias, exchange.key_id = "council", "k"

    async def scenario() -> None:
        for model, whole in (("one", True), ("two", True), ("two", False)):
            made, account = exchange.subrequest(), StreamAccount()
            made.model = model
            made.begin(f"{model}/0")
            made.passes(account, streamed=True)
            if whole:
                account.feed(STREAM)
                made.complete()
        assert exchange.usd() == pytest.approx((11 * 1 + 5 * 10 + 11 * 2 + 5 * 10) / 1e6)
        await exchange.close()

    asyncio.run(scenario())
    own, *made = sink.events
    assert (own.tokens_in, own.tokens_out, own.usd, own.endpoint) == (0, 0, 0.0, "")
    assert [(event.model, event.usd) for event in made] == [
        ("one", pytest.approx(61e-6)), ("two", pytest.approx(72e-6)), ("two", None)
    ]  # fmt: skip
    assert {(event.alias, event.key_id) for event in made} == {("council", "k")}
    assert sink.under_way == 0


def test_a_request_has_no_known_cost_where_one_that_was_made_for_it_has_none(sink: Recorded, clock: Clock):
    exchange = priced(sink, clock)
    made, account = exchange.subrequest(), StreamAccount()
    made.model = "free of a price"
    made.begin("nowhere/0")
    made.passes(account, streamed=True)
    account.feed(STREAM)
    made.complete()
    assert exchange.usd() is None
