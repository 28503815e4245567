"""Which ensembles a configuration may have, and what is said of others: file, line, key and remedy."""

from pathlib import Path

import pytest

from proxy import config
from proxy.ensembles.settings import EnsembleSettings
from proxy.errors import ConfigError

MODELS = """\
models:
  qwen: {endpoints: [{base_url: "http://x/v1"}]}
  vistral: {endpoints: [{base_url: "http://x/v1"}]}
aliases: {legal: vistral}
ensembles:
"""
FIRST = MODELS.count("\n") + 1


def load(folder: Path, text: str, **environ: str) -> config.Config:
    path = folder / "polyvox.yaml"
    path.write_text(MODELS + text)
    return config.load(path, environ).config


def test_an_ensemble_of_models_and_aliases_is_read(tmp_path):
    text = "  council: {members: {legal: 2.0, qwen: 1}, strategy: judge, judge: qwen, quorum: 2, timeout: 20}\n"
    settings = EnsembleSettings(
        members={"legal": 2.0, "qwen": 1.0}, strategy="judge", judge="qwen", quorum=2, timeout=20.0
    )
    assert load(tmp_path, text).ensembles == {"council": settings}


def test_the_environment_can_change_an_ensemble(tmp_path):
    text = "  council: {members: {qwen: 1, vistral: 1}}\n"
    changed = load(tmp_path, text, POLYVOX_ENSEMBLES__COUNCIL__QUORUM="2", POLYVOX_ENSEMBLES__COUNCIL__STRATEGY="vote")
    assert changed.ensembles["council"].quorum == 2
    assert changed.ensembles["council"].strategy == "vote"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("  a:\n    members: {qwen: 1, vistrl: 1}\n", 1, ["a.members.vistrl", "no model", "did you mean 'vistral'?"]),
        ("  a:\n    members:\n      qwen: -1\n", 2, ["a.members.qwen", "the weight is -1", "above 0"]),
        ("  a:\n    members:\n      qwen: 0\n", 2, ["a.members.qwen", "above 0"]),
        ("  a:\n    members:\n      qwen: .nan\n", 2, ["a.members.qwen", "above 0"]),
        ("  a:\n    members: {qwen: heavy}\n", 1, ["a.members", "expected `float`"]),
        ("  a: {members: {}}\n", 0, ["a.members", "name the models"]),
        ("  a: {}\n", 0, ["ensembles.a", "missing required field `members`"]),
        ("  a:\n    members: {qwen: 1}\n    quorum: 2\n", 2, ["a.quorum", "of 1 members", "allowed: 1 to 1"]),
        ("  a:\n    members: {qwen: 1}\n    quorum: 0\n", 2, ["a.quorum", ">= 1"]),
        ("  a:\n    members: {qwen: 1, legal: 1}\n    strategy: first\n    quorum: 2\n", 3, ["a.quorum", "first"]),
        ("  a:\n    members: {qwen: 1}\n    timeout: 0\n", 2, ["a.timeout", "> 0"]),
        ("  a:\n    members: {qwen: 1}\n    strategy: concensus\n", 2, ["a.strategy", "did you mean 'consensus'?"]),
        ("  a:\n    members: {qwen: 1}\n    strategy: x\n", 2, ["a.strategy", "none of confidence", "vote"]),
        ("  a:\n    members: {qwen: 1}\n    strategy: judge\n", 0, ["ensembles.a", "add judge: MODEL"]),
        ("  a:\n    members: {qwen: 1}\n    strategy: fuse\n", 0, ["ensembles.a", "add writer: MODEL"]),
        ("  a:\n    members: {qwen: 1}\n    judge: qwen\n", 2, ["a.judge", "only the strategy judge", "consensus"]),
        ("  a:\n    members: {qwen: 1}\n    strategy: fuse\n    writer: qven\n", 3, ["a.writer", "'qwen'"]),
        ("  a:\n    members: {qwen: 1}\n    qorum: 1\n", 2, ["a.qorum", "did you mean 'quorum'?"]),
        ("  a:\n    members: {a: 1}\n", 1, ["a.members.a", "is an ensemble", "asks no other"]),
        ("  a: {members: {b: 1}}\n  b: {members: {a: 1}}\n", 0, ["a.members.b", "is an ensemble"]),
        ("  qwen: {members: {vistral: 1}}\n", 0, ["ensembles.qwen", "has this name already"]),
        ("  legal: {members: {vistral: 1}}\n", 0, ["ensembles.legal", "has this name already"]),
        ("  a b: {members: {qwen: 1}}\n", 0, ["one printable word"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, line, words):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert f"polyvox.yaml:{FIRST + line}:" in message
    assert all(word in message for word in words), message
