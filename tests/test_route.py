"""`polyvox route`: scores of prompts, and fitting to labels."""

import json
import subprocess
import sys

import pytest

from tests.test_fitting import prompts


@pytest.fixture
def route():
    def run(*words, stdin=""):
        command = [sys.executable, "-m", "proxy", "route", *map(str, words)]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)

    return run


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def labels(tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text(jsonl(*({"prompt": text, "weak": 1 - hard, "strong": 1} for text, hard in prompts(80))))
    return file


def test_every_prompt_gets_a_line_with_its_complexity(route, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(jsonl({"prompt": ""}, {"prompt": "Привет", "id": 7}, {"prompt": "証明して"}))
    done = route("--score", file)
    assert done.returncode == 0, done.stderr
    assert [0 <= float(line) <= 1 for line in done.stdout.splitlines()] == [True] * 3
    assert route("--score", "-", stdin=file.read_text()).stdout == done.stdout


@pytest.mark.parametrize("bad", ['{"prompt": 5}', '{"text": "a"}', "[]", "{", '{"prompt": null}'])
def test_a_line_that_is_no_good_is_named(route, bad):
    done = route("--score", "-", stdin=jsonl({"prompt": "a"}) + bad + "\n")
    assert done.returncode == 2
    assert "stdin, line 2: " in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_a_missing_file_is_named(route):
    done = route("--score", "/nonexistent/p.jsonl")
    assert done.returncode == 2
    assert "/nonexistent/p.jsonl: No such file" in done.stderr


def test_without_anything_to_do_the_usage_is_shown(route):
    done = route()
    assert done.returncode == 2
    assert "--score" in done.stderr


def test_a_fitted_model_scores_by_the_labels(route, labels, tmp_path):
    out = tmp_path / "mine.json"
    done = route("fit", labels, "--out", out, "--strong-share", 0.5)
    assert done.returncode == 0, done.stderr
    assert "APGR, cross-validated: 0.7" in done.stderr
    assert "threshold for 50% strong calls" in done.stderr
    scored = route("--model", out, "--score", "-", stdin=jsonl({"prompt": "the tensor"}, {"prompt": "the apple"}))
    tensor, apple = map(float, scored.stdout.split())
    assert tensor > json.loads(out.read_text())["threshold"] > apple


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cost", 0.5], "--prices WEAK STRONG"),
        (["--cost", 5, "--prices", 0.1, 1], "--cost: 5 is not within what calls cost, 0.1 to 1"),
        (["--cost", 5, "--strong-share", 0.1], "only one"),
        (["--prices", 0.1, 1], "--prices: goes with --cost only"),
        (["--strong-share", 2], "--strong-share"),
    ],
)
def test_a_target_that_cannot_be_met_is_refused(route, labels, options, message):
    done = route("fit", labels, *options)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "weak": 2, "strong": 1}], "line 1: Expected `float` <= 1"),
        ([{"prompt": "a", "weak": 0}], "line 1: Object missing required field `strong`"),
        ([{"prompt": "a", "weak": 0, "strong": 1}] * 3, "3 labels; at least 50"),
        ([{"prompt": "a", "weak": 1, "strong": 1}] * 60, "both models are right equally often"),
    ],
)
def test_labels_that_are_no_good_are_refused(route, tmp_path, rows, message):
    file = tmp_path / "l.jsonl"
    file.write_text(jsonl(*rows))
    done = route("fit", file, "--out", tmp_path / "never.json")
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "never.json").exists()


def test_an_option_that_there_is_not_is_named(route):
    done = route("--scor", "file")
    assert done.returncode == 2
    assert "--scor" in done.stderr


def test_an_option_for_scores_does_not_go_with_a_prompt(route):
    assert route("--score", "-", "hi").returncode == 2
