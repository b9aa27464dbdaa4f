"""Small floating-point numbers of other tools, and the scales that they are multiplied with.

The elements are those of the OCP formats: E4M3 and E5M2 (8 bits, dtypes of PyTorch), E2M3 (6 bits)
and E2M1 (4 bits). A scale is a float, an E4M3 number, or an exponent E8M0: a byte, 2^(byte - 127).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graft.convert.folder import FLOATS
from graft.errors import GraftError
from graft.model.weight_files import WeightFiles

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M3 = tuple(
    mantissa / 8 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 1)
    for exponent in range(4)
    for mantissa in range(8)
)


def e2m1(packed: Tensor) -> Tensor:
    """Return the numbers that lie two to a byte, the first one low; float32 [..., 2 bytes]."""
    codes = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return _looked_up(nibbles, _E2M1)


def e2m3(packed: Tensor) -> Tensor:
    """Return the numbers that lie four to three bytes, the first one lowest; float32."""
    first, second, third = packed.contiguous().unflatten(-1, (-1, 3)).int().unbind(-1)
    whole = (first | second << 8 | third << 16).unsqueeze(-1)
    codes = whole >> torch.arange(0, 24, 6, dtype=torch.int32) & 63
    return _looked_up(codes.flatten(-2), _E2M3)


def _looked_up(codes: Tensor, magnitudes: tuple[float, ...]) -> Tensor:
    """Return magnitudes with the sign that the highest bit of each code is."""
    both = torch.tensor([*magnitudes, *(-value for value in magnitudes)])
    return both[codes.int()]


def powers(exponents: Tensor) -> Tensor:
    """Return what bytes of E8M0 stand for, float32; raises GraftError for NaN, which is 255."""
    codes = exponents.contiguous().view(torch.uint8)
    if bool((codes == 255).any()):
        raise GraftError("a scale is no number (E8M0 of 255); download the folder again")
    return torch.tensor([2.0 ** (code - 127) for code in range(255)])[codes.int()]


def overall_scale(files: WeightFiles, key: str) -> Tensor:
    """Return the one number that a whole weight is scaled by; raises GraftError for more."""
    stored = files.read_once(key)
    if stored.numel() != 1 or stored.dtype not in FLOATS:
        raise GraftError(f"{key} is {stored.dtype} {list(stored.shape)}; expected one float")
    return stored.float().reshape(())


def scale_of(stored: Tensor) -> Tensor:
    """Return scales as float32: exponents in bytes, or floats of any width."""
    return powers(stored) if stored.dtype in EXPONENTS else stored.float()


def spread(scales: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Return one scale for each element; scales [rows, columns] of blocks, the last ones short."""
    rows = scales.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def scaled(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return values [rows, columns] times the scale of their block, float32.

    Rows of one block each are multiplied in place of a matrix of scales as large as the weight.
    """
    values = values.float()
    rows, columns = values.shape
    if block == (rows, columns):
        return values * scales.reshape(())
    if block[0] == 1 and columns % block[1] == 0:
        grouped = values.unflatten(-1, (-1, block[1]))
        return (grouped * scales.unsqueeze(-1)).flatten(-2)
    return values * spread(scales, (rows, columns), block)


def block_of(
    name: str,
    scales: tuple[int, ...],
    shape: tuple[int, int],
    stated: Sequence[tuple[int, int]] = (),
) -> tuple[int, int]:
    """Return (rows, columns) that share a scale of a weight, from the shape of its scales.

    scales: () or one for the tensor, [rows] or [rows, 1], or a grid of blocks. stated: sizes of
    blocks that the settings give, the likeliest first; the last blocks may be short. Raises
    GraftError when nothing fits.
    """
    rows, columns = shape
    if all(size == 1 for size in scales):
        return shape
    if len(scales) == 1 and scales[0] == rows:
        return 1, columns
    if len(scales) == 2 and 0 not in scales:
        for block in stated:
            if scales == (-(-rows // block[0]), -(-columns // block[1])):
                return block
        if _are_parts(rows, scales[0]) and _are_parts(columns, scales[1]):
            return rows // scales[0], columns // scales[1]
    blocks = "".join(f", and blocks of {list(block)}" for block in stated[:3])
    raise GraftError(
        f"{name} has scales {list(scales)} for a weight {list(shape)}{blocks}, and the sizes of "
        "its blocks do not follow; download its weights and its config.json again"
    )


def _are_parts(size: int, count: int) -> bool:
    """Return whether so many blocks can only be equal parts: as powers of two.

    Two blocks of 192 rows may be 96 and 96, and are 128 and 64.
    """
    part = size // count
    return size % count == 0 and (count == 1 or part & part - 1 == 0)
