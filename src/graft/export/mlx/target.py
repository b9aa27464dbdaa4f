"""The target mlx: a folder for mlx-lm, in which INT layers keep codes, scales and offsets."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig

from graft.export.base import OnTensor, Origin, RuntimePackage, Target, Usage
from graft.export.mlx.runtime import MlxLm
from graft.export.mlx.write import BITS, check_mlx_plan, export_mlx
from graft.export.runtimes import Runtime
from graft.files.read import read_json
from graft.formats.base import WeightFormat
from graft.model.load import LoadedModel


class MlxTarget(Target):
    """See the module."""

    name = "mlx"
    stage = "writing MLX"
    widths = BITS
    holds_new_biases = False  # mlx-lm builds the layers that config.json describes
    runtime = RuntimePackage("mlx_lm", "'mlx[cpu]' mlx-lm")

    def problems(self, config: PretrainedConfig, weight_format: WeightFormat) -> list[str]:
        return check_mlx_plan(config, weight_format)

    def write(
        self, loaded: LoadedModel, path: Path, origin: Origin, on_tensor: OnTensor
    ) -> tuple[str, ...]:
        return export_mlx(loaded, path, dtype=loaded.source_dtype, on_tensor=on_tensor).notes

    def usage(self, file: str, base: str | None) -> Usage:
        return Usage("In this folder:", "", 'mlx_lm.generate --model . --prompt "Hello"')

    def matches(self, path: Path) -> bool:
        config = path / "config.json"
        # mlx-lm reads the rotary settings there, today's Transformers does not.
        return (
            (path / "model.safetensors").is_file()
            and config.is_file()
            and "rope_scaling" in read_json(config)
        )

    def rounds_activations(self, loaded: LoadedModel) -> bool:
        return loaded.source_dtype != torch.float32

    def load(self, path: Path, tokens: int) -> Runtime:
        return MlxLm(path)


MLX = MlxTarget()
