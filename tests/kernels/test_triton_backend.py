"""The Triton kernels against the reference backend, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_testing import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    ON_GPU,
    TOKENS,
    assert_is_product,
    codebook,
    collected,
    needs_triton,
    randn,
    where_kernels_run,
)

from graft.formats.codebook import BLOCK_SIZE
from graft.formats.int8 import Int8Format
from graft.formats.int_group import GROUP_SIZES, IntGroupFormat
from graft.kernels.backend import triton_launch
from graft.kernels.frozen import reference
from graft.kernels.frozen import triton as backend
from graft.kernels.packed.codebooks import quantisation_bounds
from graft.kernels.packed.planes import unpack_codes
from graft.kernels.packed.weight import Weight


@collected(not INTERPRETED and not ON_GPU)
@needs_triton
def test_the_kernels_in_the_interpreter() -> None:
    here = Path(__file__).parent
    plugins = ["--noconftest", "-p", "no:cacheprovider", "-p", "triton_testing"]
    paths = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, __file__, here / "test_triton_parts.py"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


def int_group(shape: tuple[int, int], bits: int, group_size: int, statistics: str) -> Weight:
    """A random weight whose tensors are strided, as rounding anew or an update may leave them.

    The kernels read them as stored.
    """
    weight_format = IntGroupFormat(bits=bits, group_size=group_size, statistics=statistics)
    packed = {
        name: tensor.T.contiguous().T for name, tensor in weight_format.pack(randn(*shape)).items()
    }
    return weight_format.kernel_weight(packed, *shape)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Kernel and grid of each launch, in order."""
    launched: list[tuple[str, tuple[int, ...]]] = []
    launch = triton_launch.launch

    def record(kernel: str, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launched.append((kernel, grid))
        launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(backend, "launch", record)
    return launched


# int group ---------------------------------------------------------------------------------------

F16, F32 = "float16", "float32"
INT_CASES = [(2, 32, F32), (2, 8, F16), (3, 128, F16), (3, 16, F32), (4, 8, F32), (8, 64, F16)]


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_int_group_dequantize(bits: int, group_size: int, dtype: torch.dtype) -> None:
    statistics, columns = (F32, 1100) if group_size in (16, 64) else (F16, 170)
    weight = int_group((3, columns), bits, group_size, statistics)
    assert torch.equal(backend.dequantize(weight, dtype), reference.dequantize(weight, dtype))


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size", "statistics"), INT_CASES)
def test_int_group_products(
    bits: int, group_size: int, statistics: str, dtype: torch.dtype, launches: list
) -> None:
    for rows, columns in [(3, 45), (33, 70)]:
        packed = int_group((rows, columns), bits, group_size, statistics)
        weight = reference.dequantize(packed, dtype)
        for tokens in TOKENS if rows == 3 else TOKENS[:2]:
            launches.clear()
            x = randn(*tokens, columns, dtype=dtype)
            y = backend.linear(x, packed)
            assert y.shape == (*tokens, rows) and y.dtype == dtype
            assert_is_product(y, x, weight.T)
            assert launches[0][0] == f"int_group_{'dequantize' if tokens == (17,) else 'linear'}"
        grad = randn(2, rows, dtype=dtype)
        assert_is_product(backend.grad_input(grad, packed), grad, weight)


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size", "statistics"), INT_CASES)
def test_int_group_grad_of_statistics(
    bits: int, group_size: int, statistics: str, dtype: torch.dtype
) -> None:
    for rows, columns in [(6, 45), (133, 160)]:
        weight = int_group((rows, columns), bits, group_size, statistics)
        codes = unpack_codes(weight.tensors[: 2 if bits == 3 else 1], bits, columns)
        for tokens in ((1,), (2, 20)):
            x, grad = randn(*tokens, columns, dtype=dtype), randn(*tokens, rows, dtype=dtype)
            units = randn(rows, -(-columns // group_size))
            a, b = grad.flatten(0, -2).double(), x.flatten(0, -2).double()
            for unit in (None, units):
                both = backend.int_group_grad_statistics(grad, x, weight, unit)
                for ours, each in zip(both, (codes, torch.ones_like(codes)), strict=True):
                    terms = (a.T @ b) * each, (a.abs().T @ b.abs()) * each
                    exact, size = (reference._in_groups(term, group_size).sum(-1) for term in terms)
                    if unit is not None:
                        exact, size = exact * unit, size * unit.abs()
                    assert ours.dtype == torch.float32 and ours.shape == exact.shape
                    most = (len(a) + group_size + 1) * 2.0**-24 * size
                    assert ((ours - exact).abs() <= most).all()


# codebook ----------------------------------------------------------------------------------------

# A block that straddles rows, a short tail, an odd count, more blocks than a program's 32 and 64.
CODEBOOK_SHAPES = [(6, 45), (5, 64), (7, 7), (3, 1504)]


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", CODEBOOK_SHAPES)
def test_codebook_quantize(shape: tuple[int, int], name: str, dtype: torch.dtype) -> None:
    weight = randn(*shape, dtype=dtype)
    codes, absmax = reference.codebook_quantize(weight, name, BLOCK_SIZE)
    ours = backend.codebook_quantize(weight, name, BLOCK_SIZE)
    assert torch.equal(ours[0], codes) and torch.equal(ours[1], absmax)


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("shape", [*CODEBOOK_SHAPES, (1, 20000)])
def test_codebook_dequantize(
    shape: tuple[int, int], name: str, double: bool, dtype: torch.dtype
) -> None:
    weight = codebook(shape, name, double)
    assert torch.equal(backend.dequantize(weight, dtype), reference.dequantize(weight, dtype))


@where_kernels_run
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codebook_quantize_at_the_edges(name: str) -> None:
    """Ties, zeros of both signs, subnormal numbers, NaN, each in a full and in a short block."""
    bounds, _ = quantisation_bounds(name)
    rows = torch.zeros(5, 40)
    rows[0, :15], rows[0, 15] = bounds * 1.7, 1.7  # division and reciprocal round differently
    rows[1, ::2] = -0.0
    rows[2] = torch.randn(40) * 1e-39
    rows[3] = torch.randn(40)
    rows[3, 7] = float("nan")
    for row in rows:
        weight = torch.cat([row, row[:24], row]).to(DEVICE)
        expected = reference.codebook_quantize(weight, name, BLOCK_SIZE)
        ours = backend.codebook_quantize(weight, name, BLOCK_SIZE)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "double"), [("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("shape", [(6, 45), (33, 320)])
def test_codebook_products(
    shape: tuple[int, int], name: str, double: bool, dtype: torch.dtype, launches: list
) -> None:
    packed = codebook(shape, name, double)
    weight = reference.dequantize(packed, dtype)
    for tokens in TOKENS:
        x, grad = randn(*tokens, shape[1], dtype=dtype), randn(*tokens, shape[0], dtype=dtype)
        launches.clear()
        y = backend.linear(x, packed)
        assert y.shape == grad.shape and y.dtype == dtype
        assert_is_product(y, x, weight.T)
        fused = tokens != (17,) and shape[1] % BLOCK_SIZE == 0
        assert launches[0][0] == ("codebook_linear" if fused else "codebook_dequantize")
        assert_is_product(backend.grad_input(grad, packed), grad, weight)


# int8, and what all linears share ----------------------------------------------------------------


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 45), (33, 520)])
def test_int8_products(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = Int8Format().pack(randn(*shape))
    tensors["codes"] = tensors["codes"].T.contiguous().T
    packed = Int8Format().kernel_weight(tensors, *shape)
    weight = reference.dequantize(packed, dtype)
    assert torch.equal(backend.dequantize(packed, dtype), weight)
    for tokens in TOKENS:
        x, grad = randn(*tokens, shape[1], dtype=dtype), randn(*tokens, shape[0], dtype=dtype)
        assert_is_product(backend.linear(x, packed), x, weight.T)
        assert_is_product(backend.grad_input(grad, packed), grad, weight)


def linears(columns: int) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Each linear operation as a function of x, with its weight [40, columns] in float32."""
    int8 = Int8Format().kernel_weight(Int8Format().pack(randn(40, columns)), 40, columns)
    nf4 = codebook((40, columns), "nf4", double=False)
    return [
        (lambda x, w=weight: backend.linear(x, w), reference.dequantize(weight, torch.float32))
        for weight in (int_group((40, columns), 4, 32, "float16"), nf4, int8)
    ]


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_along_the_rows(
    dtype: torch.dtype, launches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_VECTOR_TOKENS", 1)
    for rows, columns in ((5, 64), (3, 45), (3, 1088)):
        weights = [int_group((rows, columns), *case) for case in INT_CASES[::2]]
        if columns % BLOCK_SIZE == 0:
            weights += [
                codebook((rows, columns), "nf4", True),
                codebook((rows, columns), "fp4", False),
            ]
        for packed in weights:
            launches.clear()
            x = randn(1, 1, columns, dtype=dtype)
            y = backend.linear(x, packed)
            assert y.shape == (1, 1, rows) and y.dtype == dtype
            assert_is_product(y, x, reference.dequantize(packed, dtype).T)
            assert [name for name, _ in launches] == [f"{packed.layout.kind}_vector"]


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_shared_out_in_splits(
    dtype: torch.dtype, launches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_processors", lambda device: 2)
    # Two tiles of rows for four programs: two splits, of 3 tiles of 256 columns, 11 of 64 or 22.
    for linear, weight in linears(704):
        launches.clear()
        x = randn(2, 704, dtype=dtype)
        assert_is_product(linear(x), x, weight.to(dtype).T)
        assert [grid for _, grid in launches] == [(2, 2)]


@where_kernels_run
def test_strided_inputs_no_tokens_and_float64() -> None:
    for linear, weight in linears(64):
        x = randn(3, 64, 2).transpose(1, 2)
        assert_is_product(linear(x), x, weight.T)
        assert linear(randn(2, 0, 64)).shape == (2, 0, 40)
        wide = randn(3, 64, dtype=torch.float64)
        torch.testing.assert_close(linear(wide), wide @ weight.double().T)
    weight = int_group((6, 45), 3, 8, "float32")
    grad, x = randn(4, 6, dtype=torch.float64), randn(4, 45, dtype=torch.float64)
    sides = (
        module.int_group_grad_statistics(grad, x, weight, None)[0]
        for module in (backend, reference)
    )
    torch.testing.assert_close(*sides)
