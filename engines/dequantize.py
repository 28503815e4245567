"""Turn a GGUF file into a checkpoint that vLLM loads: `dequantize.py FILE.gguf FOLDER`.

Run by the engine's interpreter, as a process of its own; it prints one JSON object per line: detail and progress,
or error.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(source: Path, target: Path) -> int:
    """Write config, weights, tokenizer and chat template into `target`; return the exit status."""
    say("reading", 0.0)
    read_once()
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        say("tokenizer", 0.35)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        say("weights", 0.5)
        full = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, quantization_config=full)
        say("writing", 0.85)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except (OSError, ValueError, NotImplementedError, KeyError) as failure:
        say(error=f"{failure}")
        return 1
    say("done", 1.0)
    return 0


def read_once() -> None:
    """Let transformers parse the file once: it asks for it three times, and for the map of names per layer.

    The reader is given plain bytes, too; slicing a numpy memmap for each word of the vocabulary takes most of the
    time. Together that is 10 s instead of 27 for SmolLM2-135M.
    """
    import gguf
    from gguf import gguf_reader

    np = gguf_reader.np

    class Numpy:
        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        @staticmethod
        def memmap(path: str, mode: str = "r") -> Any:
            return np.fromfile(path, dtype=np.uint8)

    gguf_reader.np = Numpy()
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)


def say(detail: str = "", progress: float | None = None, error: str | None = None) -> None:
    """Report a step, or the final error, to the process that started us."""
    sys.stdout.write(json.dumps({"detail": detail, "progress": progress, "error": error}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    status = main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stderr.flush()
    os._exit(status)  # all is written; taking torch and the parsed file apart would only cost seconds
