"""What the kernels use of PyTorch that it does not promise: here alone, each with the reason.

An `Operation` is computed past the dispatcher, and past autograd where nothing trains. It has to
know for that whether anybody watches, which no public function of PyTorch says.
"""

from __future__ import annotations

import torch
from torch import Tensor

any_requires_grad = torch._C._any_requires_grad
"""Whether one of any arguments is a tensor that needs a gradient: all of them in one call of C,
where a loop in Python would take as long as the launch of a kernel."""

BelowAutograd = torch._C._AutoDispatchBelowAutograd
"""A context without autograd's own kernels. Inside of a node nothing is recorded anyway, and
`custom_op` calls its function so too; each of PyTorch's operations in it takes less time."""


def writes_to(tensor: Tensor) -> int:
    """Return how often a tensor was written in place; nothing public tells that it was at all."""
    return tensor._version


def nobody_watches() -> bool:
    """Return whether nobody but autograd sees what is called.

    Not a compiler or a trace, which want to find the operation in their graph; not a mode, as
    selective checkpointing and FakeTensor are; not a transform of torch.func, which has rules for
    what it knows.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._get_tracing_state() is None
    )
