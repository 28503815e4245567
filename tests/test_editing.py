"""A model changes in the text of a configuration, and nothing else there does."""

import stat
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy import editing
from proxy.errors import ConfigError, FileReadOnly

TEXT = """\
# top
server: {port: 8000}   # where
models:
    # the first
    a:
        endpoints:
        - base_url: http://a/v1  # of a
          api_key: ${A_KEY}      # of a as well
        timeouts: {connect: 1}

    b: {engine: {simulator: {}}} # simulated
    c:
        endpoints: [{base_url: http://c/v1}]
ledger: off # not `false`
aliases:
    'x': a # quoted
"""
HTTP = {"endpoints": [{"base_url": "http://n/v1"}]}


def lines(text: str) -> set[str]:
    return set(text.splitlines()) - {""}


def test_a_new_model_is_added_and_every_line_stays():
    text = editing.put_model(TEXT, "org/new", HTTP)
    assert lines(TEXT) <= lines(text)
    assert yaml.safe_load(text)["models"]["org/new"] == HTTP


def test_what_stays_of_a_model_keeps_its_comments_and_its_order():
    settings = {
        "timeouts": {"connect": 2},
        "endpoints": [{"base_url": "http://a/v1", "api_key": "***", "weight": 0.5}],
        "retries": {"share": 0.1},
    }
    text = editing.put_model(TEXT, "a", settings)
    changed = "        timeouts: {connect: 1}"
    assert lines(TEXT) - lines(text) == {changed}
    assert lines(text) - lines(TEXT) == {"        timeouts: {connect: 2}", "          weight: 0.5", "        retries:",
                                         "            share: 0.1"}  # fmt: skip


def test_what_a_model_has_no_more_is_taken_out():
    text = editing.put_model(TEXT, "a", {"endpoints": [{"base_url": "http://a/v1"}]})
    assert yaml.safe_load(text)["models"]["a"] == {"endpoints": [{"base_url": "http://a/v1"}]}


def test_a_model_is_removed_and_every_other_line_stays():
    text = editing.remove_model(TEXT, "b")
    assert lines(TEXT) - lines(text) == {"    b: {engine: {simulator: {}}} # simulated"}


@pytest.mark.parametrize(
    "text", ["", "# only a comment\n", "models:\n", "models: {}\n", '{"models": {}, "aliases": {}}']
)
def test_a_file_without_models_gets_one(text: str):
    assert yaml.safe_load(editing.put_model(text, "m", HTTP))["models"] == {"m": HTTP}


def test_what_another_model_shares_by_an_anchor_is_left_alone():
    text = "models:\n  a: &a\n    endpoints: [{base_url: 'http://a/v1'}]\n  b: *a\n"
    with pytest.raises(ConfigError, match=r"models.b: more than this model would change"):
        editing.put_model(text, "b", HTTP)


def test_a_mask_stands_for_what_is_there_and_for_nothing_else():
    with pytest.raises(ConfigError) as refused:
        editing.put_model(TEXT, "b", {"endpoints": [{"base_url": "http://b/v1", "api_key": "***"}]})
    assert refused.value.field == "models.b.endpoints[0].api_key"


@pytest.mark.parametrize("number", [1e-05, 1e16, 1.5e300, 0.1, 15, True])
@pytest.mark.parametrize("before", ["1e-05", "0o17", "1e16", "yes", "0.1"])
def test_a_number_is_read_as_it_was_put_whatever_stood_there(number: float, before: str):
    text = editing.put_model(f"models: {{a: {{weight: {before}}}}}\n", "a", {"weight": number})
    read = yaml.safe_load(text)["models"]["a"]["weight"]
    assert (read, type(read)) == (number, type(number))


@pytest.mark.parametrize("text", [":1", "a: b", "?x", "on", "1e3", "{", "a, b"])
def test_a_name_is_read_as_it_was_put_also_in_braces(text: str):
    written = editing.put_model("models: {a: {timeouts: {connect: 1}}}\n", "a", {"timeouts": {text: text}})
    assert yaml.safe_load(written)["models"]["a"] == {"timeouts": {text: text}}


WORDS = ("on", "off", "no", "~", "null", "1_000", "0o17", "1e3", "3:30", "", "a: b", "- a", "#", "*x", "${KEY}", "a\nb",
         "2026-01-31", "=", "<<")  # fmt: skip
TEXTS = st.sampled_from(WORDS) | st.text("a1é:-#'\"\\\n{}[]&*!|>%@,. ", max_size=9)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["endpoints", "timeouts", "engine", "allow"]), VALUES, max_size=3))
def test_whatever_is_put_is_read_as_it_was_meant_or_refused(settings: dict[str, object]):
    try:
        text = editing.put_model(TEXT, "a", settings)
    except ConfigError:
        return
    old, new = yaml.safe_load(TEXT), yaml.safe_load(text)
    assert new["models"].pop("a") == settings
    del old["models"]["a"]
    assert new == old


# Writing


def test_a_file_is_replaced_whole_with_its_mode_and_through_links(tmp_path: Path):
    path, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    editing.write(link, "new")
    assert path.read_text() == "new"
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path, link] or list(tmp_path.iterdir()) == [link, path]


def test_a_read_only_file_is_refused_by_its_name(tmp_path: Path):
    path = tmp_path / "polyvox.yaml"
    path.write_text("old")
    path.chmod(0o400)
    with pytest.raises(FileReadOnly, match=r"polyvox.yaml: the file is read-only"):
        editing.write(path, "new")
    assert path.read_text() == "old"


def test_the_embedded_default_is_never_written():
    with pytest.raises(FileReadOnly, match="copy it to"):
        editing.write(Path(editing.__file__).parent / "shipped" / "polyvox.yaml", "new")


@pytest.mark.parametrize("text", ["models: [", "a: 1\na: 2\n", "\t- x"])
def test_a_file_that_is_no_yaml_any_more_is_left_alone(text: str):
    with pytest.raises(ConfigError, match="not valid YAML"):
        editing.put_model(text, "m", HTTP)
