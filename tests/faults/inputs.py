"""What the commands work on: a tiny random Llama, rows, and what commands make of them."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = "red green blue lamp chair table oak steel light heavy small large the is a of and".split()


def write_base(folder: Path) -> Path:
    """Write a Llama of 60,000 random weights with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_pickled(base: Path, folder: Path) -> Path:
    """Write the base as a folder of pickled weights."""
    import shutil

    import torch
    from safetensors.torch import load_file

    shutil.copytree(base, folder)
    torch.save(load_file(base / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def _sentence(number: int) -> str:
    return " ".join(WORDS[(number * step + step) % len(WORDS)] for step in range(1, 5))


def write_rows(path: Path) -> Path:
    """Write 24 prompt/completion rows."""
    lines = [
        json.dumps({"prompt": _sentence(number), "completion": _sentence(number + 1)})
        for number in range(24)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
