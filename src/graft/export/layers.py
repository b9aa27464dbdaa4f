"""What several targets ask of a model's layers: what hinders, their codes, their zero points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graft.adapters.attach import adapted_layers, frozen_layers
from graft.errors import GraftError
from graft.formats.base import WeightFormat
from graft.formats.dense import DenseFormat
from graft.formats.int_group import IntGroupFormat
from graft.formats.linear import FrozenLinear
from graft.kernels.packing import PLANES, unpack_codes


def format_problems(
    weight_format: WeightFormat, target: str, bits: Sequence[int], group_sizes: Sequence[int]
) -> list[str]:
    """Return every reason why the target, which has these widths, cannot hold a format exactly."""
    if isinstance(weight_format, DenseFormat):
        return []
    if not isinstance(weight_format, IntGroupFormat):
        return [
            f"format {weight_format.name!r} has no counterpart in {target}; merge into a dense "
            "model first, or quantise the base with --format int"
        ]
    problems = []
    if weight_format.bits not in bits:
        problems.append(f"bits is {weight_format.bits}; {target} holds {_listed(bits)} (--bits 4)")
    if weight_format.group_size not in group_sizes:
        problems.append(
            f"group_size is {weight_format.group_size}; {target} holds {_listed(group_sizes)} "
            "(--group-size 32)"
        )
    return problems


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
    assert isinstance(layer.weight_format, IntGroupFormat)
    return layer.weight_format


def whole_groups(layer: FrozenLinear) -> bool:
    """Return whether no row of a layer in the int format ends in a short group."""
    return layer.in_features % int_format(layer).group_size == 0


def layer_codes(layer: FrozenLinear) -> Tensor:
    """Return the codes of a layer in the int format, uint8 [out_features, in_features]."""
    bits = int_format(layer).bits
    names = zip(("codes", "codes_high"), PLANES[bits], strict=False)
    planes = tuple(layer.packed[name].detach().cpu() for name, _ in names)
    return unpack_codes(planes, bits, layer.in_features)


def side_by_side(codes: Tensor, bits: int) -> Tensor:
    """Return neighbouring codes in one byte, the first lowest: uint8 [rows, columns * bits / 8].

    codes uint8 [rows, columns], columns a multiple of 8; 3-bit codes go eight into three bytes.
    """
    if bits == 8:
        return codes
    if bits != 3:
        return _joined(codes.unflatten(-1, (-1, 8 // bits)), bits)
    whole = _joined(codes.int().unflatten(-1, (-1, 8)), bits)
    return torch.stack([whole >> shift & 255 for shift in (0, 8, 16)], -1).flatten(1).byte()


def zero_points(layer: FrozenLinear) -> tuple[Tensor, Tensor]:
    """Return scale s and zero point z = -offset / s, float32 [out, groups]: w = (q - z) s.

    The quotient is taken in float64; (q - z) s in float32 differs from the trained weight by its
    roundings, about 1e-7 of the largest weight of the group.
    """
    scales, offsets = (layer.packed[name].detach().cpu() for name in ("scales", "offsets"))
    return scales.float(), (-offsets.double() / scales.double()).float()


def require_finite(target: str, tensor: Tensor) -> None:
    """Raise GraftError when a weight is not finite."""
    if not bool(tensor.isfinite().all()):
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
    return f"{', '.join(most)} or {last}"
