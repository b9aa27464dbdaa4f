"""What the backward pass of each decoder layer recomputes, and what it keeps instead."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel

from graft.errors import GraftError

Checkpointing = Literal["none", "products", "layers"]
"""What a decoder layer keeps for its backward pass; it recomputes the rest.

none: everything. products: its input and the outputs of its products. layers: its input and the
outputs of the products that narrow theirs (in Llama: the MLP's last, grouped keys and values)."""

CHECKPOINTING: tuple[Checkpointing, ...] = get_args(Checkpointing)
"""From the quickest, which needs the most memory, to the slowest."""

_FIRST_FACTOR = {
    "mm": 0,
    "bmm": 0,
    "addmm": 1,
    "baddbmm": 1,
    "linear": 0,
    "mkldnn_linear": 0,
    "_linear_pointwise": 0,
    "_grouped_mm": 0,
}
"""Of the products among PyTorch's own operations: which argument's rows are multiplied."""

_CHEAP = 4
"""A product that sums over fewer than hidden size / 4 features (LoRA's second one) costs less time
than the memory that its output would take is worth."""


def enable_checkpointing(model: PreTrainedModel, checkpointing: Checkpointing) -> None:
    """Make the model recompute in its backward pass (while training) what the choice says.

    Gradients are those of 'none' bit for bit, with dropout too. Raises GraftError when the model
    has no layers that can be recomputed.
    """
    if checkpointing == "none":
        return
    check_checkpointing(model, checkpointing)
    hidden_size = model.get_input_embeddings().get_parameter("weight").shape[1]
    policy = partial(_policy, checkpointing, hidden_size)
    kwargs = {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, policy),
    }
    # The name changed within transformers 5; both mean the same.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(kwargs)
    # Else the embeddings would get a gradient that nobody asks for, through the first layer.
    model.disable_input_require_grads()


def check_checkpointing(
    model: PreTrainedModel, checkpointing: Checkpointing | Literal["auto"]
) -> None:
    """Raise GraftError when the model cannot recompute its layers and the choice asks for it."""
    if checkpointing in ("products", "layers") and not model.supports_gradient_checkpointing:
        raise GraftError(
            f"--checkpointing {checkpointing}: {type(model).__name__} cannot recompute its layers; "
            "use --checkpointing none, and a smaller --batch-size or --max-length"
        )


def keeps_product(
    checkpointing: Checkpointing, hidden_size: int, in_features: int, out_features: int
) -> bool:
    """Return whether a layer keeps the output of a product of [.., in] to [.., out] features."""
    if checkpointing == "none" or _CHEAP * in_features < hidden_size:
        return False
    return checkpointing == "products" or out_features < in_features


def keeps_attention(checkpointing: Checkpointing, width: int, length: int) -> bool:
    """Return whether a layer keeps the output of fused attention, `width` features over all heads.

    Each is a sum over `length` positions, as an output of a product is one over its in_features.
    """
    return checkpointing == "products" or (checkpointing == "layers" and width < length)


def _policy(
    checkpointing: Checkpointing,
    hidden_size: int,
    context: SelectiveCheckpointContext,
    op: Any,
    *args: Any,
    **kwargs: Any,
) -> CheckpointPolicy:
    """Return whether the output of an operation is kept; called once for each in the forward."""
    kind = _kind(op)
    keep = False
    if kind == "attention":
        query, key = args[:2]  # [batch, heads, length, head_dim]
        width = query.shape[1] * query.shape[3]
        # What is not run again draws no random numbers, and what follows it would draw others.
        drops_out = bool(_argument(op, args, kwargs, "dropout_p"))
        keep = not drops_out and keeps_attention(checkpointing, width, key.shape[2])
    elif kind is not None:
        outputs = [leaf for leaf in tree_leaves(context.op_output) if isinstance(leaf, Tensor)]
        out_features = sum(output.shape[-1] for output in outputs)
        keep = keeps_product(checkpointing, hidden_size, args[kind].shape[-1], out_features)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _kind(op: torch._ops.OpOverload) -> int | Literal["attention"] | None:
    """Return 'attention', or which argument of a product has its in_features last, or None."""
    namespace, _, name = op._schema.name.partition("::")
    if namespace == "aten" and name.startswith("_scaled_dot_product"):
        return "attention"
    if namespace == "graft":
        return "attention" if name == "attention" else 0 if "linear" in name else None
    return _FIRST_FACTOR.get(name)


def _argument(op: torch._ops.OpOverload, args: Any, kwargs: Any, name: str) -> Any:
    """Return an operation's argument by name, given or default; None when it has no such one."""
    for position, argument in enumerate(op._schema.arguments):
        if argument.name == name:
            given = args[position] if position < len(args) else argument.default_value
            return kwargs.get(name, given)
    return None
