"""Which Python `make setup` takes."""

import os
import subprocess
import sys
from pathlib import Path

from proxy import interpreter


def test_the_default_stays_unless_another_is_much_faster():
    assert interpreter.choose("a", {"a": 1.0, "b": 0.95}) == "a"
    assert interpreter.choose("a", {"a": 1.0, "b": 0.8, "c": 0.7}) == "c"


def test_the_default_stays_where_nothing_could_be_timed():
    assert interpreter.choose("a", {}) == "a"
    assert interpreter.choose("a", {"b": 0.1}) == "a"


def test_two_names_of_one_file_are_one_candidate(tmp_path: Path):
    for folder in ("x", "y", "z"):
        (tmp_path / folder).mkdir()
    real = tmp_path / "x" / "python9"
    real.write_text("#!/bin/sh\n")
    real.chmod(0o755)
    (tmp_path / "y" / "python9").symlink_to(real)
    found = interpreter.candidates([str(tmp_path / folder) for folder in "xyz"], "python9")
    assert found == [str(real)]


def test_it_names_an_interpreter_of_the_same_version_that_can_make_environments():
    base = getattr(sys, "_base_executable", sys.executable)
    asked = subprocess.run([base, interpreter.__file__], capture_output=True, text=True, check=True)
    said = subprocess.run(
        [asked.stdout.strip(), "-c", "import sys, venv, ensurepip; print(*sys.version_info[:2])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.split() == [str(part) for part in sys.version_info[:2]]


def test_a_program_that_is_no_python_is_not_taken(tmp_path: Path):
    fake = tmp_path / f"python{sys.version_info.major}.{sys.version_info.minor}"
    fake.write_text("#!/bin/sh\necho 0.000001; exit 1\n")
    fake.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    base = getattr(sys, "_base_executable", sys.executable)
    asked = subprocess.run([base, interpreter.__file__], capture_output=True, text=True, check=True, env=environ)
    assert not asked.stdout.startswith(str(tmp_path))
