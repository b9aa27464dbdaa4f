"""The layout of a layer of HQQ (Badri and Shaji, 2023): w = scale (q - zero), a float zero.

The weight [out, in] is reshaped to [-1, group_size] (axis 1) or [group_size, -1] (axis 0), and a
row or a column of that is a group. W_q holds the codes packed along the first dimension: of n parts
below each other the first is in the highest bits. Packings: 8bit_u8, 4bit_u8, 2bit_u8, 1bit_u8 in
bytes, and 3bit_32, ten codes to a 32-bit word. view_as_float: the bytes are called floats. Scales
and zeros may be quantised themselves (scale_q with meta_scale), or stacked as zero_scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graft.convert.config import ConvertConfig
from graft.convert.grids.affine import Grid, affine_layer, neighbours
from graft.convert.grids.integers import Rounding
from graft.convert.source import DenseLayer, QuantisedLayer
from graft.errors import GraftError
from graft.text import listed, quoted

_PACKINGS = {
    "8bit_u8": (8, 1, torch.uint8),
    "4bit_u8": (4, 2, torch.uint8),
    "3bit_32": (3, 10, torch.int32),
    "2bit_u8": (2, 4, torch.uint8),
    "1bit_u8": (1, 8, torch.uint8),
}
"""The bits of a code, codes of an element, and the element's dtype."""
_BITS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}
_READ = {
    *("W_q", "scale", "zero", "zero_scale", "scale_q", "zero_q", "meta", "meta_scale", "meta_zero"),
    *("packing", "nbits", "group_size", "shape", "axis", "quant_scale", "quant_zero"),
}
_WITHOUT_EFFECT = {
    *("view_as_float", "unpack_view_dtype", "compute_dtype", "offload_meta", "optimize"),
    *("encoded_state_dict", "stores_quant_config", "channel_wise", "round_zero"),
    *("scale_quant_params", "zero_quant_params"),
}
"""How the layer was made and where it was kept; W_q itself shows how its bytes are called."""


