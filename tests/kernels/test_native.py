"""The native backend against the reference, on every instruction set that this machine has."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from graft.formats.base import WeightFormat
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.kernels.backend import native_library
from graft.kernels.frozen import native, reference
from graft.kernels.low_rank import native as native_low_rank
from graft.kernels.low_rank import reference as reference_low_rank
from graft.kernels.moves import native as native_moves
from graft.kernels.moves import reference as reference_moves
from graft.kernels.packed.weight import Weight
from graft.layers.frozen import FrozenLinear

pytestmark = pytest.mark.skipif(
    native_library.why_unavailable() is not None,
    reason=f"native backend: {native_library.why_unavailable()}",
)

# A row of one straddling block, a short last group and an odd count; whole blocks; many rows.
SHAPES = [(7, 45), (33, 130), (96, 256)]
FORMATS: list[WeightFormat] = [
    CodebookFormat(),
    CodebookFormat(name="fp4", double_quant=True),
    Int8Format(),
    *(IntGroupFormat(bits=bits, group_size=size) for bits in (2, 3, 4, 8) for size in (8, 32, 64)),
    IntGroupFormat(bits=4, group_size=16, statistics="float32"),
]
DTYPES = [torch.float32, torch.bfloat16]


def packed_weight(weight_format: WeightFormat, shape: tuple[int, int]) -> tuple[Weight, Tensor]:
    """Return a weight and what it stands for in float64 when it is read in float32."""
    packed = weight_format.pack(torch.randn(shape))
    dense = weight_format.unpack(packed, *shape, torch.float32)
    return weight_format.kernel_weight(packed, *shape), dense.double()


def emulated_quickly(level: str, tokens: int) -> int:
    """Return fewer tokens where arithmetic is emulated: still several tiles, the last not full."""
    return 40 if level == "NEON" and tokens == 130 else tokens


def assert_near(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of the output (and, in bf16, of the weight and the hidden matrix)."""
    tolerance = (2e-5 if dtype == torch.float32 else 2e-2) * exact.abs().max().item()
    assert (got.double() - exact).abs().max().item() <= tolerance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantised_weights_equal_the_references(
    level: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for weight_format in FORMATS:
        weight, _ = packed_weight(weight_format, shape)
        expected = reference.dequantize(weight, dtype)
        assert torch.equal(native.dequantize(weight, dtype), expected), weight_format


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 17, 70, 130])
def test_products_equal_float64(
    level: str, shape: tuple[int, int], dtype: torch.dtype, tokens: int
) -> None:
    dense_format = DenseFormat(str(dtype).removeprefix("torch."))
    out_features, in_features = shape
    tokens = emulated_quickly(level, tokens)
    for weight_format in [*FORMATS, dense_format]:
        weight, dense = packed_weight(weight_format, shape)
        x, grad = (torch.randn(tokens, n).to(dtype) for n in (in_features, out_features))
        A, B = torch.randn(5, in_features).to(dtype), torch.randn(out_features, 5).to(dtype)
        x64, grad64, A64, B64 = (tensor.double() for tensor in (x, grad, A, B))
        y, hidden = native_low_rank.lora_linear(x, weight, A, B, 0.5)
        assert_near(hidden, 0.5 * x64 @ A64.T, dtype)
        assert_near(y, x64 @ dense.T + 0.5 * x64 @ A64.T @ B64.T, dtype)
        dx, hidden = native_low_rank.lora_grad_input(grad, weight, A, B, 0.5)
        assert_near(hidden, 0.5 * grad64 @ B64, dtype)
        assert_near(dx, grad64 @ dense + 0.5 * grad64 @ B64 @ A64, dtype)
        assert_near(native.linear(x, weight), x64 @ dense.T, dtype)
        assert_near(native.grad_input(grad, weight), grad64 @ dense, dtype)
        assert_near(native_low_rank.token_product(grad, x), grad64.T @ x64, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(300, 5), (129, 128), (300, 129), (5, 300)])
