"""Adapters as other programs write them, made by hand from random numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

PREFIX = "base_model.model."
IDS = torch.randint(4, 90, (2, 24), generator=torch.Generator().manual_seed(5))
WEIGHTS = "adapter_model.safetensors"


def low_rank(model: nn.Module, names: tuple[str, ...] = ("q_proj", "v_proj")) -> dict[str, Tensor]:
    """Return tensors of rank 4 for the layers of those names, as PEFT calls them."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            out, inputs = module.weight.shape
            for part, shape in (("lora_A", (4, inputs)), ("lora_B", (out, 4))):
                key = f"{PREFIX}{name}.{part}.weight"
                found[key] = torch.randn(shape, generator=generator) * 0.1
    return found


def save_peft(folder: Path, tensors: dict[str, Tensor], base: object, **options: Any) -> Path:
    """Write PEFT's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    save_file(
        {key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / WEIGHTS
    )
    return folder


def copy_tokenizer(source: Path, folder: Path) -> None:
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)


def dense(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits.double()
    return out


def merged(model: PreTrainedModel, tensors: dict[str, Tensor], scale: float = 2.0) -> Tensor:
    """Return the logits of a dense model with low-rank tensors added to its weights."""
    with torch.no_grad():
        for key, down in tensors.items():
            if key.endswith("lora_A.weight"):
                up = tensors[key.replace("lora_A", "lora_B")]
                name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                model.get_submodule(name).weight += scale * (up @ down)
    return logits(model)


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
