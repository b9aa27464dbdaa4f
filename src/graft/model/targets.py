"""Which layers are quantised and adapted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.attach import replace_module
from graft.errors import raise_problems
from graft.formats.base import WeightFormat
from graft.formats.dense import DenseFormat
from graft.layers.frozen import FrozenLinear

_LINEAR = (nn.Linear, Conv1D, FrozenLinear, AdaptedLinear)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return every linear layer but the output head by name, in the model's order."""
    head = model.get_output_embeddings()
    inside = tuple(
        name + "." for name, module in model.named_modules() if isinstance(module, AdaptedLinear)
    )
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _LINEAR) and module is not head and not name.startswith(inside)
    }


def select_targets(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Return the names of the layers that the patterns choose, in the model's order.

    No pattern chooses every linear layer but the head. A pattern is a full name, a suffix of whole
    name parts ('q_proj', 'attn.c_attn'), or a regular expression that matches a full name.
    Raises GraftError when a pattern matches nothing, with the names that there are.
    """
    names = list(linear_layers(model))
    if not patterns:
        raise_problems([] if names else ["the model has no linear layers"], "targets")
        return names
    problems = []
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            matched = {name for name in names if _matches(pattern, name)}
        except re.error as error:
            problems.append(f"{pattern!r} is no valid regular expression: {error}")
            continue
        chosen |= matched
        if not matched:
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            problems.append(
                f"{pattern!r} matches none of the {len(names)} linear layers; they end in: {kinds} "
                f"(a full name is {names[0] if names else '-'})"
            )
    raise_problems(problems, "targets")
    return [name for name in names if name in chosen]


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith("." + pattern) or bool(re.fullmatch(pattern, name))


def linear_shape(module: nn.Module) -> tuple[int, int, bool]:
    """Return (in_features, out_features, transposed) of a linear layer."""
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return in_features, out_features, True
    if isinstance(module, FrozenLinear):
        return module.in_features, module.out_features, module.transposed
    assert isinstance(module, nn.Linear), type(module)
    return module.in_features, module.out_features, False


def freeze_layers(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Turn the named nn.Linear and Conv1D layers into frozen dense layers that share their data."""
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, (nn.Linear, Conv1D)):
            _, _, transposed = linear_shape(module)
            weight = module.weight.detach()
            weight = weight.T if transposed else weight
            dtype = str(weight.dtype).removeprefix("torch.")
            frozen = frozen_linear(module, DenseFormat(dtype), {"weight": weight}, module.bias)
            replace_module(model, name, frozen)


def frozen_linear(
    module: nn.Module,
    weight_format: WeightFormat,
    packed: dict[str, torch.Tensor],
    bias: torch.Tensor | None,
) -> FrozenLinear:
    """Return a frozen layer of the shape of `module`."""
    in_features, out_features, transposed = linear_shape(module)
    return FrozenLinear(in_features, out_features, weight_format, packed, bias, transposed)