def test_products_over_tokens_of_every_proportion(
    level: str, rows: int, columns: int, dtype: torch.dtype
) -> None:
    a, b = torch.randn(2, 9, rows).to(dtype), torch.randn(2, columns, 9).to(dtype).mT
    exact = a.double().reshape(-1, rows).T @ b.double().reshape(-1, columns)
    product = native_low_rank.token_product(a, b)
    assert product.is_contiguous() and product.dtype == torch.float32
    assert_near(product, exact, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_gradients_and_pooling(
    level: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for bits, group_size in ((2, 8), (3, 64), (4, 32), (8, 16)):
        packed = IntGroupFormat(bits=bits, group_size=group_size).pack(torch.randn(shape))
        weight = IntGroupFormat(bits, group_size).kernel_weight(packed, *shape)
        grad, x = torch.randn(19, shape[0]).to(dtype), torch.randn(19, shape[1]).to(dtype)
        # Inputs of the dtype, sums in float64.
        inputs = grad.double(), x.double()
        for units in (None, packed["scales"]):
            exact = reference.int_group_grad_statistics(*inputs, weight, units)
            ours = native.int_group_grad_statistics(grad, x, weight, units)
            assert_near(ours[0], exact[0], dtype)
            assert_near(ours[1], exact[1], dtype)
        expected = reference.int_group_grad_offsets(grad.double(), x.double(), group_size)
        assert_near(
            native_low_rank.int_group_grad_offsets(grad, x, group_size), expected, torch.float32
        )
        pooled = reference_low_rank.pool(x.double(), group_size)
        assert_near(native_low_rank.pool(x, group_size), pooled, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_weights_equal_the_references(
    level: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    weight[0] = 0.25
    weight[1, :8] = 0
    for name in ("nf4", "fp4"):
        expected = reference.codebook_quantize(weight, name, 64)
        for got, other in zip(native.codebook_quantize(weight, name, 64), expected, strict=True):
            assert torch.equal(got, other)
    for bits in (2, 3, 4, 8):
        for group_size in (8, 16, 32, 64, 128):
            for statistics in (torch.float16, torch.float32):
                arguments = weight, bits, group_size, statistics, 2.0**-20
                got = native.int_group_quantize(*arguments)
                expected = reference.int_group_quantize(*arguments)
                assert len(got[0]) == (2 if bits == 3 else 1)
                for mine, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
                    assert torch.equal(mine, other)


def test_a_weight_that_is_not_finite_has_statistics_that_are_not(level: str) -> None:
    for value in (float("nan"), float("inf"), 1e30):
        weight = torch.randn(20, 64)
        weight[13, 5] = value
        _, scales, offsets = native.int_group_quantize(weight, 4, 32, torch.float16, 2.0**-20)
        assert not (scales.isfinite().all() and offsets.isfinite().all())


def test_offsets_move_as_in_the_reference(level: str) -> None:
    for stored in (torch.float16, torch.float32):
        offsets, A, B = torch.randn(9, 33).to(stored), torch.randn(4, 33), torch.randn(9, 4)
        A[:, :4] *= 1e-7  # sums that float16 holds as subnormal numbers, and ties
        arguments = offsets, A, B, 0.5, stored
        assert torch.equal(
            native_moves.move_offsets(*arguments), reference_moves.move_offsets(*arguments)
        )


def test_statistics_move_in_units_of_the_scales_as_in_the_reference(level: str) -> None:
    for stored in (torch.float16, torch.float32):
        # So many that some lie where rounding by way of float32 would go the other way.
        values, scales = (torch.randn(900, 33).to(stored) for _ in range(2))
        moves = torch.randn(900, 33)
        moves[:4] *= 1e-7
        values[0, 0], moves[0, 0] = 60000.0, 1e6  # overflows float16
        arguments = values, scales, moves, stored
        expected = reference_moves.move_scaled(*arguments)
        assert torch.equal(native_moves.move_scaled(*arguments), expected)
        assert expected.isfinite().all() == (stored == torch.float32)


def test_doubly_quantised_statistics_equal_the_references(level: str) -> None:
    for absmax in (torch.rand(700), torch.full((300,), 0.5), torch.randn(256).exp()):
        offset = absmax.mean()
        got = native.codebook_quantize_absmax(absmax, offset)
        for mine, other in zip(
            got, reference.codebook_quantize_absmax(absmax, offset), strict=True
        ):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("weight_format", [CodebookFormat(double_quant=True), IntGroupFormat()])
def test_a_weight_larger_than_the_caches_is_dequantised_past_them(
    weight_format: WeightFormat,
) -> None:
    shape = 2050, 2112
    packed = weight_format.pack(torch.randn(shape))
    got = weight_format.unpack(packed, *shape, torch.bfloat16)
    assert got.nbytes > 8 << 20
    assert torch.equal(got, weight_format.unpack(packed, *shape, torch.float32).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(level: str, dtype: torch.dtype) -> None:
    # An odd number of whole blocks, which several tasks share.
    rows, columns, tokens = 22, 736, emulated_quickly(level, 130)
    x, grad = torch.randn(tokens, columns).to(dtype), torch.randn(tokens, rows).to(dtype)
    A, B = torch.randn(5, columns), torch.randn(rows, 5)
    before = torch.get_num_threads()
    formats = FORMATS[::3] if level == "NEON" else FORMATS
    for weight_format in [*formats, DenseFormat(str(dtype).removeprefix("torch."))]:
        weight, dense = packed_weight(weight_format, (rows, columns))

        def results(threads: int, weight: Weight = weight) -> list[Tensor]:
            torch.set_num_threads(threads)
            made = [
                *native_low_rank.lora_linear(x, weight, A, B, 1.0),
                *native_low_rank.lora_grad_input(grad, weight, A, B, 1.0),
                native_low_rank.token_product(x, grad),
                native_low_rank.token_product(grad, x),
            ]
            if weight.layout.kind == "int_group":
                made += native.int_group_grad_statistics(grad, x, weight, weight.tensors[2])
            return made

        try:
            expected = results(1)
            for threads in (2, 3):
                for one, other in zip(expected, results(threads), strict=True):
                    assert torch.equal(one, other), weight_format
        finally:
            torch.set_num_threads(before)
        update = grad.double() @ B.to(dtype).double() @ A.to(dtype).double()
        assert_near(expected[2], grad.double() @ dense + update, dtype)


@pytest.mark.parametrize("group_size", [8, 32, 128])
def test_no_group_is_cut_by_the_tasks_of_a_statistics_gradient(level: str, group_size: int) -> None:
    packed = IntGroupFormat(group_size=group_size).pack(torch.randn(5, 704))
    grad, x = torch.randn(70, 5), torch.randn(70, 704)
    arguments = IntGroupFormat(group_size=group_size).kernel_weight(packed, 5, 704), None
    exact = reference.int_group_grad_statistics(grad.double(), x.double(), *arguments)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            ours = native.int_group_grad_statistics(grad, x, *arguments)
            for mine, other in zip(ours, exact, strict=True):
                assert_near(mine, other, torch.float32)
    finally:
        torch.set_num_threads(before)


def test_dtypes_that_the_kernels_do_not_multiply_go_to_the_reference() -> None:
    weight, dense = packed_weight(IntGroupFormat(), (12, 64))
    x = torch.randn(3, 64, dtype=torch.float64)
    A, B = torch.randn(2, 64), torch.randn(12, 2)
    y, _ = native_low_rank.lora_linear(x, weight, A, B, 1.0)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, x @ dense.T + x @ A.double().T @ B.double().T)


def test_a_layer_s_weight_is_prepared_once_and_anew_where_a_tensor_lies_elsewhere() -> None:
    packed = IntGroupFormat().pack(torch.randn(12, 64))
    layer = FrozenLinear(64, 12, IntGroupFormat(), packed)
    weight, x = layer.kernel_weight(), torch.randn(3, 64)
    y, struct = layer(x), native_library.prepared(weight)
    assert native_library.prepared(layer.kernel_weight()) is struct
    layer.scales.data = layer.scales.data * 2
    assert native_library.prepared(layer.kernel_weight()) is not struct
    moved = layer.packed | {"scales": packed["scales"] * 2}
    assert not torch.equal(layer(x), y)
    assert torch.equal(layer(x), layer.linear(x, moved))
    # In the same place, but read in another order: copied at each call.
    square = DenseFormat().pack(torch.randn(64, 64))
    layer = FrozenLinear(64, 64, DenseFormat(), square)
    y = layer(x)
    layer.weight.data = layer.weight.data.T
    torch.testing.assert_close(layer(x), x @ square["weight"])
    square["weight"].zero_()
    assert not torch.equal(layer(x), y) and not layer(x).any()


def test_copies_of_a_layer_have_weights_of_their_own() -> None:
    layer = FrozenLinear(64, 12, IntGroupFormat(), IntGroupFormat().pack(torch.randn(12, 64)))
    x = torch.randn(3, 64)
    y = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        layer.scales.data.fill_(1.0)
        assert copied.kernel_weight().tensors[2] is copied.scales
        assert torch.equal(copied(x), y)
        layer.scales.data.copy_(copied.scales)


def test_inputs_of_another_width_are_refused() -> None:
    weight, _ = packed_weight(IntGroupFormat(), (12, 64))
    A, B = torch.randn(2, 64), torch.randn(12, 2)
    for call in (
        lambda: native.linear(torch.randn(3, 63), weight),
        lambda: native.grad_input(torch.randn(3, 64), weight),
        lambda: native_low_rank.lora_linear(torch.randn(3, 63), weight, A, B, 1.0),
        lambda: native.int_group_grad_statistics(
            torch.randn(3, 12), torch.randn(3, 65), weight, None
        ),
    ):
        with pytest.raises(ValueError, match="is not the weight's"):
            call()
