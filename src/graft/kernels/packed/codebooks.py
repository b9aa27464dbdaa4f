"""The 4-bit and 8-bit codebooks: constants that every backend shares."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# QLoRA (arXiv 2305.14314), appendix E: quantiles of the standard normal, with an exact zero.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# 1 sign, 2 exponent and 1 mantissa bit (E2M1) in bit-pattern order, as bitsandbytes reads them.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

CODEBOOK_NAMES = ("nf4", "fp4")


@cache
def codebook(name: str) -> Tensor:
    """Return the 16 values of a 4-bit codebook, indexed by code; float32 [16] in [-1, 1].

    Raises KeyError for an unknown name.
    """
    if name == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32)
    if name == "fp4":
        magnitudes = torch.tensor(_FP4_MAGNITUDES, dtype=torch.float32)
        values = torch.cat([magnitudes, -magnitudes])
        return values / values.abs().max()
    raise KeyError(name)


@cache
def quantisation_bounds(name: str) -> tuple[Tensor, Tensor]:
    """Return (bounds, code_of_rank): midpoints between neighbouring values, and the codes in order.

    bounds: float32 [15], ascending; a value equal to a bound belongs to the lower code.
    code_of_rank: uint8 [16], the code of the i-th smallest value.
    """
    values, code_of_rank = codebook(name).sort(stable=True)
    return (values[:-1] + values[1:]) / 2, code_of_rank.to(torch.uint8)


@cache
def dynamic_code() -> Tensor:
    """Return the 256 values of the signed dynamic 8-bit code, ascending; float32 [256].

    A sign, a unary decimal exponent and a linear fraction in the remaining bits
    (arXiv 1511.04561; used by QLoRA for the nested statistics).
    """
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2
        # The product is taken in float32: float64 would round some of the values differently.
        scaled = (10 ** (exponent - 6) * means).tolist()
        values += scaled + [-value for value in scaled]
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def dynamic_code_table() -> Tensor:
    """Return the nearest dynamic code for 65,536 equally spaced values in [-1, 1]; uint8 [65536].

    Entry i belongs to the value i / 32767.5 - 1. Rounding through this table is what
    bitsandbytes' CPU kernel does; it differs from nearest rounding on about 0.15 % of values.
    """
    code = dynamic_code()
    values = torch.arange(65536, dtype=torch.float32) / 32767.5 - 1.0
    upper = torch.searchsorted(code, values).clamp(max=255)
    lower = (upper - 1).clamp(min=0)
    take_lower = (values - code[lower]).abs() <= (code[upper] - values).abs()
    return torch.where(take_lower, lower, upper).to(torch.uint8)
