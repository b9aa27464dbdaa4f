"""Each Triton kernel against the reference on the same device, at sizes that models have.

Without a GPU they run in Triton's interpreter on the CPU (TRITON_INTERPRET=1), at small sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from graft.formats.base import WeightFormat
from graft.formats.codebook import CodebookFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.formats.latent import LatentFormat
from graft.kernels.backend.reference import reference
from graft.kernels.backend.triton_launch import triton
from graft.kernels.frozen import triton as frozen
from graft.kernels.packed.weight import Latent, Weight
from graft.kernels.pointwise import reference as plain

Check = tuple[str, str, tuple[Any, ...], float]
"""What is checked, the operation, its arguments, and what results may differ by, relatively."""

EXACT = 0.0
_ALONG = ", along the rows"


def failures(device: str, size: int, tokens: int, every: bool = True) -> list[str]:
    """Run the checks and print them; return those that failed. every: of all formats, not two."""
    failed = []
    torch.manual_seed(0)
    with torch.device(device):
        for name, operation, arguments, most in _checks(size, tokens, every):
            theirs = _results(reference.operations[operation], arguments)
            with mock.patch.object(frozen, "_VECTOR_TOKENS", int(name.endswith(_ALONG))):
                ours = _results(triton.operations[operation], arguments)
            errors = [_error(one, other) for one, other in zip(ours, theirs, strict=True)]
            sound = max(errors) <= most
            word = "ok  " if sound else "FAIL"
            print(f"{word} {name}: {max(errors):.2e}, at most {most:.0e}", flush=True)
            if not sound:
                failed.append(name)
    return failed


def _results(compute: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
    found = compute(*arguments)
    if found is None:  # what writes its results to its arguments
        found = [one.clone() for one in arguments[2:4]]
    return [one for one in tree_leaves(found) if isinstance(one, Tensor)]


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference over the largest number; inf where one alone is not finite."""
    a, b = ours.double(), theirs.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return torch.inf
    a, b = a[a.isfinite()], b[b.isfinite()]
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if len(a) else 0.0


def _weights(size: int, every: bool) -> Iterator[tuple[str, Weight]]:
    weight = torch.randn(size, size) * size**-0.5
    formats: list[WeightFormat] = [CodebookFormat(double_quant=True), IntGroupFormat(bits=4)]
    if every:
        formats += [CodebookFormat(name="fp4"), Int8Format()]
        formats += [IntGroupFormat(bits=bits) for bits in (2, 3, 8)]
    for one in formats:
        bits = f" {one.bits} bits" if isinstance(one, IntGroupFormat) else ""
        yield f"{one.name}{bits}", one.kernel_weight(one.pack(weight), size, size)


def _checks(size: int, tokens: int, every: bool) -> Iterator[Check]:
    bf16 = torch.bfloat16
    rounding = 4 * torch.finfo(bf16).eps

    def x(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
        return torch.randn(shape).to(dtype)

    A, B = torch.randn(16, size) * size**-0.5, torch.randn(size, 16)
    for name, weight in _weights(size, every):
        yield f"dequantize {name}", "dequantize", (weight, bf16), EXACT
        for count in (1, 16, tokens):
            yield f"linear {name}, {count} tokens", "linear", (x(count, size), weight), rounding
        yield f"linear {name}, 1 token{_ALONG}", "linear", (x(1, size), weight), rounding
        given = x(tokens, size), weight
        yield f"grad_input {name}", "grad_input", given, rounding
        yield f"lora_linear {name}", "lora_linear", (*given, A, B, 0.5), rounding
        yield f"lora_grad_input {name}", "lora_grad_input", (*given, A, B, 0.5), rounding
    groups = size // 32
    int4 = IntGroupFormat(bits=4)
    weight = int4.kernel_weight(int4.pack(torch.randn(size, size)), size, size)
    both = x(tokens, size), x(tokens, size), weight, None
    yield "int_group_grad_statistics", "int_group_grad_statistics", both, rounding
    yield "token_product", "token_product", both[:2], rounding
    scales, offsets = weight.statistics
    factors = torch.randn(16, groups), torch.randn(size, 16), 0.7
    yield "move_offsets", "move_offsets", (offsets, *factors, torch.float16), EXACT
    u = torch.randn(16, groups) * 1e-2, torch.randn(size, 16)
    yield "move_by_factors", "move_by_factors", (scales, offsets, *factors, *u), EXACT
    moves = scales, scales, torch.randn(size, groups), torch.float16
    yield "move_scaled", "move_scaled", moves, EXACT
    row, gain = x(tokens, size), x(size)
    scale = plain.rms_norm(row, gain, 1e-5)[1]
    yield "rms_norm", "rms_norm", (row, gain, 1e-5), rounding
    backward = x(tokens, size), row, gain, scale
    yield "rms_norm_backward", "rms_norm_backward", backward, rounding
    three = x(tokens, size), x(tokens, size), x(tokens, size)
    yield "silu_gate", "silu_gate", three[:2], rounding
    yield "silu_gate_backward", "silu_gate_backward", three, rounding
    q, k = (x(2, tokens, heads, 64).transpose(1, 2) for heads in (size // 64, 1))
    cos_and_sin = x(1, tokens, 64), x(1, tokens, 64)
    for back in (False, True):
        yield f"rotary, back {back}", "rotary", (q, k, *cos_and_sin, back), EXACT
    logits, targets = 4 * x(tokens, 2 * size + 7), torch.randint(2 * size, (tokens,))
    targets[::3] = -100
    written = torch.empty(tokens), torch.empty_like(logits)
    yield "cross_entropy", "cross_entropy", (logits, targets, *written, True), rounding
    latent = LatentFormat(int4).pack(torch.randn(size, size))
    grid = latent["weight"], latent["scales"], latent["offsets"]
    rounded = Latent(*grid, A, B, 0.5, 4, 32)
    yield "latent_codes", "latent_codes", (rounded,), EXACT
    yield "latent_grads", "latent_grads", (torch.randn(size, size), rounded), 1e-4
    codes = torch.randn(size, size)
    yield "codebook_quantize", "codebook_quantize", (codes, "nf4", 64), EXACT
