"""What graft uses of PyTorch and Transformers beyond their public interfaces, and why.

Nothing else under graft.model does; a new version of either is checked against this one file.
"""

from __future__ import annotations

import copy
import re
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

__all__ = [
    "OpOverload",
    "arguments_of",
    "attention_of",
    "initialise",
    "name_of",
    "stays_float32",
    "tree_leaves",
    "with_child",
    "writes_to",
]
# OpOverload is what a checkpointing policy is called with, and has no public name. tree_leaves
# finds the tensors in whatever an operation returns.

Model = TypeVar("Model", bound=nn.Module)


def name_of(op: OpOverload) -> str:
    """Return an operation's name, as 'aten::mm', without that of its overload.

    The public name has both, joined by a dot, which a name may hold itself.
    """
    return str(op._schema.name)


def arguments_of(op: OpOverload) -> list[Any]:
    """Return an operation's arguments in order, each with `name` and `default_value`.

    A policy gets positional and named ones, and there is no other list of what they are called.
    """
    return list(op._schema.arguments)


def attention_of(model: PreTrainedModel) -> str | None:
    """Return the name of a model's attention, for which there is a public setter alone."""
    return model.config._attn_implementation


def initialise(model: PreTrainedModel) -> None:
    """Compute every tensor of a model as Transformers does when a file does not hold it.

    Each module is marked once that is done, and a model that was built is marked as a whole.
    """
    for module in model.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    model.initialize_weights()


def stays_float32(model: PreTrainedModel, name: str, dtype: torch.dtype) -> bool:
    """Return whether a model that computes in `dtype` has this tensor in float32 nevertheless.

    The biases by which some models choose experts are so, where rounding would change the choice.
    """
    kept: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in kept)


def writes_to(tensor: Tensor) -> int:
    """Return how often a tensor was written in place; nothing public tells that it was at all."""
    return tensor._version


def with_child(model: Model, name: str, child: nn.Module) -> Model:
    """Return a shallow copy of a model with another child, which the model itself does not get.

    A copy shares its dictionary of children with the model, and to set one would change both.
    """
    changed = copy.copy(model)
    changed._modules = {**model._modules, name: child}
    return changed
