"""Tiny checkpoints with random weights, of the architectures and chat formats that Polyvox is meant for.

They are written by the engine's interpreter, which has torch and transformers; the tests' own has neither.
"""

import os
import subprocess
import sys
from pathlib import Path

import msgspec

_WRITER = Path(__file__).with_name("write_checkpoints.py")


class Checkpoints(msgspec.Struct, frozen=True):
    """The folders of the checkpoints. mistral, qwen and llama chat; whisper transcribes audio.

    Each loads with `--dtype float32`; a qwen started with `--runner pooling` serves embeddings and scores.
    """

    mistral: Path
    qwen: Path
    llama: Path
    whisper: Path


def write_checkpoints(interpreter: Path, folder: Path) -> Checkpoints:
    """Write all of them below `folder`, the same bytes each time; raise AssertionError with the writer's words."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [str(interpreter), "-I", str(_WRITER), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{_WRITER.name} failed:\n{done.stderr[-4000:]}"
    return checkpoints_in(folder)


def checkpoints_in(folder: Path) -> Checkpoints:
    """Return those that were written below `folder`."""
    return Checkpoints(*(folder / name for name in Checkpoints.__struct_fields__))


if __name__ == "__main__":
    print(write_checkpoints(Path(sys.argv[1]), Path(sys.argv[2])))
