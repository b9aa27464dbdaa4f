"""A base, models that were tuned from it, and LoRAs for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from graft.model.lora_files import LoraFiles, LoraLayer, write_lora

LAYERS = {
    **{f"model.layers.{n}.self_attn.q_proj": (64, 64) for n in range(2)},
    **{f"model.layers.{n}.mlp.down_proj": (64, 96) for n in range(2)},
}
"""[out, in] of some layers of the tiny base."""


def tuned(base: Path, folder: Path, changes: Callable[[str], bool], size: float = 0.02) -> Path:
    """A copy of a model folder with noise on the tensors whose names are asked for."""
    shutil.copytree(base, folder)
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(5)
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if changes(name):
            tensors[name] = tensor + size * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def a_lora(folder: Path, base: str, rank: int = 4, seed: int = 0, scaling: float = 0.5) -> Path:
    """A LoRA with random factors for some layers of the tiny base."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: LoraLayer(
            torch.randn(rank, inputs, generator=generator) * 0.1,
            torch.randn(outputs, rank, generator=generator) * 0.1,
            scaling,
        )
        for name, (outputs, inputs) in LAYERS.items()
    }
    write_lora(LoraFiles(layers, base), folder)
    return folder
