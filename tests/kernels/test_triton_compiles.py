"""The Triton backend without running a kernel: when it is there, and that every launch compiles."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graft.formats.codebook import BLOCK_SIZE, CodebookFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.kernels.backend import triton_launch
from graft.kernels.backend.reference import reference
from graft.kernels.backend.registry import backends
from graft.kernels.frozen import triton as backend
from graft.kernels.latent import triton as triton_latent
from graft.kernels.moves import triton as triton_moves
from graft.kernels.packed.weight import Latent, Weight
from graft.kernels.pointwise import triton as triton_pointwise

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def int_group(bits: int, group_size: int) -> Weight:
    """A random weight [4, 64]."""
    weight_format = IntGroupFormat(bits=bits, group_size=group_size)
    return weight_format.kernel_weight(weight_format.pack(torch.randn(4, 64)), 4, 64)


def test_it_stands_before_the_reference_on_cuda_alone() -> None:
    names = [known.name for known in backends()]
    assert names.index("triton") < names.index("reference")
    assert triton_launch.triton.device_types == {"cuda"}
    assert set(triton_launch.triton.operations) <= set(reference.operations)


def test_it_says_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    why, cuda = triton_launch._why_unavailable.__wrapped__, torch.cuda
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why() == "triton is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in why()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    assert why() == "no CUDA device"
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_device_capability", lambda device: (9 - 2 * device, 5))
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    assert why() == "needs compute capability 8.0, a GPU here has 7.5"
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    assert why() is None


def test_importing_it_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from graft.kernels.backend import triton_launch\n"
        "from graft.kernels.frozen import ops\n"
        "assert triton_launch._why_unavailable() == 'triton is not installed'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("block_size", [0, 1, 48])
def test_block_sizes_are_powers_of_two(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size is {block_size}"):
        backend.codebook_quantize(torch.randn(96), "nf4", block_size)


KINDS = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "uint8": "u8",
    "int8": "i8",
    "int64": "i64",
}
POINTERS = {getattr(torch, name): f"*{short}" for name, short in KINDS.items()}


class CompiledInstead:
    """A kernel that is compiled to machine code, which takes no GPU, where it would be launched."""

    def __init__(self, function: Any, binaries: dict[str, Any]) -> None:
        self.function, self.binaries = function, binaries

    def __getitem__(self, grid: tuple[int, ...]) -> CompiledInstead:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names, signature, constants = self.function.arg_names, {}, {}
        values = dict(zip(names, arguments, strict=False))
        values |= {name: options.pop(name) for name in names if name in options}
        for name, value in values.items():
            scalar = "fp32" if isinstance(value, float) else "i32"
            signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else scalar
            if name.isupper() or value is None:
                signature[name], constants[name] = "constexpr", value
        source = ASTSource(self.function, signature, constexprs=constants)
        binary = compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        self.binaries[self.function.__name__] = binary.asm


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton; pip install 'graft-llm[test]'"
)
def test_every_launch_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    binaries: dict[str, Any] = {}
    kernels = vars(triton_launch._kernels()).items()
    compiled = {name: CompiledInstead(function, binaries) for name, function in kernels}
    monkeypatch.setattr(triton_launch, "_kernels", lambda: SimpleNamespace(**compiled))
    weight, dtype = int_group(3, 8), torch.bfloat16
    scales, offsets = weight.statistics
    x, grad = torch.randn(2, 64, dtype=dtype), torch.randn(2, 4, dtype=dtype)
    nested = CodebookFormat(double_quant=True)
    nf4 = nested.kernel_weight(nested.pack(torch.randn(2, 64)), 2, 64)
    backend.codebook_quantize(x, "nf4", BLOCK_SIZE)
    int8 = Int8Format().kernel_weight(Int8Format().pack(torch.randn(4, 64)), 4, 64)
    for packed in (nf4, weight, int8):
        backend.dequantize(packed, dtype)
        backend.linear(x, packed)
    backend.int_group_grad_statistics(grad, x, weight, None)
    triton_moves.move_offsets(offsets, torch.randn(4, 8), torch.randn(4, 4), 0.7, torch.float16)
    triton_moves.move_scaled(scales, scales, torch.randn(4, 8), torch.float16)
    factors = torch.randn(4, 8), torch.randn(4, 4), 0.7, torch.randn(3, 8), torch.randn(4, 3)
    triton_moves.move_by_factors(scales, offsets, *factors)
    norm = triton_pointwise.rms_norm(x, torch.ones(64, dtype=dtype), 1e-5)
    triton_pointwise.rms_norm_backward(x, x, torch.ones(64, dtype=dtype), norm[1])
    triton_pointwise.silu_gate_backward(grad, grad, triton_pointwise.silu_gate(grad, grad))
    q, k = torch.randn(1, 4, 2, 16, dtype=dtype), torch.randn(1, 1, 2, 16, dtype=dtype)
    cos_and_sin = torch.randn(2, 1, 2, 16, dtype=dtype).unbind()
    triton_pointwise.rotary(q, k, *cos_and_sin, False)
    assert "fma.rn.f32" not in binaries["rotary"]["ptx"]
    triton_pointwise.rotary(q, k, *cos_and_sin, True)
    for gradient in (torch.empty_like(x), None):
        targets, losses = torch.zeros(2, dtype=torch.long), torch.empty(2)
        triton_pointwise.cross_entropy(x, targets, losses, gradient, True)
    update = torch.ones(3, 64), torch.ones(4, 3)
    for bits, pair in ((8, (None, None)), (2, update), (3, update), (4, update)):
        grid = torch.randn(4, 64, dtype=dtype), *int_group(bits, 32).statistics
        triton_latent.latent_codes(Latent(*grid, *pair, 0.7, bits, 32))
        triton_latent.latent_grads(torch.randn(4, 64), Latent(*grid, *pair, 0.7, bits, 32))
    # Once from float64 to float16, with a scaling that is no float32.
    assert "cvt.rn.f16.f64" in binaries["move_scaled"]["ptx"]
    for name in ("move_offsets", "move_by_factors"):
        assert "0d3FE6666666666666" in binaries[name]["ptx"]
    assert len(binaries) == 19 and all(asm["cubin"] for asm in binaries.values())
    # The fused products' tiles depend on the width and on x's dtype, and not every tile compiles.
    for bits, kind in itertools.product((2, 3, 4, 8), DTYPES):
        packed_int = int_group(bits, 32)
        backend.linear(x.to(kind), packed_int)
        backend.dequantize(packed_int, kind)
        backend.int_group_grad_statistics(grad.to(kind), x.to(kind), packed_int, None)
        units = torch.randn(4, 2)
        backend.int_group_grad_statistics(grad.to(kind), x.to(kind), packed_int, units)
    for kind in DTYPES:
        backend.linear(x.to(kind), nf4)
        backend.linear(x.to(kind), int8)
    monkeypatch.setattr(backend, "_VECTOR_TOKENS", 1)
    for kind in DTYPES:
        for packed_one in (nf4, *(int_group(bits, 32) for bits in (2, 3, 4, 8))):
            backend.linear(x[:1].to(kind), packed_one)
    # Contracting a product and an addition would round once where the reference rounds twice.
    exact = [
        name for name in binaries if any(word in name for word in ("dequant", "move", "latent"))
    ]
    assert len(exact) == 8 and not any("fma." in binaries[name]["ptx"] for name in exact)
