"""The native kernels on every instruction set that this processor has; operations both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from levels import LEVELS, using
from torch import Tensor
from torch.utils._pytree import tree_leaves

from graft.kernels.backend.operation import Operation
from graft.kernels.packed.weight import Weight


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, by name, that the library uses while a test runs."""
    with using(request.param):
        yield request.param


@pytest.fixture
def opcheck() -> Callable[..., None]:
    """Check an operation as PyTorch knows it, and that calling it directly changes no bit."""

    def check(operation: Operation, arguments: tuple[Any, ...], **options: Any) -> None:
        flat = _as_operator(arguments)
        torch.library.opcheck(operation.registered, flat, **options)
        for one, other in zip(
            _results(operation, arguments, flat),
            _results(operation.registered, flat, flat),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)

    return check


def _as_operator(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments as the dispatcher gets them: a weight as four tensors and a word."""
    flat: list[Any] = []
    for one in arguments:
        if isinstance(one, Weight):
            flat += [*one.tensors, None, None, None][:4] + [one.layout.text()]
        else:
            flat.append(one)
    return tuple(flat)


def _results(
    call: Callable[..., Any], arguments: tuple[Any, ...], flat: tuple[Any, ...]
) -> list[Any]:
    """Return the outputs of a call, and the gradients of their sum."""
    outputs = tree_leaves(call(*arguments))
    inputs = [a for a in flat if isinstance(a, Tensor) and a.requires_grad]
    roots = [one for one in outputs if one.requires_grad]
    if not inputs:
        assert not roots
        return outputs
    return outputs + list(torch.autograd.grad(roots[0].sum(), inputs, allow_unused=True))
