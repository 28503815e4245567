"""Writes tiny checkpoints with random weights into the folder named on the command line.

Run by the engine's interpreter (`python -I write_checkpoints.py FOLDER`): it needs torch, transformers and
tokenizers, and no network: the tokenizers are trained here on the text below.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)

VOCABULARY = 768  # 256 bytes, the special tokens, and some 500 merges so that a prompt is not one token a byte

PROSE = """
The capital of France is Paris. What is the weather in the city today? You are a helpful assistant, and you
use the tools that you are given whenever they help the user. Write a short story about a river and a stone.
Read the file, make the change, run the tests and report what they say. Answer with the name of the place.
"""

TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Reads a file from the local file system. The path parameter must be absolute. Use this "
        "tool when you need to read the contents of a file before you make a change to it.",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string", "description": "The absolute path to the file to read"}},
            "required": ["path"],
            "additionalProperties": False,
        },
    },
}

MISTRAL_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Only the roles system, user and assistant are supported.') }}
    {%- endif %}
{%- endfor %}"""

QWEN_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\nFunction signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\n\\nFor each call return a json object within <tool_call></tool_call> tags.' }}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif not (tools and loop.first and message['role'] == 'system') %}
        {{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}
        {%- for call in message['tool_calls'] or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call['function']['name'] + '", "arguments": ' }}
            {{- (call['function']['arguments'] | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the smallest that vLLM's attention for the CPU has
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
}

WHISPER_SIZES = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_source_positions": 1500,  # 30 s of audio, the window that vLLM cuts a recording into
    "max_target_positions": 448,
}


def trained(special: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer, trained on the text above, that knows the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE * 2, json.dumps(TOOL), json.dumps(TOOL)], trainer)
    return tokenizer


def write_chat_model(folder: Path, architecture: tuple, special: list[str], template: str) -> None:
    """Write a decoder whose tokenizer has special[0] as its first token and special[-1] as its last."""
    config_class, model_class = architecture
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained(special),
        bos_token=special[0],
        eos_token=special[-1],
        pad_token=special[-1],
        chat_template=template,
    )
    ids = {"bos_token_id": 0, "eos_token_id": len(special) - 1, "pad_token_id": len(special) - 1}
    torch.manual_seed(0)
    model = model_class(config_class(vocab_size=VOCABULARY, **SIZES, **ids))
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_whisper(folder: Path) -> None:
    """Write a speech model that knows English only."""
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|en|>",
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
        "<|startofprev|>",
        "<|nospeech|>",
        "<|notimestamps|>",
    ]
    tokenizer = WhisperTokenizerFast(tokenizer_object=trained(special), additional_special_tokens=special)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=VOCABULARY, suppress_tokens=None, begin_suppress_tokens=None, **WHISPER_SIZES, **ids)
    )
    model.generation_config = GenerationConfig(
        **ids, is_multilingual=True, lang_to_id={"<|en|>": 2}, task_to_id={"translate": 3, "transcribe": 4}
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)


def main(folder: Path) -> None:
    """Write every checkpoint into a folder of its name."""
    mistral = ["<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "</s>"]
    qwen = ["<|endoftext|>", "<|im_start|>", "<tool_call>", "</tool_call>", "<|im_end|>"]
    llama = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    write_chat_model(folder / "mistral", (MistralConfig, MistralForCausalLM), mistral, MISTRAL_TEMPLATE)
    write_chat_model(folder / "qwen", (Qwen2Config, Qwen2ForCausalLM), qwen, QWEN_TEMPLATE)
    write_chat_model(folder / "llama", (LlamaConfig, LlamaForCausalLM), llama, LLAMA_TEMPLATE)
    write_whisper(folder / "whisper")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
