"""From a configuration and a fleet to who answers for a name."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.spec import EngineSettings, EngineStatus, FleetStatus, State
from proxy import registry
from proxy.config import Config, EndpointSettings, ModelSettings
from proxy.errors import UnknownModel
from proxy.naming import AliasSettings
from proxy.registry import Group, Preset

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
    assert build().names() == ["small", "org/cloud", "gpt-3.5-turbo", "auto", "auto:cheap", "auto:best", "auto:fast"]


def test_where_there_is_one_model_there_is_nothing_to_choose():
    one = Config(models={"small": CONFIG.models["small"]})
    assert registry.build(one, FleetStatus(version=0)).names() == ["small"]


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


NAMED = msgspec.structs.replace(
    CONFIG,
    aliases={
        "gpt-3.5-turbo": "small",
        "any": AliasSettings(any_of=("org/cloud", "gpt-3.5-turbo"), prefer="cost"),
        "law": AliasSettings(model="gpt-3.5-turbo", system="Be exact.", defaults={"temperature": 0.2}),
        "best-law": AliasSettings(model="any", system="Be exact."),
        "gpt-5": "auto",
    },
    fallbacks={"law": ("org/cloud",), "small": ("any",)},
)


def named() -> registry.Registry:
    return registry.build(NAMED, FleetStatus(version=0))


def test_a_group_stands_for_its_models():
    assert named().resolve("any") == Group("any", ("org/cloud", "small"), "cost")


def test_auto_stands_for_all_models():
    assert named().resolve("auto") == Group("auto", ("small", "org/cloud"))
    assert named().resolve("auto:best").prefer == "quality"
    assert named().resolve("gpt-5") == named().resolve("auto")


def test_a_preset_has_what_it_is_of_and_its_defaults_as_json():
    preset = named().resolve("law")
    assert isinstance(preset, Preset)
    assert preset.of == named().models["small"]
    assert (preset.system, preset.defaults) == ("Be exact.", {"temperature": msgspec.Raw(b"0.2")})
    assert named().resolve("best-law").of == named().resolve("any")


def test_a_group_in_a_chain_stands_for_its_models():
    assert named().chains == {
        "law": ("org/cloud",), "small": ("org/cloud", "small"), "gpt-3.5-turbo": ("org/cloud", "small")
    }  # fmt: skip


ONLY = frozenset(("org/cloud",))


def test_who_may_ask_for_some_names_only_finds_no_other():
    with pytest.raises(UnknownModel) as caught:
        named().resolve("small", ONLY)
    assert "'small' does not exist" in str(caught.value)
    assert named().resolve("org/cloud", ONLY).name == "org/cloud"
    virtual = ["auto", "auto:cheap", "auto:best", "auto:fast"]
    assert named().names(ONLY) == ["org/cloud", "any", "best-law", "gpt-5", *virtual]


def test_a_close_match_tells_nothing_of_names_that_may_not_be_asked_for():
    with pytest.raises(UnknownModel) as caught:
        named().resolve("smal", ONLY)
    assert "small" not in str(caught.value).replace("'smal'", "")


@given(st.frozensets(st.sampled_from(["small", "org/cloud", "any", "law", "auto", "gpt-3.5-turbo"])))
def test_what_is_listed_is_what_can_be_asked_for(only):
    found = named()
    listed = found.names(only)
    for name in found.names():
        if name in listed:
            assert found.resolve(name, only)
        else:
            with pytest.raises(UnknownModel):
                found.resolve(name, only)


def test_the_context_that_is_configured_counts_for_more_than_the_engines():
    model = ModelSettings(engine=EngineSettings(weights="a/b"), context=1024)
    fleet = FleetStatus(version=1, engines=(engine(0, "ready", "unix:/s", context=2048),))
    assert registry.build(Config(models={"small": model}), fleet).models["small"].context_length == 1024
