"""Writing a merged model as a folder for MLX (mlx-lm), with the very same integer weights.

MLX's affine quantisation is w = scale * q + bias with a float scale and bias a group, which is the
int format: codes, scales and offsets are copied, only the order of the codes changes. A row is one
stream of bits, the first code lowest, cut into little-endian 32-bit words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from graft.adapters.attach import frozen_layers
from graft.errors import raise_problems
from graft.export.layers import (
    FolderReport,
    config_problems,
    format_problems,
    int_format,
    layer_problems,
    require_finite,
    short_group_notes,
    side_by_side,
    whole_groups,
    yarn_factor,
    yarn_problems,
    yarn_scaling,
)
from graft.files.write import new_folder, write_json
from graft.formats.base import WeightFormat
from graft.layers.frozen import FrozenLinear
from graft.model.families import exported
from graft.model.load import LoadedModel
from graft.model.save import named_tensors, narrowed, plain_config, write_tokenizer_files
from graft.model.tensor_file import FileTensor, OnTensor, write_tensor_file

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)


def check_mlx_plan(config: PretrainedConfig, weight_format: WeightFormat) -> list[str]:
    """Return every reason why a model in that format cannot be exported, before it exists."""
    return _config_problems(config) + format_problems(weight_format, "MLX", BITS, GROUP_SIZES)


def check_mlx(model: PreTrainedModel) -> list[str]:
    """Return every reason why this model cannot be exported; reads no weights."""
    return _config_problems(model.config) + layer_problems(model, "MLX", BITS, GROUP_SIZES)


def _config_problems(config: PretrainedConfig) -> list[str]:
    return config_problems(config, "MLX", exported("mlx")) + yarn_problems(config, "MLX")


def export_mlx(
    loaded: LoadedModel,
    folder: Path,
    *,
    dtype: torch.dtype,
    on_tensor: OnTensor | None = None,
) -> FolderReport:
    """Write model, tokenizer and chat template as a folder that mlx-lm loads.

    Layers in the int format keep their codes, scales and offsets; a layer whose rows end in a
    short group, which MLX has not, is written in float32. All else is written in `dtype` where that
    changes no value of a quantised model, and in any case where nothing is quantised. One tensor is
    in memory at a time; the folder appears under its name only when it is complete.

    Raises GraftError, with every reason, before anything is written.
    """
    model = loaded.model
    raise_problems(check_mlx(model), "cannot export to MLX")
    quantised = {
        name: layer for name, layer in frozen_layers(model) if layer.weight_format.integers
    }
    short = [name for name, layer in quantised.items() if not whole_groups(layer)]
    tensors = list(_tensors(model, quantised, dtype))
    with new_folder(folder) as part:
        write_tensor_file(part / "model.safetensors", tensors, on_tensor)
        write_json(part / "config.json", _config(loaded, quantised, dtype))
        write_tokenizer_files(loaded, part)
    notes = short_group_notes("MLX", short) + _model_notes(model.config)
    return FolderReport(tuple(short), notes)


def _model_notes(config: PretrainedConfig) -> tuple[str, ...]:
    notes = []
    window = getattr(config, "sliding_window", None)
    if window is not None:
        notes.append(
            f"the model attends to the last {window} tokens, mlx-lm to all of them: longer texts "
            "get other answers there"
        )
    note = exported("mlx")[config.model_type].note
    return (*notes, note) if note else tuple(notes)


def _tensors(
    model: PreTrainedModel, quantised: dict[str, FrozenLinear], dtype: torch.dtype
) -> Iterator[FileTensor]:
    for name, tensor in named_tensors(model):
        owner, _, part = name.rpartition(".")
        layer = quantised.get(owner)
        if layer is None or part == "bias":
            # A quantised model's other tensors are kept exactly.
            kept = narrowed(tensor, dtype).dtype if quantised else dtype
            yield _plain(name, tensor, kept)
        elif part == "codes":
            yield from _layer_tensors(owner, layer)


def _layer_tensors(name: str, layer: FrozenLinear) -> Iterator[FileTensor]:
    bits, rows, columns = int_format(layer).bits, layer.out_features, layer.in_features
    if not whole_groups(layer):
        shape = (rows, columns)
        yield FileTensor(
            f"{name}.weight", shape, torch.float32, lambda: layer.dense_weight(torch.float32)
        )
        return
    packed = layer.packed
    words = (rows, columns * bits // 32)
    yield FileTensor(
        f"{name}.weight", words, torch.uint32, lambda: side_by_side(layer, bits, columns)
    )
    for target, source in (("scales", "scales"), ("biases", "offsets")):
        require_finite(name, packed[source])
        yield _plain(f"{name}.{target}", packed[source], packed[source].dtype)


def _plain(name: str, tensor: Tensor, dtype: torch.dtype) -> FileTensor:
    return FileTensor(name, tuple(tensor.shape), dtype, lambda: tensor.to(dtype))


def _scaling(loaded: LoadedModel) -> dict[str, Any]:
    """Return the rotary settings as mlx-lm takes them, which knows no attention_factor.

    It multiplies by 1 + mscale / 10 log(factor), and Transformers by attention_factor.
    """
    config = loaded.model.config
    rope: dict[str, Any] = dict(config.rope_parameters)
    if rope["rope_type"] == "yarn":
        factor = yarn_factor(config)
        _, scaling = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
        stretched = yarn_scaling(factor) - 1.0
        rope |= {"factor": factor, "attention_factor": scaling, "mscale_all_dim": 0}
        rope["mscale"] = (scaling - 1.0) / stretched if stretched else 1.0
    return rope


def _config(
    loaded: LoadedModel, quantised: dict[str, FrozenLinear], dtype: torch.dtype
) -> dict[str, Any]:
    """Return config.json: mlx-lm reads the rotary settings in the places of older files too."""
    config = plain_config(loaded)
    config.pop("quantization_config", None)
    config["architectures"] = [type(loaded.model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    rope = config.get("rope_parameters")
    if rope:
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = None if rope["rope_type"] == "default" else _scaling(loaded)
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    settings = {
        name: {"group_size": int_format(layer).group_size, "bits": int_format(layer).bits}
        for name, layer in quantised.items()
        if whole_groups(layer)
    }
    if settings:
        (usual, _), *_ = Counter(tuple(each.items()) for each in settings.values()).most_common(1)
        others = {name: each for name, each in settings.items() if tuple(each.items()) != usual}
        config["quantization"] = dict(usual) | {"mode": "affine"} | others
        config["quantization_config"] = config["quantization"]
    return config
