"""The target hf: a plain folder that AutoModelForCausalLM loads, every layer dequantised."""

from __future__ import annotations

from pathlib import Path

import torch

from graft.adapters.attach import frozen_layers
from graft.export.base import OnTensor, Origin, RuntimePackage, Target, Usage
from graft.export.hf.runtime import Transformers
from graft.export.runtimes import Runtime
from graft.model.load import LoadedModel
from graft.model.save import save_plain_model


class HfTarget(Target):
    """See the module."""

    name = "hf"
    holds_new_biases = False  # Transformers builds the layers that config.json describes
    requantizes = False
    library = "transformers"
    tagged = False
    runtime = RuntimePackage("transformers", "transformers")

    def write(
        self, loaded: LoadedModel, path: Path, origin: Origin, on_tensor: OnTensor
    ) -> tuple[str, ...]:
        layers = [layer for _, layer in frozen_layers(loaded.model)]
        quantised = any(layer.weight_format.quantised for layer in layers)
        dtype = torch.float32 if quantised else loaded.source_dtype
        save_plain_model(loaded, path, dtype, on_tensor)
        note = "dequantised to float32, which holds the quantised weights exactly"
        return (note,) if quantised else ()

    def usage(self, file: str, base: str | None) -> Usage:
        return Usage(
            "In this folder:",
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")\n'
            'tokenizer = AutoTokenizer.from_pretrained(".")\n'
            'ids = tokenizer("Hello", return_tensors="pt").input_ids\n'
            "print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0]))",
        )

    def matches(self, path: Path) -> bool:
        return (path / "model.safetensors").is_file() and (path / "config.json").is_file()

    def load(self, path: Path, tokens: int) -> Runtime:
        return Transformers(path)


HF = HfTarget()
