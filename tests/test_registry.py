"""From a configuration and a fleet to who answers for a name."""

import pytest

from engines.spec import EngineSettings, EngineStatus, FleetStatus, State
from proxy import registry
from proxy.config import Config, EndpointSettings, ModelSettings
from proxy.errors import UnknownModel

CONFIG = Config(
    models={
        "small": ModelSettings(engine=EngineSettings(weights="a/b", replicas=2)),
        "org/cloud": ModelSettings(
            endpoints=(
                EndpointSettings(base_url="https://api.example.com/openai/v1/", model="gpt-x"),
                EndpointSettings(base_url="http://127.0.0.1:11434/v1"),
            )
        ),
    },
    aliases={"gpt-3.5-turbo": "small"},
)


def engine(replica: int, state: State, address: str | None = None, context: int | None = None) -> EngineStatus:
    return EngineStatus(
        id=f"small/{replica}", model="small", replica=replica, state=state, since=0.0, detail=f"is {state}",
        address=address, context_length=context,
    )  # fmt: skip


def build(*engines: EngineStatus) -> registry.Registry:
    return registry.build(CONFIG, FleetStatus(version=1, engines=engines))


def test_an_alias_leads_to_its_model():
    assert build().resolve("gpt-3.5-turbo").name == "small"


def test_models_and_aliases_can_be_asked_for():
    assert build().names() == ["small", "org/cloud", "gpt-3.5-turbo"]


@pytest.mark.parametrize(
    ("name", "said"), [("smal", "Did you mean 'small'?"), ("zzz", "/v1/models"), ("x" * 5000, "xxx...")]
)
def test_an_unknown_name_is_refused_with_what_comes_close(name, said):
    with pytest.raises(UnknownModel) as caught:
        build().resolve(name)
    assert caught.value.status == 404
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


def test_before_the_supervisor_is_heard_a_local_model_is_starting():
    assert build().resolve("small").state == "starting"
    assert build().resolve("small").ready() == ()


def test_a_model_is_as_good_as_its_best_engine():
    model = build(engine(0, "failed"), engine(1, "ready", "unix:/s1", context=2048)).resolve("small")
    assert (model.state, model.detail, model.context_length) == ("ready", "is ready", 2048)
    assert [(e.name, e.address, e.serves) for e in model.ready()] == [("small/1", "unix:/s1", "small")]


def test_an_engine_that_drains_gets_no_request():
    model = build(engine(0, "draining", "unix:/s0")).resolve("small")
    assert model.state == "draining"
    assert model.ready() == ()


def test_an_engine_of_a_model_that_is_not_configured_is_ignored():
    stray = EngineStatus(id="other/0", model="other", replica=0, state="ready", since=0.0, address="unix:/o")
    assert "other" not in build(stray).models


def test_a_remote_model_is_always_asked():
    first, second = build().resolve("org/cloud").ready()
    assert (first.address, first.serves) == ("https://api.example.com", "gpt-x")
    assert (second.address, second.serves) == ("http://127.0.0.1:11434", "org/cloud")


def test_paths_are_translated_for_endpoints_and_kept_for_engines():
    cloud, _ = build().resolve("org/cloud").endpoints
    local = build(engine(0, "ready", "unix:/s0")).resolve("small").endpoints[0]
    assert cloud.path("/v1/chat/completions") == "/openai/v1/chat/completions"
    assert cloud.path("/tokenize") == "/openai/tokenize"
    assert local.path("/v1/chat/completions") == "/v1/chat/completions"
