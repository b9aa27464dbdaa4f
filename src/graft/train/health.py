"""Checks that stop a run which has gone wrong, and say where."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from graft.errors import GraftError, raise_problems


class NotFiniteError(GraftError):
    """A loss or a gradient that is not finite."""

    def __init__(self, message: str, rows: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)
        """Where the rows of the batch, or of the step's batches, stand: 'file:line'."""


def check_gradients(parameters: Mapping[str, nn.Parameter], norm: float, step: int) -> None:
    """Raise NotFiniteError, or, in step 1, GraftError when something has no gradient.

    A low-rank A has gradient zero in step 1, since B is still zero; it must have one all the same.
    """
    if not math.isfinite(norm):
        bad = [
            name
            for name, parameter in parameters.items()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        raise NotFiniteError(
            f"step {step}: the gradient of {bad[0] if bad else 'the loss'} is not finite; lower "
            "--learning-rate, or compute with --dtype float32"
        )
    if step == 1:
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        missing = [name for name, parameter in trained.items() if parameter.grad is None]
        raise_problems([f"{name} gets no gradient" for name in missing[:20]], "step 1")
        if norm == 0.0:
            raise GraftError("step 1: every gradient is zero, so nothing would be trained")


def raise_not_finite(model: nn.Module, run: Callable[[], object], step: int) -> NoReturn:
    """Run the batch again and raise NotFiniteError with the first module at fault."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            for tensor in tensors:
                if isinstance(tensor, Tensor) and not bool(tensor.isfinite().all()):
                    found.append(name)

        return hook

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    where = f"the first output that is not finite is {found[0]}'s" if found else "the logits are"
    raise NotFiniteError(
        f"step {step}: the loss is not finite; {where}. Lower --learning-rate, or compute with "
        "--dtype float32; checkpoints written before are kept"
    )
