"""The layouts of a layer in compressed-tensors' folders.

- weight_packed int32 [out, words], weight_shape: integers of 1 to 8 bits plus 2^(bits - 1), a row
  as one stream of bits, the first lowest (in older releases no code crosses a word);
- weight int8 or float8 [out, in];
- weight_packed uint8 [out, bytes]: E2M1 two to a byte, with weight_scale E4M3 for 16 neighbours and
  weight_global_scale that divides it, or with E8M0 for 32; E2M3 four to three bytes, E8M0 for 32.

weight_scale has one scale for the tensor, [out, 1], [out, groups] or a grid of blocks; with
weight_zero_point (int8, or packed along the outputs like the weight) w = scale (q - zero); with
weight_g_idx [in] the groups are of scattered inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graft.convert.config import ConvertConfig
from graft.convert.folder import FLOATS, WORDS, check_parts
from graft.convert.grids.affine import Grid, affine_layer, neighbours, rows_layer, unpack_stream
from graft.convert.grids.floats import (
    EXPONENTS,
    FP8,
    block_of,
    e2m1,
    e2m3,
    overall_scale,
    scale_of,
    scaled,
    spread,
)
from graft.convert.grids.integers import Rounding
from graft.convert.source import DenseLayer, QuantisedLayer
from graft.errors import GraftError
from graft.model.weight_files import WeightFiles
from graft.text import quoted

PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    *("weight_g_idx", "weight_global_scale"),
)
_BLOCKS_OF_FLOATS = {16: "NVFP4", 32: "MXFP4"}


Shape = tuple[int, int]
Facts = dict[str, tuple[Any, ...]]
"""What each setting may be, as the tensors have it."""


@dataclass(frozen=True)
class Scheme:
    """What config.json says of the weights of one group of layers."""

    weights: dict[str, Any]
    form: object
    """The group's own format, where it has one."""

    def block(self) -> Shape | None:
        """Return the rows and columns that share a scale, where it says so."""
        stated, size = self.weights.get("block_structure"), self.weights.get("group_size")
        if isinstance(stated, list) and len(stated) == 2 and all(type(s) is int for s in stated):
            return max(stated[0], 1), max(stated[1], 1)
        return (1, size) if type(size) is int and size > 0 else None

    def misfit(self, facts: Facts, forms: Sequence[str], everyone: object) -> str | None:
        """Return in words what contradicts the facts of a layer; None where nothing does."""
        for key, fitting in facts.items():
            stated = self.weights.get(key)
            if stated is not None and stated not in fitting:
                return f"{key} is {quoted(stated)} there and {quoted(fitting[0])} in the tensors"
        form = self.form or everyone
        if form not in (*forms, "mixed-precision", None):
            return f"the format is {quoted(form)} there and {forms[0]!r} in the tensors"
        return None


