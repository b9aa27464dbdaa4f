"""The Triton kernels against the reference backend, on a GPU or in Triton's interpreter.

The interpreter is chosen when triton is first imported, and other libraries import it too. So
without a GPU the tests of what the kernels compute run in a process of their own, which
`test_the_kernels_in_the_interpreter` starts with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graft.formats.codebook import BLOCK_SIZE, CodebookFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import GROUP_SIZES, IntGroupFormat
from graft.kernels import (
    reference,
    reference_pointwise,
    triton_launch,
    triton_low_rank,
    triton_moves,
    triton_pointwise,
)
from graft.kernels import triton_backend as backend
from graft.kernels.codebooks import quantisation_bounds
from graft.kernels.packing import unpack_codes
from graft.kernels.weights import Layout, Weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = triton_launch._why_unavailable() is None and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = [(1,), (3, 1), (17,)]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton; pip install 'graft-llm[test]'"
)

if INTERPRETED:  # a process without the suite's conftest
    torch.set_num_threads(1)

    @pytest.fixture(autouse=True)
    def _seed() -> None:
        torch.manual_seed(0)


def collected(condition: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def mark(test: Callable[..., None]) -> Callable[..., None]:
        test.__test__ = condition  # type: ignore[attr-defined]
        return test

    return mark


where_kernels_run = collected(INTERPRETED or ON_GPU)
where_the_suite_runs = collected(not INTERPRETED)


@collected(not INTERPRETED and not ON_GPU)
@needs_triton
def test_the_kernels_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def int_group(shape: tuple[int, int], bits: int, group_size: int, statistics: str) -> tuple:
    """Codes, codes_high, scales, offsets, bits and group size of a random weight.

    All are strided, as rounding anew or an update may leave them; the kernels read them as stored.
    """
    weight_format = IntGroupFormat(bits=bits, group_size=group_size, statistics=statistics)
    packed = {
        name: tensor.T.contiguous().T for name, tensor in weight_format.pack(randn(*shape)).items()
    }
    planes = packed["codes"], packed.get("codes_high")
    return *planes, packed["scales"], packed["offsets"], bits, group_size


def codebook(shape: tuple[int, int], name: str, double: bool) -> tuple[tuple, tuple]:
    """(Codes, absmax, codebook and block size) and (absmax_scale, absmax_offset) of a weight."""
    packed = CodebookFormat(name=name, double_quant=double).pack(randn(*shape))
    nested = packed.get("absmax_scale"), packed.get("absmax_offset")
    return (packed["codes"], packed["absmax"], name, BLOCK_SIZE), nested


def assert_is_product(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y = a b up to float32 sums in any order and one rounding to y's dtype."""
    a, b = a.double(), b.double()
    bound = a.shape[-1] * 2.0**-24 * (a.abs() @ b.abs())
    kind, exact = torch.finfo(y.dtype), a @ b
    bound += kind.eps * exact.abs().clamp(min=kind.smallest_normal)
    assert ((y - exact).abs() <= bound).all()


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
    args = (*int_group((3, columns), bits, group_size, statistics), columns, dtype)
    assert torch.equal(backend.int_group_dequantize(*args), reference.int_group_dequantize(*args))


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size", "statistics"), INT_CASES)
def test_int_group_products(
    bits: int, group_size: int, statistics: str, dtype: torch.dtype, launches: list
) -> None:
    for rows, columns in [(3, 45), (33, 70)]:
        args = int_group((rows, columns), bits, group_size, statistics)
        weight = reference.int_group_dequantize(*args, columns, dtype)
        for tokens in TOKENS if rows == 3 else TOKENS[:2]:
            launches.clear()
            x = randn(*tokens, columns, dtype=dtype)
            y = backend.int_group_linear(x, *args)
            assert y.shape == (*tokens, rows) and y.dtype == dtype
            assert_is_product(y, x, weight.T)
            assert launches[0][0] == f"int_group_{'dequantize' if tokens == (17,) else 'linear'}"
        grad = randn(2, rows, dtype=dtype)
        assert_is_product(backend.int_group_grad_input(grad, *args, columns), grad, weight)


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size", "statistics"), INT_CASES)
def test_int_group_grad_scales(
    bits: int, group_size: int, statistics: str, dtype: torch.dtype
) -> None:
    for rows, columns in [(6, 45), (133, 160)]:
        args = int_group((rows, columns), bits, group_size, statistics)
        codes = unpack_codes(args[: 2 if bits == 3 else 1], bits, columns)
        for tokens in ((1,), (2, 20)):
            x, grad = randn(*tokens, columns, dtype=dtype), randn(*tokens, rows, dtype=dtype)
            ours = backend.int_group_grad_statistics(grad, x, *args[:2], bits, group_size, None)[0]
            a, b = grad.flatten(0, -2).double(), x.flatten(0, -2).double()
            terms = (a.T @ b) * codes, (a.abs().T @ b.abs()) * codes
            exact, size = (reference._in_groups(term, group_size).sum(-1) for term in terms)
            assert ours.dtype == torch.float32 and ours.shape == exact.shape
            assert ((ours - exact).abs() <= (len(a) + group_size) * 2.0**-24 * size).all()


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
    packed, nested = codebook(shape, name, double)
    args = (*packed, *shape, dtype, *nested)
    assert torch.equal(backend.codebook_dequantize(*args), reference.codebook_dequantize(*args))


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
    packed, nested = codebook(shape, name, double)
    weight = reference.codebook_dequantize(*packed, *shape, dtype, *nested)
    for tokens in TOKENS:
        x, grad = randn(*tokens, shape[1], dtype=dtype), randn(*tokens, shape[0], dtype=dtype)
        launches.clear()
        y = backend.codebook_linear(x, *packed, shape[0], *nested)
        assert y.shape == grad.shape and y.dtype == dtype
        assert_is_product(y, x, weight.T)
        fused = tokens != (17,) and shape[1] % BLOCK_SIZE == 0
        assert launches[0][0] == ("codebook_linear" if fused else "codebook_dequantize")
        grad_x = backend.codebook_grad_input(grad, *packed, shape[1], *nested)
        assert_is_product(grad_x, grad, weight)


