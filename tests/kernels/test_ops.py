"""Schema, fake kernel and autograd registration of every operation, by torch's own checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graft.formats.codebook import BLOCK_SIZE, CodebookFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.kernels.backend.operation import Operation
from graft.kernels.frozen import ops, row_ops

OUT, IN = 6, 45  # a short last group, a straddling block, an odd count of codes


def int_case(bits: int, group_size: int, dtype: torch.dtype, statistics: str, trained: bool):
    def args(operation: str) -> tuple[Any, ...]:
        weight_format = IntGroupFormat(bits=bits, group_size=group_size, statistics=statistics)
        packed = weight_format.pack(torch.randn(OUT, IN))
        codes = packed["codes"], packed.get("codes_high")
        grid = packed["scales"], packed["offsets"]
        if trained:
            grid = tuple(tensor.float().requires_grad_() for tensor in grid)
        x = torch.randn(2, 3, IN, dtype=dtype)
        grad = torch.randn(2, 3, OUT, dtype=dtype)
        frozen = tuple(tensor.detach() for tensor in grid)
        return {
            "int_group_dequantize": (*codes, *frozen, bits, group_size, IN, dtype),
            "int_group_linear": (x.requires_grad_(), *codes, *grid, bits, group_size),
            "int_group_grad_input": (grad, *codes, *frozen, bits, group_size, IN),
            "int_group_grad_statistics": (
                *(grad, x.detach(), *codes, bits, group_size),
                frozen[0],
            ),
            "int_group_grad_offsets": (grad, x.detach(), group_size),
            "int_group_quantize": (
                torch.randn(OUT, IN, dtype=dtype),
                *(bits, group_size, getattr(torch, statistics), 2.0**-20),
            ),
        }[operation]

    return args


def codebook_case(name: str, dtype: torch.dtype, double_quant: bool):
    def args(operation: str) -> tuple[Any, ...]:
        weight = torch.randn(OUT, IN, dtype=dtype)
        packed = CodebookFormat(name=name, double_quant=double_quant).pack(weight)
        codes = packed["codes"], packed["absmax"], name, BLOCK_SIZE
        nested = packed.get("absmax_scale"), packed.get("absmax_offset")
        x = torch.randn(2, 3, IN, dtype=dtype, requires_grad=True)
        return {
            "codebook_quantize": (weight, name, BLOCK_SIZE),
            "codebook_quantize_absmax": (torch.rand(700), torch.rand(1)),
            "codebook_dequantize": (*codes, OUT, IN, dtype, *nested),
            "codebook_linear": (x, *codes, OUT, *nested),
            "codebook_grad_input": (torch.randn(2, 3, OUT, dtype=dtype), *codes, IN, *nested),
        }[operation]

    return args


def int8_case(dtype: torch.dtype):
    def args(operation: str) -> tuple[Any, ...]:
        packed = Int8Format().pack(torch.randn(OUT, IN))
        codes = packed["codes"], packed["scales"]
        x = torch.randn(2, 3, IN, dtype=dtype, requires_grad=True)
        grad = torch.randn(2, 3, OUT, dtype=dtype)
        return {"int8_linear": (x, *codes), "int8_grad_input": (grad, *codes)}[operation]

    return args


def dense_case(dtype: torch.dtype):
    def args(operation: str) -> tuple[Any, ...]:
        weight = torch.randn(OUT, IN, dtype=dtype)
        x = torch.randn(2, 3, IN, dtype=dtype, requires_grad=True)
        grad = torch.randn(2, 3, OUT, dtype=dtype)
        return {"dense_linear": (x, weight), "dense_grad_input": (grad, weight)}[operation]

    return args


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
    "int8rows": "int8_",
    "dense": "dense",
}
OPERATIONS = {
    name: value
    for module in (ops, row_ops)
    for name, value in vars(module).items()
    if isinstance(value, Operation)
}
PAIRS = [
    (operation, case)
    for operation in OPERATIONS
    for case in CASES
    if operation.startswith(PREFIX[case.split("-")[0]])
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
        made[repr(weight_format)] = (
            lambda x, f=weight_format, p=packed: f.linear(x, p, OUT),
            dense,
        )
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