@dataclass(frozen=True)
class Layer:
    """One layer's tensors."""

    files: WeightFiles
    name: str
    asked: ConvertConfig
    rounding: Rounding

    def read(
        self, schemes: list[Scheme], form: object, out_features: int, in_features: int
    ) -> QuantisedLayer | DenseLayer:
        """Return the layer; raises GraftError where the parts fit neither each other nor a group.

        schemes: the groups of config.json. form: the format of all that have none of their own.
        """
        shape = out_features, in_features
        packed = self._has("weight_packed")
        if packed and self._has("weight"):
            raise GraftError(f"{self.name} has both weight and weight_packed; expected one of them")
        dtype = self.files.dtype(self._key("weight_packed" if packed else "weight"))
        if self._has("weight_shape") or (packed and dtype in WORDS):
            expected = {"weight_shape": ((2,), (torch.int64, torch.int32))}
            check_parts(self.files, self.name, expected)
            stated = tuple(self.files.read_once(self._key("weight_shape")).tolist())
            if stated != shape:
                raise GraftError(f"{self._key('weight_shape')} is {list(stated)}; expected {shape}")
        if packed and dtype == torch.uint8:
            return self._small_floats(schemes, form, shape)
        if packed and dtype in WORDS:
            return self._integers(schemes, form, shape, self._bits(schemes, shape))
        if not packed and dtype == torch.int8:
            return self._integers(schemes, form, shape, None)
        if not packed and dtype in FP8:
            return self._floats(schemes, form, shape)
        raise GraftError(
            f"{self.name} is {dtype} with scales: it was not compressed; save it compressed, or "
            "start from the unquantised model"
        )

    def _key(self, part: str) -> str:
        return f"{self.name}.{part}"

    def _has(self, part: str) -> bool:
        return self._key(part) in self.files

    def _check(
        self, schemes: list[Scheme], facts: Facts, forms: Sequence[str], form: object
    ) -> None:
        """Raise GraftError unless one of the groups describes what the tensors show."""
        misfits = [scheme.misfit(facts, forms, form) for scheme in schemes]
        if None not in misfits:
            raise GraftError(
                f"{self.name} is not what config_groups says: {misfits[0]}; the folder is damaged: "
                "download it again"
            )

    # Integers ------------------------------------------------------------------------------------

    def _bits(self, schemes: list[Scheme], shape: Shape) -> int:
        """Return the bits of a code, which the words of a row tell where no group says it."""
        key = self._key("weight_packed")
        words = _columns(self.files, key)
        stated = [scheme.weights.get("num_bits") for scheme in schemes]
        for bits in dict.fromkeys([*stated, *range(1, 9)]):
            if type(bits) is int and 0 < bits <= 8 and words in _words(shape[1], bits):
                return bits
        raise GraftError(f"{key} has {words} words a row, too few or too many for {shape[1]} codes")

    def _integers(
        self, schemes: list[Scheme], form: object, shape: Shape, packed: int | None
    ) -> QuantisedLayer | DenseLayer:
        """packed: the bits of a code that lies in words; None for codes in bytes."""
        bits = packed or 8
        block = self._block(schemes, shape)
        facts: Facts = {"type": ("int",), "symmetric": self._symmetric()}
        if packed:
            facts["num_bits"] = (bits,)
        self._check(schemes, facts | _grouping(shape, block), _forms(packed), form)
        words = f"{bits}-bit integers"
        if packed:
            stored = shape[0], _columns(self.files, self._key("weight_packed"))
            check_parts(self.files, self.name, {"weight_packed": (stored, WORDS)})
        else:
            check_parts(self.files, self.name, {"weight": (shape, (torch.int8,))})
        rows, columns = block
        if rows not in (1, shape[0]):
            return self._blocks(words, shape, block, partial(self._steps, shape, block, packed))
        groups = -(-shape[1] // columns)
        if bits == 8 and groups == 1 and not self._shifted():
            return rows_layer(lambda: self._signed(shape, bits, packed), words, self.asked)
        order = self._order(shape[1], columns, groups)
        group_of = neighbours(shape[1], columns) if order is None else order

        def read() -> Grid:
            codes = self._codes(shape, bits, packed)
            scales = self._scales(shape[0], groups)
            zeros = self._zeros(shape[0], groups, bits)
            return Grid(codes, scales, -scales * zeros)

        if order is not None:
            words += " in activation order"
        return affine_layer(read, words, bits, group_of, self.asked, self.rounding)

    def _codes(self, shape: Shape, bits: int, packed: int | None) -> Tensor:
        """Return codes from 0 up, uint8."""
        if not packed:
            return self.files.read_once(self._key("weight")).view(torch.uint8) ^ 128
        words = self.files.read_once(self._key("weight_packed"))
        return _unpacked(words, bits, shape[1])

    def _signed(self, shape: Shape, bits: int, packed: int | None) -> tuple[Tensor, Tensor]:
        codes = (self._codes(shape, bits, packed) ^ 128).view(torch.int8)
        return codes, self._scales(shape[0], 1).reshape(-1).float()

    def _scales(self, rows: int, groups: int) -> Tensor:
        scales = self.files.read_once(self._key("weight_scale")).double()
        return scales.reshape(-1, groups).expand(rows, groups).contiguous()

    def _zeros(self, rows: int, groups: int, bits: int) -> Tensor:
        """Return the code of zero [rows, groups], float64."""
        middle = 2.0 ** (bits - 1)
        if not self._shifted():
            return torch.full((rows, groups), middle, dtype=torch.float64)
        stored = self.files.read_once(self._key("weight_zero_point"))
        packed = stored.dtype in WORDS
        fits = stored.numel() == math.prod(self.files.shape(self._key("weight_scale")))
        if packed:
            fits = stored.dim() == 2 and stored.shape[0] in _words(rows, bits)
            fits = fits and stored.shape[1] == groups
        if not fits:
            raise GraftError(
                f"{self._key('weight_zero_point')} is {list(stored.shape)}; expected one zero "
                f"point for each of {[rows, groups]} scales"
            )
        if packed:
            return _unpacked(stored.T, bits, rows).T.double()
        return stored.double().reshape(-1, groups).expand(rows, groups) + middle

    def _steps(self, shape: Shape, block: Shape, packed: int | None) -> Tensor:
        """Return q - zero of integers with a scale and a zero point for each block, float32."""
        bits = packed or 8
        steps = self._codes(shape, bits, packed).float() - 2.0 ** (bits - 1)
        if not self._shifted():
            return steps
        zeros = self.files.read_once(self._key("weight_zero_point"))
        grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
        if zeros.numel() != grid[0] * grid[1]:
            raise GraftError(f"{self._key('weight_zero_point')} is {list(zeros.shape)}")
        return steps - spread(zeros.float().reshape(grid), shape, block)

    def _symmetric(self) -> tuple[bool, ...]:
        """Return what the settings may say of the zero points: that there are none, or some."""
        if self._shifted():
            return (False,)
        return (True, False) if self._has("weight_zero_point") else (True,)

    def _shifted(self) -> bool:
        """Return whether there are zero points; those of symmetric layers are zeros in bytes."""
        key = self._key("weight_zero_point")
        if key not in self.files:
            return False
        return self.files.dtype(key) in WORDS or bool(self.files.read_once(key).float().any())

    def _order(self, in_features: int, columns: int, groups: int) -> Tensor | None:
        """Return the group of each input where the tensors give it and it is no range."""
        if not self._has("weight_g_idx"):
            return None
        check_parts(self.files, self.name, {"weight_g_idx": ((in_features,), WORDS)})
        order = self.files.read_once(self._key("weight_g_idx")).long()
        if bool((order == -1).all()) or torch.equal(order, neighbours(in_features, columns)):
            return None
        counts = torch.bincount(order.clamp(0, groups), minlength=groups)
        if bool((order < 0).any()) or len(counts) != groups or bool((counts != columns).any()):
            raise GraftError(
                f"{self._key('weight_g_idx')} does not sort {in_features} inputs into {groups} "
                f"groups of {columns}; the folder is damaged: download it again"
            )
        return order

    # Floats and scales ---------------------------------------------------------------------------

    def _block(self, schemes: list[Scheme], shape: Shape) -> Shape:
        """Return (rows, columns) that share a scale; the last blocks may be short."""
        key = self._key("weight_scale")
        if key not in self.files:
            raise GraftError(f"tensor {key} is missing")
        if self.files.dtype(key) not in (*FLOATS, *EXPONENTS, *FP8):
            raise GraftError(f"{key} is {self.files.dtype(key)}; expected floats or exponents")
        stated = [block for scheme in schemes if (block := scheme.block()) is not None]
        return block_of(self._key("weight"), self.files.shape(key), shape, stated)

    def _floats(self, schemes: list[Scheme], form: object, shape: Shape) -> DenseLayer:
        check_parts(self.files, self.name, {"weight": (shape, FP8)})
        exponents = self.files.dtype(self._key("weight_scale")) in EXPONENTS
        forms = ("mxfp8-quantized",) if exponents else ("float-quantized", "naive-quantized")
        block = self._block(schemes, shape)
        facts: Facts = {"type": ("float",), "num_bits": (8,), "symmetric": (True,)}
        self._check(schemes, facts | _grouping(shape, block), forms, form)
        if self._shifted():
            raise GraftError(f"{self.name} has zero points beside 8-bit floats; expected none")
        return self._blocks("FP8", shape, block)

    def _blocks(
        self, words: str, shape: Shape, block: Shape, steps: Callable[[], Tensor] | None = None
    ) -> DenseLayer:
        """Return a weight with a scale for each block; steps: what is multiplied, if not weight."""

        def make() -> Tensor:
            scales = scale_of(self.files.read_once(self._key("weight_scale")))
            grid = scales.reshape(-(-shape[0] // block[0]), -(-shape[1] // block[1]))
            return scaled(
                steps() if steps else self.files.read_once(self._key("weight")), grid, block
            )

        return DenseLayer(words, make)

    def _small_floats(self, schemes: list[Scheme], form: object, shape: Shape) -> DenseLayer:
        rows, columns = shape
        stored = _columns(self.files, self._key("weight_packed"))
        six = stored * 4 == columns * 3
        if not six and stored * 2 != columns:
            raise GraftError(f"{self.name} has {stored} bytes a row, not those of {columns} codes")
        key, exponents = self._key("weight_scale"), self._block(schemes, shape)[1] == 32
        kinds = EXPONENTS if exponents else (torch.float8_e4m3fn,)
        size = 32 if exponents else 16
        check_parts(self.files, self.name, {"weight_scale": ((rows, -(-columns // size)), kinds)})
        name = "MXFP6" if six else _BLOCKS_OF_FLOATS[size]
        facts: Facts = {"type": ("float",), "num_bits": (6 if six else 4,), "group_size": (size,)}
        self._check(schemes, facts, (f"{name.lower()}-pack-quantized",), form)
        overall = self._key("weight_global_scale")
        if (overall in self.files) == exponents or self._shifted():
            raise GraftError(f"{self.name} has not the parts of {name}; download it again")

        def make() -> Tensor:
            packed = self.files.read_once(self._key("weight_packed"))
            values = e2m3(packed) if six else e2m1(packed)
            factors = scale_of(self.files.read_once(key))
            if not exponents:
                factors = factors / overall_scale(self.files, overall)
            return scaled(values, factors, (1, size))

        return DenseLayer(name, make)


def _columns(files: WeightFiles, key: str) -> int:
    shape = files.shape(key)
    if len(shape) != 2 or 0 in shape:
        raise GraftError(f"{key} has shape {list(shape)}; expected a matrix")
    return shape[1]


def _grouping(shape: Shape, block: Shape) -> Facts:
    """Return the strategy, and the size of a group, of scales for such blocks."""
    rows, columns = block
    if rows == 1 and columns < shape[1]:
        return {"strategy": ("group", "tensor_group"), "group_size": (columns,)}
    if rows == 1:
        return {"strategy": ("channel", "group"), "group_size": (-1, shape[1])}
    if block == shape:
        return {"strategy": ("tensor", "block"), "group_size": (-1,)}
    return {"strategy": ("block",), "block_structure": ([rows, columns], f"{rows}x{columns}")}


def _forms(packed: int | None) -> tuple[str, ...]:
    return ("pack-quantized",) if packed else ("int-quantized", "naive-quantized")


def _words(codes: int, bits: int) -> Shape:
    """Return how many words a row of codes takes: as one stream, and in whole words."""
    return -(-codes * bits // 32), -(-codes // (32 // bits))


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes of rows of words, uint8 [rows, count]."""
    stream, whole = _words(count, bits)
    if words.shape[1] == stream:
        if stream == whole and 32 % bits and stream > 1:
            raise GraftError(
                f"{count} codes of {bits} bits take {stream} words in both layouts of the tool; "
                "start from the unquantised model"
            )
        return unpack_stream(words, bits, count)
    shifts = torch.arange(0, 32 // bits * bits, bits)
    codes = words.long().unsqueeze(-1) >> shifts & (1 << bits) - 1
    return codes.byte().flatten(-2)[:, :count]
