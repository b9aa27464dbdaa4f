"""What graft uses of PyTorch and Transformers beyond their public interfaces, and why.

Nothing else under graft.model does; a new version of either is checked against this one file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from graft.kernels.backend.torch_internals import writes_to

__all__ = [
    "OpOverload",
    "arguments_of",
    "attention_of",
    "converted_patterns",
    "copied",
    "forget_output",
    "ignored_patterns",
    "initialise",
    "name_of",
    "names_of_today",
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


def forget_output(forward: Any, place: int) -> None:
    """Let a layer's selective checkpoint keep the shape alone of the output that lies at a place.

    forward: the context of its forward pass. Who reads the output after all finds no numbers. A
    policy can only say that an output is kept or computed again, and this one is neither.
    """
    for kept in forward.storage.values():
        for wrapper in tree_leaves(list(kept.values())):
            output = getattr(wrapper, "val", None)
            if isinstance(output, Tensor) and output.data_ptr() == place:
                wrapper.val = output.new_tensor(torch.nan).expand(output.shape)
                wrapper.version = writes_to(wrapper.val)


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


def with_child(model: Model, name: str, child: nn.Module) -> Model:
    """Return a shallow copy of a model with another child, which the model itself does not get.

    A copy shares its dictionary of children with the model, and to set one would change both.
    """
    changed = copy.copy(model)
    changed._modules = {**model._modules, name: child}
    return changed


def copied(module: Model, parameters: bool) -> Model:
    """Return a shallow copy of a module whose parameters are its own to set.

    They are the module's, or, where `parameters` is false, None under the same names.
    """
    changed = copy.copy(module)
    names = module._parameters
    changed._parameters = dict(names) if parameters else dict.fromkeys(names)
    return changed


def names_of_today(
    model: PreTrainedModel, keys: Iterable[str], known: Collection[str]
) -> dict[str, str]:
    """Return what Transformers calls each key of a checkpoint while it loads a model.

    known: the model's own names. Which names a family had before is a list of Transformers' own,
    which only from_pretrained applies. Where tensors are merged while they are read (experts), the
    keys stay as they are.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    prefix = f"{model.base_model_prefix}."

    def placed(key: str) -> str:
        if key.startswith(prefix) and key.removeprefix(prefix) in known:
            return key.removeprefix(prefix)
        return prefix + key if prefix + key in known else key

    names = {}
    for key in sorted(keys):
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        name = placed(name)
        names[key] = placed(key) if name not in known and key in known else name
    return names


def converted_patterns(model: PreTrainedModel) -> list[str]:
    """Return expressions of the names of which Transformers makes others while it loads a model."""
    return [
        pattern.replace("*", ".*")
        for change in get_model_conversion_mapping(model, add_legacy=False)
        for pattern in change.source_patterns
    ]


def ignored_patterns(model: PreTrainedModel) -> list[str]:
    """Return expressions of the names that Transformers leaves out when it loads a model.

    What a family's old checkpoints hold and its model computes is known there alone.
    """
    found = list(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        found.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        found.append(r"(^|\.)position_ids$")
    return found
