"""Products of 1 to 16 tokens, which the native kernels take straight from the codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from graft.formats.base import WeightFormat
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.kernels.frozen import native
from graft.kernels.packed.weight import Weight

# Less than a step; a short last group, rows that no number of rows at once divides; several pieces.
SHAPES = [(7, 45), (33, 130), (27, 1344), (9, 1100)]
FORMATS: list[WeightFormat] = [
    CodebookFormat(),
    CodebookFormat(name="fp4", double_quant=True),
    Int8Format(),
    DenseFormat("float32"),
    DenseFormat("bfloat16"),
    *(IntGroupFormat(bits=bits, group_size=size) for bits in (2, 3, 4, 8) for size in (16, 32, 64)),
    IntGroupFormat(bits=4, group_size=128, statistics="float32"),
]
MOST = 17
"""One more than the kernels for few tokens take."""


def packed_weight(weight_format: WeightFormat, shape: tuple[int, int]) -> tuple[Weight, Tensor]:
    """Return a weight and what it stands for."""
    packed = weight_format.pack(torch.randn(shape))
    weight = weight_format.kernel_weight(packed, *shape)
    return weight, weight_format.unpack(packed, *shape, torch.float32)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_of_tokens_meets_every_weight(
    level: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for weight_format in FORMATS:
        weight, dense = packed_weight(weight_format, shape)
        x = torch.randn(MOST, shape[1]).to(dtype)
        exact = x.double() @ dense.double().T
        for tokens in range(1, MOST + 1):
            with threads(1):
                one = native.linear(x[:tokens], weight)
            with threads(2):
                assert torch.equal(native.linear(x[:tokens], weight), one), weight_format
            error = (one.double() - exact[:tokens]).abs().max()
            assert error <= tolerance * exact.abs().max(), (weight_format, tokens)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_s_float_products_are_those_of_the_token_alone(
    level: str, shape: tuple[int, int]
) -> None:
    for weight_format in FORMATS:
        weight, _ = packed_weight(weight_format, shape)
        x = torch.randn(MOST - 1, shape[1])
        alone = torch.cat([native.linear(x[i : i + 1], weight) for i in range(len(x))])
        together = native.linear(x, weight)
        for tokens in range(2, MOST):
            assert torch.equal(native.linear(x[:tokens], weight), together[:tokens]), weight_format
        if level != "AVX2":  # where a token alone meets scales and offsets once a group
            assert torch.equal(alone, together), weight_format


def test_a_row_s_products_do_not_depend_on_the_rows_beside_it(level: str) -> None:
    shape = 30, 1344
    for weight_format in FORMATS:
        if isinstance(weight_format, CodebookFormat):
            continue  # its blocks are those of the whole matrix
        packed = weight_format.pack(torch.randn(shape))
        x = torch.randn(5, shape[1])
        whole = native.linear(x, weight_format.kernel_weight(packed, *shape))
        some = {name: tensor[3:20].clone() for name, tensor in packed.items()}
        part = native.linear(x, weight_format.kernel_weight(some, 17, shape[1]))
        assert torch.equal(part, whole[:, 3:20]), weight_format


def test_the_numbers_after_a_weight_s_last_row_are_not_read(level: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rows, columns = 5, 45
        memory = torch.full((rows + 1, columns), float("nan"), dtype=dtype)
        memory[:rows] = torch.randn(rows, columns)
        weight = DenseFormat(str(dtype).removeprefix("torch.")).kernel_weight(
            {"weight": memory[:rows]}, rows, columns
        )
        for tokens in (1, 5):
            assert native.linear(torch.randn(tokens, columns), weight).isfinite().all()
