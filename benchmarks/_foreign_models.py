"""Tiny models as other tools write them, and those tools' own logits of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 320
IDS = torch.arange(60).reshape(2, 30) + 5
IN_FLOAT32 = "its own logits in float32"
UNROUNDED = "its own dequantised weights, in float32: it rounds activations too"


@dataclass(frozen=True)
class Case:
    """Something that a tool writes."""

    name: str
    write: Callable[[Path], Tensor]
    """Writes `theirs` (and what else it needs) into a folder, returns the tool's own logits."""
    commands: tuple[tuple[str, ...], ...] = (("convert", "theirs", "--out", "ours"),)
    """Graft's commands, in that folder."""
    result: str = "ours"
    """What they make."""
    bound: float = 1e-4
    """Of the difference; a tool that computes in 16 bits has a wider one."""
    compared: str = IN_FLOAT32
    vocabulary: int = VOCABULARY
    """The logits that are compared; a runtime may pad them."""


@dataclass(frozen=True)
class Tool:
    """A tool with its packages, of which the first gives its version."""

    packages: tuple[str, ...]
    cases: Sequence[Case]


DEQUANTISE = (("convert", "theirs", "--dequantise", "--out", "ours"),)
AS_IT_IS: tuple[tuple[str, ...], ...] = ()


def logits_of(model: Any, vocabulary: int = VOCABULARY) -> Tensor:
    """Return the logits of a model of Transformers' interface."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits.float()
    return logits[..., :vocabulary]


def base_model(folder: Path, kind: str = "llama", dtype: str = "float32", **options: Any) -> Any:
    """Write a random model with its tokenizer; return it.

    Weights and norms are larger than a fresh model's, so that a mistake shows in the logits.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config = transformers.AutoConfig.for_model(kind, **(settings | options))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer of as many tokens as the model has."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(first, second) for first in "etaoin" for second in "shrdlu"]
    names = ["<|endoftext|>", *letters, *(first + second for first, second in merges)]
    names += [f"<|{index}|>" for index in range(VOCABULARY - len(names))]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def loaded(folder: Path, **options: Any) -> Any:
    """Return what Transformers makes of a folder, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | options))


# Transformers -------------------------------------------------------------------------------------


def saved(folder: Path, kind: str = "llama", dtype: str = "float32", **options: Any) -> Tensor:
    base_model(folder / "theirs", kind, dtype, **options)
    return logits_of(loaded(folder / "theirs"))


def sharded(folder: Path) -> Tensor:
    model = base_model(folder / "theirs")
    for file in (folder / "theirs").glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder / "theirs", max_shard_size="200KB")
    return logits_of(loaded(folder / "theirs"))


def pickled(folder: Path) -> Tensor:
    model = base_model(folder / "theirs")
    (folder / "theirs" / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "theirs" / "pytorch_model.bin")
    return logits_of(model)


def trained_head(folder: Path) -> Tensor:
    model = base_model(folder / "theirs", "qwen2")
    file = folder / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    return logits_of(model)


def vision(folder: Path) -> Tensor:
    """Gemma 3 with its vision tower; its text part alone is compared."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    base_model(folder / "theirs", "llama")  # for its tokenizer
    (folder / "theirs" / "model.safetensors").unlink()
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "sliding_window": 16,
    }
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(folder / "theirs")
    return logits_of(model)


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox", "olmo2", "granite")
TRANSFORMERS = Tool(
    ("transformers",),
    [
        *(
            Case(f"{kind}, safetensors", partial(saved, kind=kind), AS_IT_IS, "theirs")
            for kind in FAMILIES
        ),
        Case("llama, tied", partial(saved, tie_word_embeddings=True), AS_IT_IS, "theirs"),
        Case("llama, bfloat16", partial(saved, dtype="bfloat16"), AS_IT_IS, "theirs"),
        Case("llama, shards with an index", sharded, AS_IT_IS, "theirs"),
        Case("llama, pytorch_model.bin", pickled),
        Case(
            "qwen2, a trained head under tie_word_embeddings",
            trained_head,
            AS_IT_IS,
            "theirs",
            compared="the model that was saved",
        ),
        Case(
            "gemma3 with its vision tower",
            vision,
            (("convert", "theirs", "--text-part", "--out", "ours"),),
            compared="its own logits of text",
        ),
    ],
)


