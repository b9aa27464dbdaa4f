"""Products of integers with inputs rounded to 8 bits, against float64, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from graft.formats.base import WeightFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.kernels.backend import native_library
from graft.kernels.packed.weight import Weight, weight_of
from graft.kernels.rounded import native, reference
from graft.kernels.rounded.ops import rounded_inputs, rounded_linear

needs_library = pytest.mark.skipif(
    native_library.why_unavailable() is not None,
    reason=f"native backend: {native_library.why_unavailable()}",
)
FORMATS: dict[str, WeightFormat] = {
    **{
        f"int{bits}/{group}": IntGroupFormat(bits=bits, group_size=group)
        for bits in (2, 3, 4, 8)
        for group in (32, 128)
    },
    "int4/64/float32": IntGroupFormat(bits=4, group_size=64, statistics="float32"),
    "int8 rows": Int8Format(),
}
SHAPES = ((70, 200, 17), (129, 608, 6), (1, 32, 1), (33, 96, 40))
"""Outputs, inputs and tokens: none of them whole tiles, pieces or groups."""


@pytest.fixture
def every_level() -> Iterator[list[int]]:
    library = native_library.library()
    yield [level for level in range(4) if library.graft_limit(level) == level]
    library.graft_limit(3)


def made(weight_format: WeightFormat, rows: int, columns: int) -> Weight:
    packed = weight_format.pack(torch.randn(rows, columns))
    return weight_format.kernel_weight(packed, rows, columns)


def expected(x: Tensor, weight: Weight, weight_format: WeightFormat, by_block: bool) -> Tensor:
    """Return the sum of scale d q . codes + offset t, block by block, in float64.

    t is d sum(q), in blocks of integers in groups (max |x| / 127) sum(q) as float16.
    """
    rows, columns = weight.layout.out_features, weight.layout.in_features
    scales = torch.zeros(rows, columns, dtype=torch.float64)
    offsets = torch.zeros(rows, columns, dtype=torch.float64)
    in_groups = isinstance(weight_format, IntGroupFormat)
    if in_groups:
        groups = torch.arange(columns) // weight_format.group_size
        scales, offsets = (t.double()[:, groups] for t in weight.statistics)
    else:
        stored = weight.tensors[1]
        assert stored is not None
        scales += stored.double()[:, None]
    dense = reference.linear(torch.eye(columns), weight).double().T
    codes = ((dense - offsets) / scales).round()
    out = torch.zeros(len(x), rows, dtype=torch.float64)
    for token, row in enumerate(x.float()):
        for begin in range(0, columns, 32):
            some = slice(begin, begin + 32)
            most = row[some].abs().max() if by_block else row.abs().max()
            q = (row[some] * (127 / most if most > 0 else most)).round()
            step = most / 127
            d = step.half() if by_block else step
            total = d.double() * q.double().sum()
            if by_block and in_groups:
                total = (step * q.sum()).half()
            out[token] += (codes[:, some] * scales[:, some]) @ q.double() * d.double()
            out[token] += offsets[:, begin] * total.double()
    return out


@needs_library
@pytest.mark.parametrize("by_block", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_a_float64_loop_on_every_instruction_set(
    name: str, by_block: bool, every_level: list[int]
) -> None:
    for rows, columns, tokens in SHAPES:
        weight = made(FORMATS[name], rows, columns)
        x = torch.randn(tokens, columns)
        truth = expected(x, weight, FORMATS[name], by_block)
        bound = (
            x.norm(dim=-1, keepdim=True)
            @ reference.linear(torch.eye(columns), weight).T.norm(dim=-1, keepdim=True).T
        )
        for level in every_level:
            native_library.library().graft_limit(level)
            found = native.rounded_linear(x, weight, by_block)
            assert ((found - truth).abs() <= 2e-6 * bound).all()


@needs_library
def test_bfloat16_rounds_the_same_sums_once(every_level: list[int]) -> None:
    weight = made(FORMATS["int4/32"], 70, 200)
    x = torch.randn(17, 200).bfloat16()
    for level in every_level:
        native_library.library().graft_limit(level)
        for by_block in (True, False):
            wide = native.rounded_linear(x.float(), weight, by_block)
            assert torch.equal(native.rounded_linear(x, weight, by_block), wide.bfloat16())


@needs_library
def test_products_do_not_depend_on_threads_or_on_the_tokens_beside() -> None:
    weight, x = made(FORMATS["int4/32"], 150, 320), torch.randn(23, 320)
    threads = torch.get_num_threads()
    whole = native.rounded_linear(x, weight, True)
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(native.rounded_linear(x, weight, True), whole)
    finally:
        torch.set_num_threads(threads)
    for some in (slice(0, 1), slice(4, 9), slice(11, 23)):
        assert torch.equal(native.rounded_linear(x[some], weight, True), whole[some])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_block", [True, False])
def test_rounded_inputs_are_the_references_on_every_instruction_set(
    by_block: bool, dtype: torch.dtype, every_level: list[int]
) -> None:
    x = (torch.randn(5, 3, 77) * torch.logspace(-3, 3, 77)).to(dtype)
    x[1] = 0
    for level in every_level:
        native_library.library().graft_limit(level)
        found = native.rounded_inputs(x, by_block)
        assert torch.equal(found, reference.rounded_inputs(x, by_block))


@pytest.mark.parametrize("by_block", [True, False])
def test_a_number_that_is_not_finite_stays_to_be_seen(by_block: bool) -> None:
    weight = made(FORMATS["int4/32"], 40, 96)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(18, 96)
        x[7, 40] = bad
        for y in (
            rounded_linear(x, weight, by_block),
            reference.rounded_linear(x, weight, by_block),
        ):
            assert not y[7].isfinite().any()
            assert y[6].isfinite().all() and y[8].isfinite().all()


@needs_library
@pytest.mark.parametrize("by_block", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_computes_the_same_products(name: str, by_block: bool) -> None:
    weight, x = made(FORMATS[name], 70, 200), torch.randn(2, 5, 200)
    found, truth = (one.rounded_linear(x, weight, by_block) for one in (native, reference))
    torch.testing.assert_close(found, truth, rtol=0, atol=2e-5 * float(truth.abs().max()))


def test_gradients_of_products_are_those_of_what_is_met() -> None:
    weight = made(FORMATS["int4/32"], 40, 96)
    x = torch.randn(6, 96, requires_grad=True)
    codes, high, scales, offsets = weight.tensors
    assert scales is not None and offsets is not None
    moved = scales.float().requires_grad_(True), offsets.float().requires_grad_(True)
    trained = weight_of(weight.layout.text(), codes, high, *moved)
    grad = torch.randn(6, 40)
    rounded_linear(x, trained, True).backward(grad)
    met = reference.rounded_inputs(x.detach(), True)
    product = (grad.T @ met).unflatten(1, (-1, 32))
    dense = reference.linear(torch.eye(96), weight).T
    torch.testing.assert_close(x.grad, grad @ dense, rtol=0, atol=1e-4)
    torch.testing.assert_close(moved[1].grad, product.sum(-1), rtol=0, atol=1e-3)
    values = dense.unflatten(1, (-1, 32)) - offsets.float().unsqueeze(-1)
    expected_scales = (product * (values / scales.float().unsqueeze(-1)).round()).sum(-1)
    torch.testing.assert_close(moved[0].grad, expected_scales, rtol=0, atol=1e-2)


def test_the_gradient_passes_straight_through() -> None:
    x = torch.randn(3, 64, requires_grad=True)
    grad = torch.randn(3, 64)
    rounded_inputs(x, True).backward(grad)
    assert torch.equal(x.grad, grad)