def hqq_layer(
    name: str,
    described: Mapping[str, Any],
    asked: ConvertConfig,
    rounding: Rounding,
    out_features: int,
    in_features: int,
) -> QuantisedLayer | DenseLayer:
    """Return the layer; raises GraftError where its parts do not fit."""
    shape = out_features, in_features
    strange = [key for key in described if key not in _READ | _WITHOUT_EFFECT]
    if strange:
        raise GraftError(f"{name} has {listed(strange)}, which graft does not read of HQQ")
    if tuple(_part(name, described, "shape")) != shape:
        raise GraftError(f"{name}.shape is {quoted(described['shape'])}; expected {list(shape)}")
    for part in ("quant_scale", "quant_zero"):
        _part(name, described, part)
    axis, size = _whole(name, described, "axis"), described.get("group_size")
    if axis not in (0, 1):
        raise GraftError(f"{name}.axis is {axis}; expected 0 or 1")
    bits, _, _ = _packing(name, described)
    size = shape[axis] if size is None else _whole(name, described, "group_size")
    if size < 1 or math.prod(shape) % size:
        raise GraftError(f"{name}.group_size is {size}, and the weight {list(shape)}")
    words = f"HQQ's {described['nbits']:g}-bit integers"
    if axis == 0 or in_features % size:
        words += " in scattered groups"
        return DenseLayer(words, lambda: _dense(name, described, size).reshape(shape))

    def read() -> Grid:
        codes = _codes(name, described, math.prod(shape) // size, size).reshape(shape)
        scales, zeros = (
            _statistic(name, described, part, math.prod(shape) // size)
            .double()
            .reshape(out_features, -1)
            for part in ("scale", "zero")
        )
        return Grid(codes, scales, -scales * zeros)

    return affine_layer(read, words, bits, neighbours(in_features, size), asked, rounding)


def _part(name: str, described: Mapping[str, Any], part: str) -> Any:
    if part not in described:
        raise GraftError(f"{name} has no {part}; the folder is damaged: download it again")
    return described[part]


def _whole(name: str, described: Mapping[str, Any], part: str) -> int:
    value = _part(name, described, part)
    if type(value) is not int:
        raise GraftError(f"{name}.{part} is {quoted(value)}; expected a whole number")
    return value


def _packing(name: str, described: Mapping[str, Any]) -> tuple[int, int, torch.dtype]:
    """Return bits, codes of an element and its dtype; raises GraftError for those of other bits."""
    packing, bits = _part(name, described, "packing"), _part(name, described, "nbits")
    if packing not in _PACKINGS or not isinstance(bits, (int, float)):
        raise GraftError(
            f"{name} has the packing {quoted(packing)} of {quoted(bits)} bits; graft reads "
            f"{listed(_PACKINGS)}"
        )
    expected = _BITS.get(int(bits), "1bit_u8") if bits == int(bits) else "2bit_u8"  # 1.58 bits
    if packing != expected or not 1 <= bits <= 8:
        raise GraftError(f"{name} has {bits:g} bits in the packing {packing}, which is of others")
    return _PACKINGS[packing]


def _codes(name: str, described: Mapping[str, Any], rows: int, columns: int) -> Tensor:
    """Return the codes below each other, uint8 [rows, columns]; raises GraftError for too few."""
    bits, codes, dtype = _packing(name, described)
    stored = _part(name, described, "W_q").detach()
    if stored.dim() != 2:
        raise GraftError(f"{name}.W_q has shape {list(stored.shape)}; expected a matrix")
    if stored.is_floating_point():
        stored = stored.contiguous().view(dtype)
    if stored.dtype != dtype:
        raise GraftError(f"{name}.W_q is {stored.dtype}; its packing has {dtype}")
    parts = [stored >> bits * place & (1 << bits) - 1 for place in reversed(range(codes))]
    unpacked = torch.cat(parts)[:rows].to(torch.uint8)
    filled = codes if dtype == torch.int32 else 1  # only words of ten may have codes too many
    if unpacked.shape != (rows, columns) or len(stored) * codes >= rows + filled:
        raise GraftError(
            f"{name}.W_q has codes {[len(stored) * codes, stored.shape[1]]}; expected "
            f"{[rows, columns]}"
        )
    return unpacked


def _statistic(name: str, described: Mapping[str, Any], part: str, count: int) -> Tensor:
    """Return scales or zeros, however they are kept, float32 [count]."""
    if described.get(f"quant_{part}"):
        inner = _part(name, described, f"meta_{part}")
        found = _nested(f"{name}.meta_{part}", _part(name, described, f"{part}_q"), inner)
    elif "zero_scale" in described:
        found = described["zero_scale"][0 if part == "zero" else 1]
    else:
        found = _part(name, described, part)
    if not isinstance(found, Tensor) or found.numel() != count:
        raise GraftError(f"{name}.{part} is not of {count} groups; download the folder again")
    return found.detach().float().reshape(-1)


def _nested(name: str, stored: Tensor, described: Any) -> Tensor:
    """Return quantised scales or zeros as floats."""
    if not isinstance(described, dict):
        raise GraftError(f"{name} is {quoted(described)}; expected what describes it")
    size = described.get("group_size")
    whole = {**described, "W_q": stored}
    if size is None:  # a scale for all of them
        rows = stored.shape[0] * _packing(name, whole)[1]
        codes = _codes(name, whole, rows, stored.shape[1]).float()
        return (codes - _part(name, whole, "zero").float()) * _part(name, whole, "scale").float()
    return _dense(name, whole, _whole(name, whole, "group_size"))


def _dense(name: str, described: Mapping[str, Any], size: int) -> Tensor:
    """Return the weight as it was grouped: groups are rows (axis 1) or columns (axis 0)."""
    count = math.prod(_part(name, described, "shape")) // size
    sizes = (size, count) if described.get("axis", 0) == 0 else (count, size)
    codes = _codes(name, described, *sizes).float()
    scale, zero = (_statistic(name, described, part, count) for part in ("scale", "zero"))
    if described.get("axis", 0):
        scale, zero = scale.unsqueeze(1), zero.unsqueeze(1)
    return (codes - zero) * scale
