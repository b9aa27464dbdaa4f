"""The tensor classes of torchao that are read, each with its parts and attributes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.convert.config import ConvertConfig
from graft.convert.folder import FLOATS, check_part
from graft.convert.grids.affine import Grid, affine_layer, neighbours, rows_layer
from graft.convert.grids.floats import FP8, block_of, e2m1, overall_scale, scale_of, scaled
from graft.convert.grids.integers import Rounding
from graft.convert.source import DenseLayer, QuantisedLayer
from graft.errors import GraftError
from graft.model.weight_files import WeightFiles
from graft.text import quoted

Shape = tuple[int, int]
_TILE = (128, 4)
"""Rows and columns of a tile of scales that lie as a GPU's kernels take them."""


@dataclass(frozen=True)
class Stored:
    """One quantised weight, as the metadata describe it."""

    kind: str
    prefix: str
    """What stands before the name of a part."""
    parts: frozenset[str]
    attributes: dict[str, Any]


Read = Callable[[WeightFiles, Stored, ConvertConfig, Rounding, Shape], QuantisedLayer | DenseLayer]


@dataclass(frozen=True)
class Kind:
    """How the tensors of one class are read."""

    read: Read
    parts: frozenset[str]
    attributes: frozenset[str]
    """Those that change nothing of the weight, or are looked at; any other is refused."""
    needed: tuple[str, ...] = ("qdata", "scale")


def _plain(value: Any) -> Any:
    """Return an attribute, of a dtype its name."""
    return value.get("_data") if isinstance(value, dict) else value


def _block(files: WeightFiles, stored: Stored, shape: Shape) -> Shape:
    """Return the block that shares a scale; raises GraftError where block_size is another."""
    key = stored.prefix + "scale"
    stated = stored.attributes.get("block_size")
    blocks = []
    if isinstance(stated, list) and len(stated) == 2 and all(type(s) is int for s in stated):
        blocks = [(max(stated[0], 1), max(stated[1], 1))]
    block = block_of(key, files.shape(key), shape, blocks)
    if stated and stated != list(block):
        raise GraftError(f"{key} is {list(files.shape(key))}, and block_size {quoted(stated)}")
    return block


