"""What the backward pass of each decoder layer recomputes, and what it keeps instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel

from graft.errors import GraftError
from graft.model.internals import OpOverload, arguments_of, forget_output, name_of, tree_leaves

Checkpointing = Literal["none", "products", "half", "layers"]
"""What a decoder layer keeps for its backward pass; it recomputes the rest.

none: everything. products: its input and the outputs of its products. half: of those, not every
second one that is at least twice as wide as its input (in Llama: the MLP's second). layers: its
input and the outputs of the products that narrow theirs (in Llama: grouped keys and values, and the
MLP's last). The layer's last product is not computed again either, and where it is only added to
the residual stream, as in Llama, its output is not kept: nothing reads it."""

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
    contexts = partial(_contexts, checkpointing, hidden_size)
    kwargs = {"use_reentrant": False, "context_fn": contexts}
    # The name changed within transformers 5; both mean the same.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(kwargs)
    # Else the embeddings would get a gradient that nobody asks for, through the first layer.
    model.disable_input_require_grads()


def check_checkpointing(
    model: PreTrainedModel, checkpointing: Checkpointing | Literal["auto"]
) -> None:
    """Raise GraftError when the model cannot recompute its layers and the choice asks for it."""
    if (
        checkpointing in ("products", "half", "layers")
        and not model.supports_gradient_checkpointing
    ):
        raise GraftError(
            f"--checkpointing {checkpointing}: {type(model).__name__} cannot recompute its layers; "
            "use --checkpointing none, and a smaller --batch-size or --max-length"
        )


def keeps_product(
    checkpointing: Checkpointing,
    hidden_size: int,
    in_features: int,
    out_features: int,
    wide_before: int = 0,
) -> bool:
    """Return whether a layer keeps the output of a product of [.., in] to [.., out] features.

    wide_before: linear layers before this one that `is_wide`.
    """
    if checkpointing == "none" or _CHEAP * in_features < hidden_size:
        return False
    if checkpointing == "half":
        return not is_wide(hidden_size, in_features, out_features) or wide_before % 2 == 0
    return checkpointing == "products" or out_features < in_features


def is_wide(hidden_size: int, in_features: int, out_features: int) -> bool:
    """Return whether a product's output is at least twice as wide as its input."""
    return _CHEAP * in_features >= hidden_size and out_features >= 2 * in_features


def keeps_attention(checkpointing: Checkpointing, width: int, length: int) -> bool:
    """Return whether a layer keeps the output of fused attention, `width` features over all heads.

    Each is a sum over `length` positions, as an output of a product is one over its in_features.
    """
    some = checkpointing in ("products", "half")
    return some or (checkpointing == "layers" and width < length)


def _contexts(checkpointing: Checkpointing, hidden_size: int) -> Any:
    """Return the contexts of one layer's forward pass and of its recomputation."""
    policy = _Policy(checkpointing, hidden_size)
    forward, recomputation = create_selective_checkpoint_contexts(policy)
    return _releasing(policy, forward), recomputation


@contextmanager
def _releasing(policy: _Policy, forward: AbstractContextManager[Any]) -> Iterator[None]:
    """Run a layer, and do not keep its last product's output where that was added and nothing else.

    A sum keeps none of its terms, and the recomputation ends with what the last product keeps.
    """
    with forward:
        yield
    if policy.last is not None and policy.added:
        forget_output(forward, policy.last)


class _Policy:
    """Says of each operation in one forward pass of a layer whether its output is kept."""

    def __init__(self, checkpointing: Checkpointing, hidden_size: int) -> None:
        self.checkpointing, self.hidden_size = checkpointing, hidden_size
        self.wide = {False: 0, True: 0}  # layers so far; some versions of torch ask once more
        self.last: int | None = None
        """Where the output of the last product lies, as long as nothing but sums follows."""
        self.added = False
        """Whether one of these sums took it."""

    def __call__(
        self, context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        kind = _kind(op)
        keep = False
        if kind == "attention":
            query, key = args[:2]  # [batch, heads, length, head_dim]
            width = query.shape[1] * query.shape[3]
            starts = _argument(op, args, kwargs, "starts")  # of packed rows
            length = key.shape[2] if starts is None else int(starts.diff().max())
            # What is not run again draws no random numbers, and what follows it would draw others.
            drops_out = bool(_argument(op, args, kwargs, "dropout_p"))
            keep = not drops_out and keeps_attention(self.checkpointing, width, length)
        elif kind is not None:
            shape = self.hidden_size, args[kind].shape[-1], _out_features(context, op, args)
            of_layer = not name_of(op).endswith("bmm")  # else of unfused attention
            wide = self.wide[context.is_recompute] if of_layer else 0
            keep = keeps_product(self.checkpointing, *shape, wide)
            self.wide[context.is_recompute] += of_layer and is_wide(*shape)
            if not context.is_recompute:
                self.last, self.added = _place(context) if keep else None, False
        elif not context.is_recompute and self.last is not None:
            if name_of(op) == "aten::add":
                self.added |= self.last in [_data_ptr(argument) for argument in args]
            elif name_of(op) not in ("aten::detach", "aten::view", "aten::_unsafe_view"):
                self.last = None
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class _Like(NamedTuple):
    """A tensor without its numbers."""

    shape: torch.Size
    dtype: torch.dtype

    def on_meta(self) -> Tensor:
        """Return it as a tensor of which only the shape is computed."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def _out_features(context: SelectiveCheckpointContext, op: Any, args: Any) -> int:
    """Return how many features a product's outputs have in all."""
    if hasattr(context, "op_output"):
        return _features(context.op_output)
    # torch 2.11 asks before it computes.
    alike = (_Like(arg.shape, arg.dtype) if isinstance(arg, Tensor) else arg for arg in args)
    return _features_of_shapes(op, *alike)


@cache
def _features_of_shapes(op: Any, *args: Any) -> int:
    without_data = (arg.on_meta() if isinstance(arg, _Like) else arg for arg in args)
    return _features(op(*without_data))


def _place(context: SelectiveCheckpointContext) -> int | None:
    """Return where a product's output lies; None where torch asks before there is one."""
    outputs = [one for one in tree_leaves(getattr(context, "op_output", None)) if one is not None]
    return max(outputs, key=Tensor.numel).data_ptr() if outputs else None


def _data_ptr(argument: object) -> int | None:
    return argument.data_ptr() if isinstance(argument, Tensor) else None


def _features(output: Any) -> int:
    return sum(leaf.shape[-1] for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


@cache
def _kind(op: OpOverload) -> int | Literal["attention"] | None:
    """Return 'attention', or which argument of a product has its in_features last, or None."""
    namespace, _, name = name_of(op).partition("::")
    if namespace == "aten" and name.startswith("_scaled_dot_product"):
        return "attention"
    if namespace == "graft":
        return "attention" if name == "attention" else 0 if "linear" in name else None
    return _FIRST_FACTOR.get(name)


def _argument(op: OpOverload, args: Any, kwargs: Any, name: str) -> Any:
    """Return an operation's argument by name, given or default; None when it has no such one."""
    for position, argument in enumerate(arguments_of(op)):
        if argument.name == name:
            given = args[position] if position < len(args) else argument.default_value
            return kwargs.get(name, given)
    return None
