"""How operations are declared: to PyTorch's dispatcher, and to be called without it.

`torch.library.custom_op` makes an operation that can be traced, compiled and recomputed, but leads
every call through Python three times: 30 µs on the way forward, and more on the way back. A step of
a model of 22 layers makes a thousand calls, and a GPU waits for each of them. Where nobody watches
what is done, an `Operation` is a Python function, or a node of autograd, and takes 10 µs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.library import custom_op

Fake = Callable[..., Any]
_PLAIN = frozenset(
    (torch.Tensor, torch.nn.Parameter, torch.dtype, type(None), int, float, bool, str)
)
"""Other types of arguments (subclasses of tensors, symbolic sizes) belong to who watches."""


class Operation:
    """An operation `graft::NAME` whose first argument is a tensor, called by position."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        self.name = compute.__name__
        self.__doc__ = compute.__doc__
        self.registered = custom_op(f"graft::{self.name}", compute, mutates_args=())
        """What the dispatcher knows."""
        self._compute = compute
        parameters = inspect.signature(compute).parameters.values()
        defaults = (parameter.default for parameter in parameters)
        self._defaults = tuple(one for one in defaults if one is not inspect.Parameter.empty)
        self._required = len(parameters) - len(self._defaults)
        self._node: type[torch.autograd.Function] | None = None

    def register_fake(self, fake: Fake) -> Fake:
        """Declare what the results look like, as `custom_op` does."""
        self.registered.register_fake(fake)
        return fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """Declare the gradient, as `custom_op` does."""
        self.registered.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = self._compute(*arguments)
            setup_context(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._node = type(self.name, (torch.autograd.Function,), methods)

    def __call__(self, *arguments: Any) -> Any:
        """Compute, and note what the gradient needs where one will be asked for."""
        if not _unwatched(arguments):
            return self.registered(*arguments)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return self._compute(*arguments)
        if self._node is None:
            # The dispatcher says so when a gradient is asked for.
            return self.registered(*arguments)
        given = max(0, len(arguments) - self._required)
        return self._node.apply(*arguments, *self._defaults[given:])


def _unwatched(arguments: tuple[Any, ...]) -> bool:
    """Return whether nobody but autograd looks on: no tracing, no transform and no mode.

    The first argument is a tensor of PyTorch's own then, with numbers in it.
    """
    return (
        not torch.compiler.is_compiling()
        and _PLAIN.issuperset(map(type, arguments))
        and arguments[0].device.type != "meta"
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._get_tracing_state() is None
    )