def _integers(
    files: WeightFiles, stored: Stored, asked: ConvertConfig, rounding: Rounding, shape: Shape
) -> QuantisedLayer | DenseLayer:
    qdata, scale = stored.prefix + "qdata", stored.prefix + "scale"
    check_part(files, qdata, shape, (torch.int8,))
    bits = _bits(stored)
    block = _block(files, stored, shape)
    if block[0] not in (1, shape[0]):
        raise GraftError(f"{scale} has blocks of {list(block)}, which are no parts of a row")
    groups = 1 if block == shape else shape[1] // block[1]
    zero = stored.prefix + "zero_point"
    if zero in files and files.shape(zero) != files.shape(scale):
        raise GraftError(f"{zero} is {list(files.shape(zero))}; expected its scales' shape")
    words = f"{bits}-bit integers"

    def statistic(key: str) -> Tensor:
        return files.read_once(key).double().reshape(-1, groups).expand(shape[0], groups)

    if bits == 8 and groups == 1 and not _has_zeros(files, zero):
        return rows_layer(
            lambda: (files.read_once(qdata), statistic(scale).reshape(-1).float()), words, asked
        )

    def read() -> Grid:
        codes = files.read_once(qdata)
        low, high = int(codes.min()), int(codes.max())
        if low < -(1 << bits - 1) or high >= 1 << bits - 1:
            raise GraftError(f"{qdata} has codes from {low} to {high}, which {bits} bits have not")
        middle = 2.0 ** (bits - 1)
        zeros = statistic(zero) if zero in files else 0.0
        scales = statistic(scale).contiguous()
        shifted = (codes.short() + (1 << bits - 1)).byte()
        return Grid(shifted, scales, -scales * (zeros + middle))

    group_of = neighbours(shape[1], shape[1] // groups)
    return affine_layer(read, words, bits, group_of, asked, rounding)


def _int8(
    files: WeightFiles, stored: Stored, asked: ConvertConfig, rounding: Rounding, shape: Shape
) -> QuantisedLayer | DenseLayer:
    """Int8Tensor, whose product leaves out the zero points of whole rows; its dequantising adds
    them, and torchao itself writes none but zeros."""
    zero = stored.prefix + "zero_point"
    whole_rows = _block(files, stored, shape)[1] == shape[1]
    if whole_rows and _has_zeros(files, zero):
        raise GraftError(
            f"{zero} is not zero, and torchao computes with such rows in two ways; the folder is "
            "damaged: download it again"
        )
    return _integers(files, stored, asked, rounding, shape)


def _bits(stored: Stored) -> int:
    named = _plain(stored.attributes.get("target_dtype", "int8"))
    found = re.fullmatch(r"int([1-8])", str(named))
    if not found:
        raise GraftError(
            f"{stored.prefix} has the target_dtype {quoted(named)}; expected int1 to 8"
        )
    return int(found[1])


def _has_zeros(files: WeightFiles, zero: str) -> bool:
    return zero in files and bool(files.read_once(zero).float().any())


def _int4(
    files: WeightFiles, stored: Stored, asked: ConvertConfig, rounding: Rounding, shape: Shape
) -> QuantisedLayer | DenseLayer:
    qdata, scale, zero = (stored.prefix + part for part in ("qdata", "scale", "zero_point"))
    rows, columns = shape
    check_part(files, qdata, (rows, columns // 2), (torch.int8, torch.uint8))
    groups = files.shape(scale)[0] if len(files.shape(scale)) == 2 else 0
    if not groups or columns % groups:
        raise GraftError(f"{scale} is {list(files.shape(scale))}; expected [groups, {rows}]")
    for key in (scale, zero):
        check_part(files, key, (groups, rows), FLOATS)
    stated = stored.attributes.get("block_size")
    if stated and stated != [1, columns // groups]:
        raise GraftError(f"{scale} is {list(files.shape(scale))}, and block_size {quoted(stated)}")

    def read() -> Grid:
        packed = files.read_once(qdata).view(torch.uint8)
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2) ^ 8
        scales, offsets = (files.read_once(key).T.double().contiguous() for key in (scale, zero))
        return Grid(codes, scales, offsets - 8 * scales)

    group_of = neighbours(columns, columns // groups)
    return affine_layer(read, "4-bit integers", 4, group_of, asked, rounding)


def _float8(
    files: WeightFiles, stored: Stored, asked: ConvertConfig, rounding: Rounding, shape: Shape
) -> DenseLayer:
    check_part(files, stored.prefix + "qdata", shape, FP8)
    return _floats(files, stored, "FP8", shape, _block(files, stored, shape))


def _mx(
    files: WeightFiles, stored: Stored, asked: ConvertConfig, rounding: Rounding, shape: Shape
) -> DenseLayer:
    """MXTensor and NVFP4Tensor: a scale for block_size neighbours."""
    size, qdata = stored.attributes.get("block_size"), stored.prefix + "qdata"
    if type(size) is not int or size < 1 or shape[1] % size:
        raise GraftError(f"{stored.prefix} has the block_size {quoted(size)} in rows of {shape[1]}")
    packed = files.dtype(qdata) == torch.uint8
    element = str(_plain(stored.attributes.get("elem_dtype", "float4_e2m1fn_x2")))
    expected = "float4_e2m1fn_x2" if packed else str(files.dtype(qdata)).removeprefix("torch.")
    if element != expected:
        raise GraftError(f"{qdata} is {expected}, and elem_dtype {quoted(element)}")
    width = shape[1] // 2 if packed else shape[1]
    check_part(files, qdata, (shape[0], width), (torch.uint8, *FP8))
    kinds = (torch.float8_e8m0fnu,) if stored.kind == "MXTensor" else (torch.float8_e4m3fn,)
    grid, scale = (shape[0], shape[1] // size), stored.prefix + "scale"
    swizzled = bool(stored.attributes.get("is_swizzled_scales"))
    fits = files.shape(scale) == grid
    if swizzled:
        fits = math.prod(files.shape(scale)) == math.prod(_in_tiles(grid)) * _TILE[0] * _TILE[1]
    if not fits or files.dtype(scale) not in kinds:
        raise GraftError(f"{scale} is {files.dtype(scale)} {list(files.shape(scale))}, not {grid}")
    words = "NVFP4" if stored.kind == "NVFP4Tensor" else "MXFP4" if packed else "MXFP8"
    return _floats(files, stored, words, shape, (1, size), swizzled)


def _in_tiles(grid: Shape) -> Shape:
    """Return how many tiles of scales there are, down and across."""
    return -(-grid[0] // _TILE[0]), -(-grid[1] // _TILE[1])


def _unswizzled(scales: Tensor, grid: Shape) -> Tensor:
    """Return scales [rows, columns] from tiles as the kernels of Blackwell GPUs take them.

    A tile of 128 rows and 4 columns lies as 32 lots of the rows r, r + 32, r + 64 and r + 96.
    """
    down, across = _in_tiles(grid)
    tiles = scales.reshape(down, across, 32, 4, _TILE[1]).transpose(2, 3)
    rows = tiles.reshape(down, across, *_TILE).transpose(1, 2)
    return rows.reshape(down * _TILE[0], across * _TILE[1])[: grid[0], : grid[1]]


def _floats(
    files: WeightFiles,
    stored: Stored,
    words: str,
    shape: Shape,
    block: Shape,
    swizzled: bool = False,
) -> DenseLayer:
    overall = stored.prefix + "per_tensor_scale"
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])

    def make() -> Tensor:
        data = files.read_once(stored.prefix + "qdata")
        values = e2m1(data) if data.dtype == torch.uint8 else data.float()
        read = files.read_once(stored.prefix + "scale")
        if swizzled:  # through bytes: small floats cannot be moved about
            read = _unswizzled(read.view(torch.uint8), grid).contiguous().view(read.dtype)
        scales = scale_of(read).reshape(grid)
        if overall in files:
            scales = overall_scale(files, overall) * scales
        return scaled(values, scales, block)

    return DenseLayer(words, make)


def _kind(read: Read, parts: str, attributes: str, needed: str = "qdata scale") -> Kind:
    return Kind(
        read, frozenset(parts.split()), frozenset(attributes.split()), tuple(needed.split())
    )


KINDS = {
    "Int8Tensor": _kind(
        _int8,
        "qdata scale zero_point act_quant_scale act_quant_zero_point",
        "block_size dtype act_quant_kwargs reduce_range",
    ),
    "IntxUnpackedToInt8Tensor": _kind(
        _integers,
        "qdata scale zero_point",
        "target_dtype block_size dtype activation_quantization",
        "qdata scale zero_point",
    ),
    "Int4Tensor": _kind(
        _int4,
        "qdata scale zero_point",
        "block_size shape activation_dtype",
        "qdata scale zero_point",
    ),
    "Float8Tensor": _kind(
        _float8,
        "qdata scale",
        "block_size mm_config act_quant_kwargs kernel_preference dtype",
    ),
    "MXTensor": _kind(
        _mx,
        "qdata scale",
        "elem_dtype block_size orig_dtype kernel_preference act_quant_kwargs is_swizzled_scales",
    ),
    "NVFP4Tensor": _kind(
        _mx,
        "qdata scale per_tensor_scale act_per_tensor_scale",
        "block_size orig_dtype is_swizzled_scales use_triton_kernel act_quant_kwargs",
    ),
}
"""Each class with the parts and attributes that it may have."""
