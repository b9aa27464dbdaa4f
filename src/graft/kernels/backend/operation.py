"""How operations are declared: to PyTorch's dispatcher, and to be called without it.

`torch.library.custom_op` makes an operation that can be traced, compiled and recomputed, but leads
every call through Python three times: 30 µs on the way forward, and more on the way back. A step of
a model of 22 layers makes a thousand calls, and a GPU waits for each of them. Where nobody watches
what is done, an `Operation` is a Python function, or a node of autograd, and takes 10 µs.

An operation may take a `Weight`. The dispatcher, which knows no such type, gets its tensors and its
layout as a word instead; everything that an operation declares is written for the `Weight`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor  # noqa: F401  (the operators' schemas are read from annotations)
from torch.library import custom_op

from graft.kernels.backend.torch_internals import (
    BelowAutograd,
    any_requires_grad,
    nobody_watches,
)
from graft.kernels.packed.weight import MOST_TENSORS, Weight, weight_of

Fake = Callable[..., Any]
Arguments = tuple[Any, ...]

_PLAIN = frozenset(
    (torch.Tensor, torch.nn.Parameter, torch.dtype, type(None), int, float, bool, str)
)
"""Other types of arguments (subclasses of tensors, symbolic sizes) belong to who watches."""

_OPTIONAL = "Tensor | None"
_PARTS = {
    "first": "Tensor",
    "second": _OPTIONAL,
    "third": _OPTIONAL,
    "fourth": _OPTIONAL,
    "layout": "str",
}
"""What stands for a weight in an operator's schema: its tensors, and its layout's word."""


class Operation:
    """An operation `graft::NAME` whose first argument is a tensor or a weight, called by position.

    What is declared of it (`register_fake`, `register_autograd`) gets the arguments that the
    function itself gets. A backward returns as many gradients; for a weight, None or the tuple of
    its four tensors' gradients. `ctx.needs_input_grad` counts the weight as its parts.
    """

    def __init__(self, compute: Callable[..., Any]) -> None:
        self.name = compute.__name__
        self.__doc__ = compute.__doc__
        self._compute = compute
        signature = inspect.signature(compute)
        parameters = tuple(signature.parameters.values())
        self._weight_at = _weight_at(parameters)
        self.registered = custom_op(
            f"graft::{self.name}", self._as_operator(compute, signature), mutates_args=()
        )
        """What the dispatcher knows."""
        defaults = (parameter.default for parameter in parameters)
        self._defaults = tuple(one for one in defaults if one is not inspect.Parameter.empty)
        self._required = len(parameters) - len(self._defaults)
        self._node: type[torch.autograd.Function] | None = None

    def register_fake(self, fake: Fake) -> Fake:
        """Declare what the results look like, as `custom_op` does."""
        self.registered.register_fake(self._as_operator(fake))
        return fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """Declare the gradient, as `custom_op` does."""

        def set_up(ctx: Any, inputs: Arguments, output: Any) -> None:
            setup_context(ctx, self._gathered(inputs), output)

        def flat_backward(ctx: Any, *grads: Any) -> Arguments:
            gradients: Arguments = self._spread_gradients(backward(ctx, *grads))
            return gradients

        self.registered.register_autograd(flat_backward, setup_context=set_up)

        def forward(ctx: Any, *arguments: Any) -> Any:
            inputs = self._gathered(arguments)
            with BelowAutograd():
                output = self._compute(*inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(flat_backward)}
        self._node = type(self.name, (torch.autograd.Function,), methods)

    def __call__(self, *arguments: Any) -> Any:
        """Compute, and note what the gradient needs where one will be asked for."""
        at = self._weight_at
        if at is None:
            tensors = arguments
        elif len(arguments) <= at:
            return self._compute(*arguments)  # which says what is missing
        else:
            tensors = (*arguments[:at], *arguments[at].tensors, *arguments[at + 1 :])
        if not _unwatched(tensors):
            return self.registered(*self._spread(arguments, as_word=True))
        if not (torch.is_grad_enabled() and any_requires_grad(*tensors)):
            return self._compute(*arguments)
        if self._node is None:
            # The dispatcher says so when a gradient is asked for.
            return self.registered(*self._spread(arguments, as_word=True))
        given = max(0, len(arguments) - self._required)
        return self._node.apply(*self._spread(arguments), *self._defaults[given:])

    # A weight and its parts ----------------------------------------------------------------------

    def _as_operator(
        self, function: Callable[..., Any], signature: inspect.Signature | None = None
    ) -> Callable[..., Any]:
        """Return a function of a weight's parts for one of the weight."""
        at = self._weight_at
        if at is None:
            return function

        def operator(*arguments: Any) -> Any:
            return function(*self._gathered(arguments))

        if signature is not None:
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            parts = [inspect.Parameter(n, kind, annotation=t) for n, t in _PARTS.items()]
            others = list(signature.parameters.values())
            parameters = [*others[:at], *parts, *others[at + 1 :]]
            operator.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
            operator.__name__ = operator.__qualname__ = self.name
        return operator

    def _spread(self, arguments: Arguments, as_word: bool = False) -> Arguments:
        """Return the arguments with a weight's parts in its place.

        Its layout is a word, or the weight itself, with all that is known of it.
        """
        at = self._weight_at
        if at is None:
            return arguments
        weight: Weight = arguments[at]
        nothing = (None,) * (MOST_TENSORS - len(weight.tensors))
        layout = weight.layout.text() if as_word else weight
        return (*arguments[:at], *weight.tensors, *nothing, layout, *arguments[at + 1 :])

    def _gathered(self, arguments: Arguments) -> Arguments:
        """Return the arguments with a weight in place of its parts."""
        at = self._weight_at
        if at is None:
            return arguments
        layout = arguments[at + MOST_TENSORS]
        if isinstance(layout, Weight):
            weight = layout
        else:
            weight = weight_of(layout, *arguments[at : at + MOST_TENSORS])
        return (*arguments[:at], weight, *arguments[at + MOST_TENSORS + 1 :])

    def _spread_gradients(self, gradients: Any) -> Any:
        """Return gradients with those of a weight's parts in the place of the weight's."""
        at = self._weight_at
        if at is None:
            return gradients
        parts = gradients[at] or (None,) * MOST_TENSORS
        return (*gradients[:at], *parts, None, *gradients[at + 1 :])


def _weight_at(parameters: tuple[inspect.Parameter, ...]) -> int | None:
    """Return which parameter is a weight: one at most."""
    found = [at for at, one in enumerate(parameters) if one.annotation in ("Weight", Weight)]
    assert len(found) < 2
    return found[0] if found else None


def _unwatched(arguments: Arguments) -> bool:
    """Return whether nobody but autograd looks on: no tracing, no transform and no mode.

    The first argument is a tensor of PyTorch's own then, with numbers in it.
    """
    return (
        nobody_watches()
        and _PLAIN.issuperset(map(type, arguments))
        and arguments[0].device.type != "meta"
    )
