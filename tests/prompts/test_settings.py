"""`adapter:` of a model in the configuration, and what becomes of it in the registry."""

import pytest

from engines.spec import EngineStatus, FleetStatus
from proxy import config, registry
from proxy.errors import ConfigError
from proxy.registry import Endpoint


def load(tmp_path, text: str) -> config.Loaded:
    file = tmp_path / "polyvox.yaml"
    file.write_text(text)
    return config.load(file, {})


def model(name: str, adapter: str, endpoint: str = "base_url: 'http://x/v1'") -> str:
    return f"models:\n  {name}:\n    endpoints: [{{{endpoint}}}]\n    adapter: {{{adapter}}}\n"


def endpoint_of(tmp_path, *args: str) -> Endpoint:
    (found,) = registry.build(load(tmp_path, model(*args)).config, FleetStatus(version=0)).models.values()
    return found.endpoints[0]


TEXT = "base_url: 'http://x/v1', provider: completions"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (model("m", "family: chatlm"), 4, ["models.m.adapter.family", "'chatlm' is none of", "chatml", "llama3.1"]),
        (model("m", "alternat: true"), 4, ["models.m.adapter.alternat", "did you mean 'alternate'"]),
        (model("m", "temperature: [1, 0]"), 4, ["models.m.adapter.temperature", "the least, 1, is more than"]),
        (model("m", "temperature: [0, 3]"), 4, ["models.m.adapter.temperature[1]", "<= 2"]),
        (model("m", "max_tokens: [0, 5]"), 4, ["models.m.adapter.max_tokens[0]", ">= 1"]),
        (model("m", "max_tokens: 5"), 4, ["models.m.adapter.max_tokens", "array"]),
        (model("m", "template: '{{ x }}'"), 4, ["models.m.adapter.template", "provider: completions"]),
        (model("m", "template: '{% if %}'", TEXT), 4, ["models.m.adapter.template", "not a template of Jinja: line 1"]),
        (model("m", "stop: ['x']", TEXT), 4, ["models.m.adapter.family", "alpaca", "or a template"]),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_its_line(tmp_path, text, line, said):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert f"polyvox.yaml:{line}: " in str(caught.value)
    for part in said:
        assert part in str(caught.value)


def test_a_family_that_is_named_goes_over_that_of_the_name(tmp_path):
    adapter = endpoint_of(tmp_path, "qwen", "family: gemma").adapter
    assert adapter and adapter.merge_system and adapter.alternate


def test_an_endpoint_of_text_has_the_template_of_its_name_there(tmp_path):
    adapter = endpoint_of(tmp_path, "m", "stop: [END]", TEXT + ", model: llama-3").adapter
    assert adapter and adapter.form and "<|start_header_id|>" in adapter.form.template
    assert adapter.stop == ("END", "<|eot_id|>")


def test_an_endpoint_of_text_may_have_a_template_of_its_own(tmp_path):
    adapter = endpoint_of(tmp_path, "m", "template: '{{ messages[0].content }}'", TEXT).adapter
    assert adapter and adapter.form and adapter.form.template == "{{ messages[0].content }}"


@pytest.mark.parametrize(("adapter", "merges"), [("", False), ("    adapter: {merge_system: true}\n", True)])
def test_an_engine_gets_messages_as_they_are_unless_it_is_configured(tmp_path, adapter, merges):
    loaded = load(tmp_path, "models:\n  gemma:\n    engine: {simulator: {}}\n" + adapter)
    engine = EngineStatus(id="gemma/0", model="gemma", replica=0, state="ready", since=0.0, address="unix:/s")
    (endpoint,) = registry.build(loaded.config, FleetStatus(version=1, engines=(engine,))).models["gemma"].endpoints
    assert bool(endpoint.adapter and endpoint.adapter.merge_system) is merges
    assert merges or endpoint.adapter is None


@pytest.mark.parametrize(("modalities", "refuses"), [("", False), ("[text]", True), ("[text, image]", False)])
def test_pictures_are_refused_where_a_models_modalities_have_none(tmp_path, modalities, refuses):
    said = f"    modalities: {modalities}\n" if modalities else ""
    loaded = load(tmp_path, "models:\n  m:\n    endpoints: [{base_url: 'http://x/v1'}]\n" + said)
    (endpoint,) = registry.build(loaded.config, FleetStatus(version=0)).models["m"].endpoints
    assert bool(endpoint.adapter and not endpoint.adapter.images) is refuses
