"""What was found out of servers: kept on disk, and found again in the registry."""

import msgspec
import pytest

from engines.spec import EngineSettings, EngineStatus, FleetStatus
from proxy import registry
from proxy.capabilities import Capabilities, Finding, Folder, shared, subject_of
from proxy.config import Config, EndpointSettings, ModelSettings

ENGINE = EngineSettings(weights="a/b", args={"tool-call-parser": "hermes"})
ENDPOINT = EndpointSettings(base_url="http://127.0.0.1:1/v1")
CONFIG = Config(models={"local": ModelSettings(engine=ENGINE), "remote": ModelSettings(endpoints=(ENDPOINT,))})


def finding(version: str | None = None, **capabilities: object) -> Finding:
    return Finding(model="m", capabilities=Capabilities(**capabilities), at=1.0, version=version)


def build(findings: dict[str, Finding], version: str | None = "1.0") -> registry.Registry:
    engine = EngineStatus(
        id="local/0", model="local", replica=0, state="ready", since=1.0, address="unix:/s", version=version
    )
    return registry.build(CONFIG, FleetStatus(version=1, engines=(engine,)), findings)


def test_a_finding_is_read_as_it_was_written(tmp_path):
    folder = Folder(tmp_path / "capabilities")
    assert folder.read() == {} and folder.changed() == 0
    folder.write("abc", finding("1.0", tools=True, context_length=2048, modalities=("text",)))
    assert folder.read() == {"abc": finding("1.0", tools=True, context_length=2048, modalities=("text",))}
    assert [file.name for file in folder.path.iterdir()] == ["abc.json"]


def test_each_finding_that_is_written_changes_the_folder(tmp_path):
    folder = Folder(tmp_path)
    seen = {folder.changed()}
    for number in range(5):
        folder.write("abc", finding(tools=bool(number % 2)))
        seen.add(folder.changed())
    assert len(seen) == 6


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model":1}', b"\xff"])
def test_a_file_that_is_no_finding_is_left_out(tmp_path, content):
    folder = Folder(tmp_path)
    folder.write("good", finding())
    (tmp_path / "bad.json").write_bytes(content)
    assert set(folder.read()) == {"good"}


def test_the_registry_has_what_was_found_of_engines_and_endpoints():
    found = {
        subject_of(ENGINE, "local"): finding("1.0", tools=True),
        subject_of(ENDPOINT, "remote"): finding("x", json_schema=False, context_length=4096),
    }
    made = build(found)
    assert made.resolve("local").capabilities.tools is True
    assert made.resolve("local").endpoints[0].capabilities.tools is True
    assert made.resolve("remote").capabilities.json_schema is False
    assert made.resolve("remote").context_length == 4096


def test_what_was_found_of_another_version_of_a_server_is_not_used():
    found = {subject_of(ENGINE, "local"): finding("1.0", tools=True)}
    assert build(found, version="1.1").resolve("local").capabilities == Capabilities()
    assert build(found, version=None).resolve("local").capabilities.tools is True  # it has not told yet


@pytest.mark.parametrize(
    "other",
    [
        EngineSettings(weights="a/c", args={"tool-call-parser": "hermes"}),
        EngineSettings(weights="a/b"),
        EngineSettings(weights="a/b", args={"tool-call-parser": "hermes"}, max_model_len=1),
    ],
)
def test_an_engine_with_other_weights_or_flags_is_another_subject(other):
    assert subject_of(other, "m") != subject_of(ENGINE, "m")


def test_where_and_how_often_an_engine_runs_makes_no_other_subject():
    assert subject_of(msgspec.structs.replace(ENGINE, replicas=3, devices="cpu"), "n") == subject_of(ENGINE, "m")


def test_an_endpoint_goes_on_with_chats_where_that_was_found_and_nothing_is_configured():
    def continues(configured: bool | None, found: bool | None) -> bool:
        endpoint = msgspec.structs.replace(ENDPOINT, continues=configured)
        config = Config(models={"m": ModelSettings(endpoints=(endpoint,))})
        findings = {subject_of(endpoint, "m"): finding(continues=found)}
        return registry.build(config, FleetStatus(version=1), findings).resolve("m").endpoints[0].continues

    table = {(c, f): continues(c, f) for c in (None, True, False) for f in (None, True, False)}
    assert table == {
        (None, None): False, (None, True): True, (None, False): False,
        (True, None): True, (True, True): True, (True, False): True,
        (False, None): False, (False, True): False, (False, False): False,
    }  # fmt: skip


def test_a_chat_may_go_on_at_an_engine_whatever_was_found():
    found = {subject_of(ENGINE, "local"): finding("1.0", continues=False)}
    assert build(found).resolve("local").endpoints[0].continues is True


def test_usage_is_not_asked_of_streams_where_it_was_found_that_it_is_refused():
    found = {subject_of(ENDPOINT, "remote"): finding(stream_usage=False)}
    assert build(found).resolve("remote").endpoints[0].stream_usage is False
    assert build({}).resolve("remote").endpoints[0].stream_usage is True


def test_a_model_can_do_what_all_its_endpoints_can():
    one = Capabilities(tools=True, json_mode=True, logprobs=True, context_length=10, modalities=("text", "image"))
    two = Capabilities(tools=True, json_mode=False, context_length=5, modalities=("text",), instruction_score=0.5)
    both = Capabilities(tools=True, json_mode=False, context_length=5, modalities=("text",))
    assert shared([one, two]) == shared([two, one]) == both
    assert shared([one]) == one and shared([]) == Capabilities()
