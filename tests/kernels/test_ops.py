"""Schema, fake kernel and autograd registration of every operation, by torch's own checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graft.formats.base import WeightFormat
from graft.formats.codebook import BLOCK_SIZE, CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.kernels.backend.operation import Operation
from graft.kernels.frozen import ops
from graft.kernels.packed.weight import Weight

OUT, IN = 6, 45  # a short last group, a straddling block, an odd count of codes


def weight_of(weight_format: WeightFormat) -> Weight:
    return weight_format.kernel_weight(weight_format.pack(torch.randn(OUT, IN)), OUT, IN)


def any_case(weight: Weight, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    x = torch.randn(2, 3, IN, dtype=dtype)
    grad = torch.randn(2, 3, OUT, dtype=dtype)
    frozen = Weight(weight.layout, tuple(None if t is None else t.detach() for t in weight.tensors))
    return {
        "dequantize": (frozen, dtype),
        "linear": (x.requires_grad_(), weight),
        "grad_input": (grad, frozen),
    }


def int_case(bits: int, group_size: int, dtype: torch.dtype, statistics: str, trained: bool):
    def args(operation: str) -> tuple[Any, ...]:
        weight = frozen = weight_of(IntGroupFormat(bits, group_size, statistics))
        if trained:
            grid = [tensor.float().requires_grad_() for tensor in weight.statistics]
            weight, frozen = weight.moved(*grid), weight.moved(*(one.detach() for one in grid))
        x, grad = torch.randn(2, 3, IN, dtype=dtype), torch.randn(2, 3, OUT, dtype=dtype)
        return {
            **any_case(weight, dtype),
            "int_group_grad_statistics": (grad, x, frozen, frozen.statistics[0]),
            "int_group_grad_offsets": (grad, x, group_size),
            "int_group_quantize": (
                torch.randn(OUT, IN, dtype=dtype),
                *(bits, group_size, getattr(torch, statistics), 2.0**-20),
            ),
        }[operation]

    return args


def codebook_case(name: str, dtype: torch.dtype, double_quant: bool):
    def args(operation: str) -> tuple[Any, ...]:
        return {
            **any_case(weight_of(CodebookFormat(name, double_quant)), dtype),
            "codebook_quantize": (torch.randn(OUT, IN, dtype=dtype), name, BLOCK_SIZE),
            "codebook_quantize_absmax": (torch.rand(700), torch.rand(1)),
        }[operation]

    return args


def int8_case(dtype: torch.dtype):
    return lambda operation: any_case(weight_of(Int8Format()), dtype)[operation]


def dense_case(dtype: torch.dtype):
    weight_format = DenseFormat(str(dtype).removeprefix("torch."))
    return lambda operation: any_case(weight_of(weight_format), dtype)[operation]


CASES: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "int4-bf16-frozen": int_case(4, 8, torch.bfloat16, "float16", False),
    "int3-fp32-trained": int_case(3, 32, torch.float32, "float16", True),
    "int8-fp32-statistics": int_case(8, 128, torch.float32, "float32", False),
    "nf4-fp32": codebook_case("nf4", torch.float32, True),
    "fp4-bf16": codebook_case("fp4", torch.bfloat16, False),
    "dense-fp32": dense_case(torch.float32),
    "dense-bf16": dense_case(torch.bfloat16),
    "int8rows-fp32": int8_case(torch.float32),
    "int8rows-bf16": int8_case(torch.bfloat16),
}
PREFIX = {"int3": "int_group", "int4": "int_group", "int8": "int_group"} | {
    "nf4": "codebook",
    "fp4": "codebook",
}
ANY = ("dequantize", "linear", "grad_input")
OPERATIONS = {name: value for name, value in vars(ops).items() if isinstance(value, Operation)}
PAIRS = [
    (operation, case)
    for operation in OPERATIONS
    for case in CASES
    if operation in ANY or operation.startswith(PREFIX.get(case.split("-")[0], "no other"))
]


@pytest.mark.parametrize(("operation", "case"), PAIRS)
def test_opcheck(opcheck: Callable[..., None], operation: str, case: str) -> None:
    opcheck(OPERATIONS[operation], CASES[case](operation))


def test_every_operation_has_a_case() -> None:
    assert {operation for operation, _ in PAIRS} == set(OPERATIONS)


def linear_operations() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Each linear operation as a function of x, with its dense weight in float64."""
    weight = torch.randn(OUT, IN)
    made = {}
    for weight_format in (
        IntGroupFormat(bits=2, group_size=8),
        IntGroupFormat(bits=3, group_size=32),
        IntGroupFormat(bits=4, group_size=16, statistics="float32"),
        IntGroupFormat(bits=8, group_size=128),
        CodebookFormat(),
        CodebookFormat(name="fp4", double_quant=True),
        Int8Format(),
    ):
        packed = weight_format.pack(weight)
        dense = weight_format.unpack(packed, OUT, IN, torch.float32).double()
        packed_weight = weight_format.kernel_weight(packed, OUT, IN)
        made[repr(weight_format)] = (lambda x, w=packed_weight: ops.linear(x, w), dense)
    return made


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (0, IN), (2, 3, IN), (2, 1, 4, IN)])
def test_outputs_and_input_gradients_equal_float64(shape: tuple[int, ...]) -> None:
    for linear, dense in linear_operations().values():
        x = torch.randn(shape, requires_grad=True)
        y = linear(x)
        grad = torch.randn_like(y)
        y.backward(grad)
        torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad.double(), grad.double() @ dense, rtol=1e-5, atol=1e-5)


def test_non_contiguous_inputs_and_gradients() -> None:
    for linear, dense in linear_operations().values():
        x = torch.randn(3, IN, 2).transpose(1, 2).requires_grad_()
        y = linear(x)
        y.sum().backward()  # an expanded gradient of stride 0
        torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=1e-5, atol=1e-5)
        expected = dense.sum(0).expand_as(x)
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_keep_their_dtype(dtype: torch.dtype) -> None:
    for linear, dense in linear_operations().values():
        x = torch.randn(4, IN).to(dtype).requires_grad_()
        y = linear(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == dtype
        expected = x.detach().double() @ dense.to(dtype).double().T
        torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.05)