# bitsandbytes -------------------------------------------------------------------------------------


def by_bitsandbytes(folder: Path, dense: bool = False, **options: Any) -> Tensor:
    from transformers import BitsAndBytesConfig

    base_model(folder / "base")
    model = loaded(folder / "base", quantization_config=BitsAndBytesConfig(**options))
    model.save_pretrained(folder / "theirs")
    write_tokenizer(folder / "theirs")
    if dense:
        return logits_of(loaded(folder / "theirs").dequantize().float())
    # Otherwise its kernel for CPUs with AVX-512 takes the place, which rounds inputs to bfloat16.
    return logits_of(model.train())


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
FP4 = NF4 | {"bnb_4bit_quant_type": "fp4"}
NESTED = {"bnb_4bit_use_double_quant": True}
SKIPPED = {"llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp"]}
STORED = {"bnb_4bit_quant_storage": torch.bfloat16}
BITSANDBYTES = Tool(
    ("bitsandbytes",),
    [
        Case("NF4", partial(by_bitsandbytes, **NF4)),
        Case("NF4, nested", partial(by_bitsandbytes, **NF4, **NESTED)),
        Case("NF4, some layers left out", partial(by_bitsandbytes, **NF4, **SKIPPED)),
        Case("NF4, stored as bfloat16", partial(by_bitsandbytes, **NF4, **STORED)),
        Case("FP4", partial(by_bitsandbytes, **FP4)),
        Case(
            "LLM.int8",
            partial(by_bitsandbytes, dense=True, load_in_8bit=True),
            bound=1e-2,
            compared=UNROUNDED,
        ),
    ],
)


# mlx-lm -------------------------------------------------------------------------------------------


def by_mlx(folder: Path, kind: str = "llama", dtype: str = "float16", **options: Any) -> Tensor:
    import mlx_lm

    base_model(folder / "base", kind, head_dim=32)
    file = folder / "base" / "config.json"
    settings = json.loads(file.read_text())
    # Where today's Transformers has rope_parameters, mlx-lm reads older names.
    settings |= {"rope_theta": 10000.0, "rope_scaling": None}
    file.write_text(json.dumps(settings))
    mlx_lm.convert(
        str(folder / "base"), str(folder / "theirs"), quantize=True, dtype=dtype, **options
    )
    return mlx_logits(folder / "theirs")


def mlx_logits(folder: Path) -> Tensor:
    """Return what mlx-lm computes of a folder, in float32 whatever the folder's dtype is."""
    import mlx.core as mx
    import mlx_lm
    import numpy as np

    model, _ = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    return torch.from_numpy(np.array(model(mx.array(IDS.numpy())).astype(mx.float32)))


MLX = Tool(
    ("mlx-lm", "mlx"),
    [
        *(
            Case(
                f"{bits} bits, groups of {size}",
                partial(by_mlx, q_bits=bits, q_group_size=size),
                bound=1e-2,
            )
            for bits, size in ((4, 64), (4, 32), (2, 64), (3, 64), (8, 64))
        ),
        Case("5 bits", partial(by_mlx, q_bits=5, q_group_size=64), DEQUANTISE),
        Case("6 bits", partial(by_mlx, q_bits=6, q_group_size=64), DEQUANTISE),
        Case("mxfp4", partial(by_mlx, q_mode="mxfp4"), DEQUANTISE),
        Case(
            "qwen3, 4 bits",
            partial(by_mlx, kind="qwen3", q_bits=4, q_group_size=64),
            bound=1e-2,
        ),
    ],
)
