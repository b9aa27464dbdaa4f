"""What several targets ask of a model: what hinders, its layers' codes and zero points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from graft.adapters.attach import adapted_layers, frozen_layers
from graft.errors import GraftError
from graft.formats.base import WeightFormat
from graft.formats.int_group import IntGroupFormat
from graft.kernels.packed.planes import PLANES, unpack_codes
from graft.layers.frozen import FrozenLinear
from graft.model.families import Architecture
from graft.model.load import LoadedModel
from graft.model.save import narrowed

_CACHED = 1 << 18
"""Bytes of codes that are moved at a time, with room for a few temporaries in a core's cache."""


@dataclass(frozen=True)
class FolderReport:
    """What an export wrote otherwise than a reader would think."""

    float32_layers: tuple[str, ...] = ()
    """Layers in the int format whose rows end in a short group: their exact weights in float32."""
    notes: tuple[str, ...] = ()
    """What is worth telling, in words."""


def config_problems(
    config: PretrainedConfig, target: str, architectures: Mapping[str, Architecture]
) -> list[str]:
    """Return every reason why what the target computes is not what this model does."""
    instead = "export as a plain folder instead (--to hf)"
    computed = architectures.get(config.model_type)
    if computed is None:
        return [
            f"model_type is {config.model_type!r}; {target} export writes "
            f"{', '.join(architectures)}; {instead}"
        ]
    problems = []
    if activation(config) not in computed.activations:
        problems.append(
            f"hidden_act is {activation(config)!r}; {target} export writes "
            f"{', '.join(computed.activations)}; {instead}"
        )
    rope = rotary(config)
    if rope["rope_type"] not in computed.rope_types:
        problems.append(
            f"rope_type is {rope['rope_type']!r}; {target} export writes "
            f"{', '.join(computed.rope_types)}; {instead}"
        )
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0 and not computed.partial_rotary:
        problems.append(
            f"partial_rotary_factor is {partial}; {target} export rotates whole heads (1.0); "
            f"{instead}"
        )
    for setting, value in computed.settings.items():
        if bool(getattr(config, setting)) is not value:
            problems.append(
                f"{setting} is {not value}; {target} export writes models with {value}; {instead}"
            )
    for setting in ("use_sliding_window", "use_bidirectional_attention"):
        if getattr(config, setting, False):
            problems.append(f"{setting} is set, which {target} export does not write; {instead}")
    return problems


def rotary(config: PretrainedConfig) -> dict[str, Any]:
    """Return the rotary settings, of the layers that see the whole text where others differ."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {"rope_type": "default"}
    return rope.get("full_attention", rope)


def yarn_problems(config: PretrainedConfig, target: str) -> list[str]:
    """Return what a target that computes YaRN by itself does not compute of it."""
    rope = rotary(config)
    if rope["rope_type"] != "yarn":
        return []
    if not rope.get("original_max_position_embeddings"):
        return ["rope_type is 'yarn', without the original_max_position_embeddings that it needs"]
    if rope.get("truncate", True):
        return []
    return [
        f"YaRN's truncate is {rope['truncate']}; {target} export writes models whose ramp begins "
        "and ends at whole frequencies (true); export as a plain folder instead (--to hf)"
    ]


def yarn_factor(config: PretrainedConfig) -> float:
    """Return by how much YaRN stretches the original context."""
    rope = config.rope_parameters
    original = rope["original_max_position_embeddings"]
    return float(rope.get("factor") or config.max_position_embeddings / original)


def yarn_scaling(factor: float) -> float:
    """Return by what YaRN multiplies sines and cosines, where nothing else is said."""
    return 1.0 if factor <= 1.0 else 0.1 * math.log(factor) + 1.0


def activation(config: PretrainedConfig) -> str:
    """Return the activation of the MLP, which Gemma, GPT-2 and Falcon each call otherwise."""
    names = ("hidden_activation", "hidden_act", "activation_function", "activation")
    return str(next(found for name in names if (found := getattr(config, name, None))))


def package_problems(package: str) -> list[str]:
    """Return what is missing where an extra of that package's name is not installed."""
    if find_spec(package) is not None:
        return []
    return [f"the package {package} is not installed; pip install 'graft-llm[{package}]'"]


def short_group_notes(target: str, layers: Sequence[str]) -> tuple[str, ...]:
    """Return the note on layers that a target without short groups holds in float32."""
    if not layers:
        return ()
    return (
        f"{len(layers)} layers are in float32, because {target} has no short group at the end of "
        f"a row ({layers[0]} ...)",
    )


def format_problems(
    weight_format: WeightFormat, target: str, bits: Sequence[int], group_sizes: Sequence[int]
) -> list[str]:
    """Return every reason why the target, which has these widths, cannot hold a format exactly."""
    if not weight_format.quantised:
        return []
    integers = weight_format.integers
    if integers is None:
        return [
            f"format {weight_format.name!r} has no counterpart in {target}; write dense weights "
            "with --to hf, or quantise the base with --format int"
        ]
    problems = []
    if integers.bits not in bits:
        problems.append(f"bits is {integers.bits}; {target} holds {_listed(bits)} (--bits 4)")
    if integers.group_size not in group_sizes:
        problems.append(
            f"group_size is {integers.group_size}; {target} holds {_listed(group_sizes)} "
            "(--group-size 32)"
        )
    return problems


@dataclass(frozen=True)
class ModelIds:
    """The tokens that a program which generates must know, of those that the model has rows for."""

    ends: list[int]
    """Those that end an answer, as in `graft chat`; empty: none does."""
    begin: int | None
    pad: int
    """What shorter rows of a batch are filled up with; a mask hides it."""


