"""Gets what the tests of real engines need: their environment, installed and compiled, and tiny checkpoints.

A program, so that it runs beside the tests that come before: python -m tests.real.preparing CHECKPOINTS
"""

import asyncio
import sys
from pathlib import Path

from engines import environment
from engines.paths import StatePaths
from tests.fakes.checkpoints import write_checkpoints
from tests.serving import shared_data


def interpreter() -> Path:
    """Where the engines' interpreter is, or will be."""
    return environment.location("cpu", _paths())


async def prepare(checkpoints: Path) -> None:
    """Install and compile the environment where that has not been done, and write the checkpoints."""
    python = await environment.ensure("cpu", _paths(), lambda detail, progress: None)
    await environment.warm_up("cpu", _paths())
    write_checkpoints(python, checkpoints)


def _paths() -> StatePaths:
    return StatePaths.resolve(data_dir=shared_data())


if __name__ == "__main__":
    asyncio.run(prepare(Path(sys.argv[1])))
