"""What the tests of the Triton kernels share: where they run, and on which numbers.

The interpreter is chosen when triton is first imported, and other libraries import it too. So
without a GPU these tests run in a process of their own, which `test_the_kernels_in_the_interpreter`
starts with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graft.formats.codebook import CodebookFormat
from graft.kernels.backend import triton_launch
from graft.kernels.packed.weight import Weight

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


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def codebook(shape: tuple[int, int], name: str, double: bool) -> Weight:
    """A random weight."""
    weight_format = CodebookFormat(name=name, double_quant=double)
    return weight_format.kernel_weight(weight_format.pack(randn(*shape)), *shape)


def assert_is_product(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y = a b up to float32 sums in any order and one rounding to y's dtype."""
    a, b = a.double(), b.double()
    bound = a.shape[-1] * 2.0**-24 * (a.abs() @ b.abs())
    kind, exact = torch.finfo(y.dtype), a @ b
    bound += kind.eps * exact.abs().clamp(min=kind.smallest_normal)
    assert ((y - exact).abs() <= bound).all()
