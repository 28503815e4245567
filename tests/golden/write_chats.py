"""Writes chats.json: the conversations of tests/prompts as transformers renders them with models' own templates.

Run by the engines' interpreter, with a folder of templates from the models' repositories, less what some of them do
with tools, and less the long system message that Mistral's has where there is none:
    python -I tests/golden/write_chats.py FOLDER    # FOLDER/chatml.jinja, llama3.jinja and so on, see SOURCES
"""

import importlib.metadata
import json
import sys
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "prompts"))

from conversations import CONVERSATIONS  # noqa: E402

SOURCES = {
    "chatml": ("teknium/OpenHermes-2.5-Mistral-7B", "<s>", "<|im_end|>"),
    "qwen": ("Qwen/Qwen2.5-3B-Instruct", "<s>", "<|im_end|>"),
    "llama3": ("meta-llama/Meta-Llama-3-8B-Instruct", "<|begin_of_text|>", "<|eot_id|>"),
    "llama3.1": ("meta-llama/Llama-3.1-8B-Instruct", "<|begin_of_text|>", "<|eot_id|>"),
    "inst": ("mistralai/Mistral-7B-Instruct-v0.2", "<s>", "</s>"),
    "mistral": ("mistralai/Mistral-Small-24B-Instruct-2501", "<s>", "</s>"),
    "gemma": ("google/gemma-2-2b-it", "<bos>", "<end_of_turn>"),
}


def rendered(template: str, messages: list[dict[str, str]], tokens: dict[str, str]) -> str | None:
    """Return the text of a chat, None where the template refuses it."""
    try:
        return render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **tokens)[0][0]
    except Exception as e:
        assert "support" in str(e), e
        return None


def family(name: str, folder: Path) -> dict[str, object]:
    source, bos, eos = SOURCES[name]
    template = (folder / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    tokens = {"bos_token": bos, "eos_token": eos}
    texts = {title: rendered(template, messages, tokens) for title, messages in CONVERSATIONS.items()}
    return {"template_of": source, **tokens, "texts": texts}


def main(folder: Path) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "jinja2")}
    golden = {"made_with": versions, "families": {name: family(name, folder) for name in SOURCES}}
    (HERE / "chats.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