def model_ids(loaded: LoadedModel) -> ModelIds:
    """Return them as generation_config.json has them, else as the tokenizer does."""
    generation, tokenizer = loaded.model.generation_config, loaded.tokenizer
    rows = int(loaded.model.config.vocab_size)

    def found(name: str) -> list[int]:
        for value in (getattr(generation, name, None), getattr(tokenizer, name)):
            ids = value if isinstance(value, list) else [value]
            known = [index for index in ids if index is not None and 0 <= index < rows]
            if known:
                return known
        return []

    ends, begins = found("eos_token_id"), found("bos_token_id")
    pads = [*found("pad_token_id"), *ends, 0]
    return ModelIds(ends, begins[0] if begins else None, pads[0])


def layer_problems(
    model: PreTrainedModel, target: str, bits: Sequence[int], group_sizes: Sequence[int]
) -> list[str]:
    """Return what hinders in the layers of a model: adapters, and formats as above."""
    problems = []
    adapted = [name for name, _ in adapted_layers(model)]
    if adapted:
        problems.append(
            f"adapters are still attached to {len(adapted)} layers ({adapted[0]} ...); merge first"
        )
    for name, layer in frozen_layers(model):
        found = format_problems(layer.weight_format, target, bits, group_sizes)
        problems += [f"{name}: {problem}" for problem in found]
    return problems


def int_format(layer: FrozenLinear) -> IntGroupFormat:
    """Return the format of a layer that is known to be in the int format."""
    integers = layer.weight_format.integers
    assert integers is not None
    return integers


def whole_groups(layer: FrozenLinear) -> bool:
    """Return whether no row of a layer in the int format ends in a short group."""
    return layer.in_features % int_format(layer).group_size == 0


def side_by_side(layer: FrozenLinear, bits: int, columns: int) -> Tensor:
    """Return the codes of a layer in the int format in its rows' order, `bits` each.

    uint8 [out_features, columns * bits / 8], the first code lowest, each row filled up with zeros
    to `columns` codes, a multiple of 8; 3-bit codes go eight into three bytes.
    """
    stored = int_format(layer).bits
    names = zip(("codes", "codes_high"), PLANES[stored], strict=False)
    planes = tuple(layer.packed[name].detach().cpu() for name, _ in names)
    if stored == bits == 4:
        pairs = _neighbouring_nibbles(planes[0])
        return torch.nn.functional.pad(pairs, (0, columns // 2 - pairs.shape[-1]))
    codes = unpack_codes(planes, stored, layer.in_features)
    codes = torch.nn.functional.pad(codes, (0, columns - layer.in_features))
    if bits == 8:
        return codes
    if bits != 3:
        return _joined(codes.unflatten(-1, (-1, 8 // bits)), bits)
    whole = _joined(codes.int().unflatten(-1, (-1, 8)), bits)
    return torch.stack([whole >> shift & 255 for shift in (0, 8, 16)], -1).flatten(1).byte()


def _neighbouring_nibbles(plane: Tensor) -> Tensor:
    """Return a 4-bit plane, which pairs codes j and j + 16 of a block, with 2j and 2j + 1 paired.

    Two of its bytes at a time, as a number: their low nibbles are neighbours in the first half of
    the block, their high nibbles in the second. As many rows at a time as stay in the cache.
    """
    out = torch.empty_like(plane)
    rows = max(1, _CACHED // plane.shape[-1])
    for read, written in zip(plane.split(rows), out.split(rows), strict=True):
        twos = read.view(torch.int16)
        low = twos & 0x0F | twos >> 4 & 0xF0
        high = twos >> 4 & 0x0F | twos >> 8 & 0xF0
        halves = written.view(torch.int64).unflatten(-1, (-1, 2))  # of 8 bytes each
        halves[..., 0] = low.byte().view(torch.int64)
        halves[..., 1] = high.byte().view(torch.int64)
    return out


def scales(layer: FrozenLinear) -> Tensor:
    """Return the scales s of a layer in the int format, float32 [out, groups]."""
    return layer.packed["scales"].detach().cpu().float()


def zero_points(layer: FrozenLinear) -> Tensor:
    """Return its zero points z = -offset / s, float32 [out, groups]: w = (q - z) s.

    The quotient is taken in float64; (q - z) s in float32 differs from the trained weight by its
    roundings, about 1e-7 of the largest weight of the group.
    """
    offsets = layer.packed["offsets"].detach().cpu().double()
    return (-offsets / layer.packed["scales"].detach().cpu().double()).float()


def stored_dtype(weight: Tensor | FrozenLinear, source: torch.dtype) -> torch.dtype:
    """Return the dtype that an unquantised weight is written in, for what computes in float32.

    That is the 16 bits of the source where they hold every value, else float32.
    """
    if isinstance(weight, FrozenLinear):
        if weight.weight_format.quantised:
            return torch.float32
        weight = weight.packed["weight"]
    if source.itemsize != 2:
        return torch.float32
    return narrowed(weight, source).dtype


def require_finite(target: str, tensor: Tensor) -> None:
    """Raise GraftError when a weight is not finite."""
    if not all(bool(bound.isfinite()) for bound in tensor.aminmax()):  # NaN where one weight is
        raise GraftError(
            f"{target}: weights are not finite; the training diverged: train again with a lower "
            "learning rate"
        )


def _joined(codes: Tensor, bits: int) -> Tensor:
    """Return the codes of the last dimension side by side in one number, the first lowest."""
    joined = codes[..., 0].clone()
    for index in range(1, codes.shape[-1]):
        joined |= codes[..., index] << bits * index
    return joined


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