# statistics that move ----------------------------------------------------------------------------


@where_kernels_run
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_statistics_move_as_in_the_reference(stored: torch.dtype) -> None:
    offsets, A, B = randn(33, 40, dtype=stored), randn(4, 40), randn(33, 4)
    A[:, :4] *= 1e-7  # sums that float16 holds as subnormal numbers
    for scaling in (1.0, 0.7):
        ours = triton_moves.move_offsets(offsets.T.contiguous().T, A, B, scaling, stored)
        assert torch.equal(ours, reference.move_offsets(offsets, A, B, scaling, stored))
    u_A, u_B = randn(6, 40), randn(33, 6)
    factors = offsets.abs().T.contiguous().T, offsets, A, B, 0.7, u_A, u_B
    both = triton_moves.move_by_factors(*factors), reference.move_by_factors(*factors)
    for ours, theirs in zip(*both, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    # So many that some lie where rounding by way of float32 would go the other way.
    values, scales = (randn(900, 33, dtype=stored) for _ in range(2))
    moves = randn(900, 33)
    values[0, 0], moves[0, 0] = 60000.0, 1e6  # overflows float16
    expected = reference.move_scaled(values, scales, moves, stored)
    assert torch.equal(triton_moves.move_scaled(values, scales, moves, stored), expected)


# norms, gates and low ranks ----------------------------------------------------------------------


def assert_near(ours: Any, theirs: Any) -> None:
    """Equal but for two roundings to the dtype of numbers of this size."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        eps = 2 * torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=eps, atol=eps * other.abs().max().item())


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 40), (5, 300)])
def test_norms_and_gates(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad, gate, up = (randn(*shape, dtype=dtype) for _ in range(4))
    # As views lie that an adapter or a split projection hands on.
    x, grad, gate, up = (t.mT.contiguous().mT for t in (x, grad, gate, up))
    weight = randn(shape[-1], dtype=dtype)
    expected = reference_pointwise.rms_norm(x, weight, 1e-5)
    assert_near(triton_pointwise.rms_norm(x, weight, 1e-5), expected)
    both = grad, x, weight, expected[1]
    theirs = reference_pointwise.rms_norm_backward(*both)
    assert_near([triton_pointwise.rms_norm_backward(*both)], [theirs])
    assert_near([triton_pointwise.silu_gate(gate, up)], [reference_pointwise.silu_gate(gate, up)])
    theirs = reference_pointwise.silu_gate_backward(grad, gate, up)
    assert_near(triton_pointwise.silu_gate_backward(grad, gate, up), theirs)


@where_kernels_run
@pytest.mark.parametrize(("shape", "dtype"), [((3, 4), torch.float64), ((0, 4), torch.float32)])
def test_norms_and_gates_that_no_kernel_takes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(4, dtype=dtype)

    def results(of: Any) -> list[Tensor]:
        y, scale = of.rms_norm(x, weight, 1e-5)
        gates = of.silu_gate(x, x), *of.silu_gate_backward(x, x, x)
        return [y, scale, of.rms_norm_backward(x, x, weight, scale), *gates]

    for one, other in zip(results(triton_pointwise), results(reference_pointwise), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_low_rank_products(tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    packed, nested = codebook((33, 128), "nf4", True)
    layout = Layout("codebook", 33, 128, group_size=BLOCK_SIZE, codebook="nf4")
    weight = Weight(layout, (*packed[:2], *nested))
    A, B, scaling = randn(4, 128), randn(33, 4), 0.7
    x, grad = randn(*tokens, 128, dtype=dtype), randn(*tokens, 33, dtype=dtype)
    for name, given in (("lora_linear", x), ("lora_grad_input", grad)):
        compute = getattr(reference, name), getattr(triton_low_rank, name)
        exact = compute[0](given.double(), weight, A, B, scaling)
        for one, other in zip(compute[1](given, weight, A, B, scaling), exact, strict=True):
            assert one.dtype == dtype and one.shape == other.shape
            assert (one - other).abs().max() <= 16 * torch.finfo(dtype).eps * other.abs().max()
    assert_is_product(
        triton_low_rank.token_product(grad, x).to(dtype), grad.reshape(-1, 33).T, x.reshape(-1, 128)
    )


# int8, and what all linears share ----------------------------------------------------------------


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 45), (33, 520)])
def test_int8_products(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = Int8Format().pack(randn(*shape))
    packed["codes"] = packed["codes"].T.contiguous().T
    weight = Int8Format().unpack(packed, *shape, dtype)
    assert torch.equal(backend._int8_weight(**packed, dtype=dtype), weight)
    for tokens in TOKENS:
        x, grad = randn(*tokens, shape[1], dtype=dtype), randn(*tokens, shape[0], dtype=dtype)
        assert_is_product(backend.int8_linear(x, **packed), x, weight.T)
        assert_is_product(backend.int8_grad_input(grad, **packed), grad, weight)


def linears(columns: int) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Each linear operation as a function of x, with its weight [40, columns] in float32."""
    args = int_group((40, columns), 4, 32, "float16")
    nf4, _ = codebook((40, columns), "nf4", double=False)
    int8 = Int8Format().pack(randn(40, columns))
    int_weight = reference.int_group_dequantize(*args, columns, torch.float32)
    nf4_weight = reference.codebook_dequantize(*nf4, 40, columns, torch.float32)
    int8_weight = Int8Format().unpack(int8, 40, columns, torch.float32)
    return [
        (lambda x: backend.int_group_linear(x, *args), int_weight),
        (lambda x: backend.codebook_linear(x, *nf4, 40), nf4_weight),
        (lambda x: backend.int8_linear(x, **int8), int8_weight),
    ]


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
    args = int_group((6, 45), 3, 8, "float32")
    grad, x = randn(4, 6, dtype=torch.float64), randn(4, 45, dtype=torch.float64)
    sides = (
        module.int_group_grad_statistics(grad, x, *args[:2], 3, 8, None)[0]
        for module in (backend, reference)
    )
    torch.testing.assert_close(*sides)
