"""Which foreign folders are changed, and how their owners read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _foreign_adapters import ADOPT, by_peft
from _foreign_gguf import by_llama_cpp, dequantised_logits, llama_cpp_logits
from _foreign_models import (
    AS_IT_IS,
    DEQUANTISE,
    FP4,
    NESTED,
    NF4,
    by_bitsandbytes,
    by_mlx,
    loaded,
    logits_of,
    mlx_logits,
    saved,
    sharded,
)
from _foreign_quantisers import by_auto_round, by_compressed_tensors, by_torchao
from torch import Tensor

CONVERT = (("convert", "theirs", "--out", "ours"),)


@dataclass(frozen=True)
class Kind:
    """A folder that a tool wrote, and its readers."""

    write: Callable[[Path], Any]
    owner: Callable[[Path], Tensor]
    """Returns the logits of what lies in a folder as the tool that wrote it reads it."""
    commands: tuple[tuple[str, ...], ...] = CONVERT
    result: str = "ours"
    changed: str = "theirs"
    """What is changed: a folder, or a pattern of files."""
    settings: tuple[str, ...] = ("config.json",)
    bound: float = 1e-3
    logits: Callable[[Any], Tensor] = logits_of


def by_transformers(folder: Path, train: bool = False) -> Tensor:
    model = loaded(folder / "theirs")
    for parameter in model.parameters():  # of some folders they stay in 16 bits, and all after them
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return logits_of(model.train() if train else model.eval())


def with_peft(folder: Path) -> Tensor:
    """Load the adapter as PEFT does, and take its warning of missing tensors for a refusal."""
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return logits_of(PeftModel.from_pretrained(loaded(folder / "base"), folder / "theirs"))


def as_gptqmodel_reads(folder: Path) -> Tensor:
    """Dequantise by what the configuration says, and compute with Transformers.

    The zero points are as `checkpoint_format` says; the groups as g_idx says.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "theirs" / "config.json").read_text(encoding="utf-8"))
    settings = config.pop("quantization_config")
    if settings.get("quant_method") not in ("gptq", "gptq_v2"):
        raise ValueError("not GPTQ's")
    bits = settings["bits"]
    v1 = settings.get("checkpoint_format", "gptq") == "gptq"
    tensors = load_file(folder / "theirs" / "model.safetensors")
    for name in [key[: -len(".qweight")] for key in tensors if key.endswith(".qweight")]:
        words, zero_words = tensors.pop(f"{name}.qweight"), tensors.pop(f"{name}.qzeros")
        scales, groups = tensors.pop(f"{name}.scales").float(), tensors.pop(f"{name}.g_idx").long()
        shifts = torch.arange(0, 32, bits)
        codes = (words.long()[:, None] >> shifts[None, :, None] & (1 << bits) - 1).flatten(0, 1)
        zeros = (zero_words.long()[..., None] >> shifts & (1 << bits) - 1).flatten(1)
        zeros = zeros + 1 & (1 << bits) - 1 if v1 else zeros
        tensors[f"{name}.weight"] = (scales[groups] * (codes - zeros[groups])).T.contiguous()
    kind = config.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    missing, strange = model.load_state_dict(tensors, strict=False)
    if missing or strange:
        raise ValueError(f"missing {missing}, without a place {strange}")
    return logits_of(model.float().eval())


def with_llama_cpp(folder: Path) -> Tensor:
    return llama_cpp_logits(folder / "theirs.gguf")


def dequantised_by_llama_cpp(folder: Path) -> Tensor:
    return dequantised_logits(folder / "theirs.gguf")


def with_mlx(folder: Path) -> Tensor:
    return mlx_logits(folder / "theirs")


INT4 = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
ADAPTER = {"commands": ADOPT, "settings": ("adapter_config.json",)}
FOLDER = {"commands": AS_IT_IS, "result": "theirs"}
GGUF = ("convert", "theirs.gguf", "--tokenizer", "base", "--out", "ours")
KINDS: dict[str, Kind] = {
    "llama": Kind(saved, by_transformers, **FOLDER),
    "llama-shards": Kind(
        sharded, by_transformers, **FOLDER, settings=("config.json", "model.safetensors.index.json")
    ),
    "qwen2-tied": Kind(
        partial(saved, kind="qwen2", tie_word_embeddings=True), by_transformers, **FOLDER
    ),
    "gemma": Kind(partial(saved, kind="gemma", head_dim=32), by_transformers, **FOLDER),
    "gpt2": Kind(
        partial(saved, kind="gpt2", n_embd=64, n_layer=2, n_head=4), by_transformers, **FOLDER
    ),
    "peft": Kind(by_peft, with_peft, **ADAPTER),
    "peft-patterns": Kind(
        partial(by_peft, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
        with_peft,
        **ADAPTER,
    ),
    "peft-dora": Kind(partial(by_peft, use_dora=True), with_peft, **ADAPTER),
    "peft-modules": Kind(
        partial(by_peft, modules_to_save=["embed_tokens", "lm_head"]), with_peft, **ADAPTER
    ),
    "gptq": Kind(
        partial(by_auto_round, layout="auto_gptq", bits=4, group_size=32, sym=False),
        as_gptqmodel_reads,
        bound=1e-2,
    ),
    "gptq-symmetric": Kind(
        partial(by_auto_round, layout="auto_gptq", bits=4, group_size=32),
        as_gptqmodel_reads,
        bound=1e-2,
    ),
    "bitsandbytes": Kind(partial(by_bitsandbytes, **NF4), partial(by_transformers, train=True)),
    "bitsandbytes-nested": Kind(
        partial(by_bitsandbytes, **FP4, **NESTED), partial(by_transformers, train=True)
    ),
    "mlx": Kind(partial(by_mlx, q_bits=4, q_group_size=64), with_mlx),
    "compressed-int4": Kind(partial(by_compressed_tensors, **INT4), by_transformers, bound=1e-2),
    "compressed-fp8": Kind(partial(by_compressed_tensors, **FP8), by_transformers, DEQUANTISE),
    "torchao": Kind(partial(by_torchao, name="Int8WeightOnlyConfig"), by_transformers, bound=1e-2),
    "gguf": Kind(partial(by_llama_cpp, name="F32"), with_llama_cpp, (GGUF,), changed="theirs.gguf"),
    "gguf-q8_0": Kind(
        partial(by_llama_cpp, name="Q8_0"),
        dequantised_by_llama_cpp,
        (GGUF,),
        changed="theirs.gguf",
        bound=1e-3,
    ),
}
