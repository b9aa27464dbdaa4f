"""The loss, computed by one function for training and for evaluation, in chunks of tokens."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from graft.data.batches import IGNORED
from graft.errors import GraftError
from graft.kernels.backend.registry import implementation
from graft.model.internals import with_child
from graft.model.running.modes import evaluating
from graft.model.running.packing import packed, unmasked

CHUNK_BYTES = 32 * 2**20
"""Of a chunk's logits in float32, as long as the chunk has between 128 and 512 tokens, and on a CPU
of the copy of their gradient that the head's product takes."""

BLOCK_LOGITS = 2**18
"""Logits whose softmax a CPU computes at once: small enough to stay in the core's own cache."""

_found_to_split: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What `splits` found out about each model."""


def target_loss(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, int]:
    """Return (sum of -log p over the targets in nats, number of targets).

    input_ids, labels: int64 [batch, length]; labels[b, t] is the token that position t - 1 must
    predict, or -100 where nothing is asked. Rows are padded on the right, which a causal model does
    not see, so there is no attention mask. Softmax is in float32, over the targets' rows only.

    starts: int32 [rows + 1] where the batch is packed rows, of which each token 0 is no target; see
    `graft.model.running.packing`.

    The logits are computed chunk by chunk, each together with its gradient, so that there are never
    more of them than a chunk has. A model whose logits are no function of each position's last
    hidden state is run as a whole.
    """
    asked = functional.pad(labels[:, 1:] != IGNORED, (0, 1))
    targets = labels.roll(-1, dims=1)[asked]
    layout = {} if starts is None else packed(starts.cpu(), input_ids.device)
    if splits(model, input_ids):
        (output,), _ = run_body(model, input_ids, torch.zeros_like(input_ids[0, :1]), layout)
        loss = _chunked_loss(Head(model, output), output["last_hidden_state"], asked, targets)
    else:
        logits = whole_logits(model, input_ids, asked, layout).float()
        loss = functional.cross_entropy(logits, targets, reduction="sum")
    return loss, targets.numel()


def fixed_loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Return `target_loss`'s sum by operations that depend on the shape of the batch alone.

    Nothing waits for a GPU and nothing is asked of the numbers, so that a graph can be recorded of
    it. The model must have our attention, without a window. Raises GraftError where the model's
    logits are no function of each position's last hidden state.
    """
    if not splits(model, input_ids):
        raise GraftError(
            f"--cuda-graphs: the logits of {type(model).__name__} depend on more than each "
            "position's last hidden state; train without --cuda-graphs"
        )
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    (output,), _ = run_body(
        model, input_ids, torch.zeros_like(input_ids[0, :1]), unmasked(input_ids)
    )
    head, hidden = Head(model, output), output["last_hidden_state"].flatten(0, 1)
    loss: Tensor = _ChunkedLoss.apply(hidden, None, targets, head, *head.trained())
    return loss


@torch.no_grad()
def each_logits(model: PreTrainedModel, input_ids: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits [positions, vocabulary] of a chunk of positions, without gradients.

    input_ids: int64 [batch, length], padded on the right. Each slice says which positions of the
    flattened batch a chunk has; there are never more logits than those of a chunk, or of a row
    where the model is run as a whole.
    """
    if splits(model, input_ids):
        (output,), _ = run_body(model, input_ids, torch.zeros_like(input_ids[0, :1]))
        hidden: Tensor = output["last_hidden_state"].flatten(0, 1)
        head = Head(model, output)
        for part in parts(len(hidden), chunk_tokens(head.vocabulary, hidden.device)):
            yield part, head(hidden[part])
    else:
        length = input_ids.shape[1]
        for row, ids in enumerate(input_ids):
            part = slice(row * length, (row + 1) * length)
            yield part, model(input_ids=ids[None], use_cache=False).logits[0]


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Return the most tokens whose logits are computed at once."""
    copies = 2 if device.type == "cpu" else 1
    return min(512, max(128, CHUNK_BYTES // (4 * copies * vocabulary)))


class Head:
    """The model's own way from the last hidden states to the logits, whatever it does there.

    It is a shallow copy of the model with a body that has run already and returns what it is given.
    Calling it takes hidden states [tokens, hidden] to logits [tokens, vocabulary], by way of
    `output`, which it makes its own.
    """

    def __init__(self, model: PreTrainedModel, output: ModelOutput) -> None:
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self._output = output
        body = copy.copy(model.base_model)
        body.forward = lambda *args, **kwargs: output
        self._model = with_child(model, model.base_model_prefix, body)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.whole(hidden)[0]

    def whole(self, hidden: Tensor) -> Tensor:
        """Return the logits [1, tokens, vocabulary] as the head gives them: no view of others."""
        self._output["last_hidden_state"] = hidden[None]
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        logits: Tensor = self._model.forward(input_ids=ids, use_cache=False).logits
        return logits

    def trained(self) -> list[nn.Parameter]:
        """Return what trains in the head, weights that it shares with the embeddings included."""
        body = self._model.base_model
        parts = [module for module in self._model.children() if module is not body]
        found = [*self._model.parameters(recurse=False), *nn.ModuleList(parts).parameters()]
        return [parameter for parameter in found if parameter.requires_grad]


def run_body(
    model: PreTrainedModel,
    input_ids: Tensor,
    positions: Tensor,
    layout: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[list[ModelOutput], Tensor]:
    """Run the model; return its body's outputs and the logits of these positions of each row.

    layout: what the model is told of the rows, where they are packed.
    """
    caught: list[ModelOutput] = []
    hook = model.base_model.register_forward_hook(
        lambda module, inputs, output: caught.append(output)
    )
    try:
        out = model(input_ids=input_ids, use_cache=False, logits_to_keep=positions, **layout)
    finally:
        hook.remove()
    return caught, out.logits


def splits(model: PreTrainedModel, input_ids: Tensor) -> bool:
    """Return whether `Head` gives the model's logits, bit for bit.

    The first call for a model takes a few tokens through it to find out; nothing is changed.
    """
    if model not in _found_to_split:
        has_body = model.base_model_prefix in dict(model.named_children())
        possible = has_body and _takes_positions(model)
        _found_to_split[model] = possible and _agrees(model, input_ids[:1, :4])
    return _found_to_split[model]


def _takes_positions(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _agrees(model: PreTrainedModel, input_ids: Tensor) -> bool:
    with torch.no_grad(), evaluating(model):
        outputs, logits = run_body(model, input_ids, torch.arange(input_ids.shape[1]).to(input_ids))
        if len(outputs) != 1 or not isinstance(outputs[0], ModelOutput):
            return False
        hidden = outputs[0].get("last_hidden_state")
        return hidden is not None and torch.equal(Head(model, outputs[0])(hidden[0]), logits[0])


def whole_logits(
    model: PreTrainedModel, input_ids: Tensor, asked: Tensor, layout: Mapping[str, Any]
) -> Tensor:
    """Return the logits [asked positions, vocabulary], there at once with few others.

    asked: bool [batch, length]. layout: what the model is told of rows that are packed.
    """
    kept = asked.any(dim=0)
    kept[0] = True  # no model is asked for no logits at all
    if _takes_positions(model):
        positions = kept.nonzero().squeeze(1)
        out = model(input_ids=input_ids, use_cache=False, logits_to_keep=positions, **layout)
        logits: Tensor = out.logits[asked[:, positions]]
        return logits
    logits = model(input_ids=input_ids, use_cache=False, **layout).logits[asked]
    return logits


def _chunked_loss(head: Head, hidden: Tensor, asked: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of the asked positions, bool [batch, length], of the hidden states."""
    rows, positions = hidden.flatten(0, 1), asked.flatten().nonzero().squeeze(1)
    trained = head.trained() if torch.is_grad_enabled() else []
    loss: Tensor = _ChunkedLoss.apply(rows, positions, targets, head, *trained)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """The sum of -log softmax(head(hidden[position]))[target], with its gradient found at once.

    Without positions there is a target for each of the hidden states, `IGNORED` where none is.

    With p = softmax(logits), d logits = p - onehot(target), which takes the logits' place; one
    backward pass through the head takes it to the hidden states and to what trains in the head.
    What is kept for the backward pass are these gradients alone: the hidden states' in their dtype,
    the head's in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        positions: Tensor | None,
        targets: Tensor,
        head: Head,
        *trained: Tensor,
    ) -> Tensor:
        leaves = (hidden, *trained)
        gradients: list[Tensor | None] = [None] * len(leaves)
        gradients[0] = torch.zeros_like(hidden) if hidden.requires_grad else None
        losses = torch.empty(len(targets), device=hidden.device)
        ignores = positions is None
        for part in parts(len(targets), chunk_tokens(head.vocabulary, hidden.device)):
            at = part if positions is None else positions[part]
            rows = hidden[at].requires_grad_(hidden.requires_grad)
            kept = set[int]()
            with torch.set_grad_enabled(any(leaf.requires_grad for leaf in leaves)), _noting(kept):
                logits = head.whole(rows)
            outward = None
            if logits.requires_grad:  # the gradient takes their place where nothing needs them
                written_over = logits.untyped_storage().data_ptr() not in kept
                outward = logits.detach() if written_over else torch.empty_like(logits)
            scores, gradient = logits.detach()[0], None if outward is None else outward[0]
            cross_entropy(scores, targets[part], losses[part], gradient, ignores)
            if outward is not None:
                _add_gradients(gradients, at, (rows, *trained), logits, outward)
            del logits, scores, outward, gradient  # before the next chunk's are there
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [leaf.dtype for leaf in leaves]
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else (gradient * grad).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], None, None, None, *scaled[1:]


@contextmanager
def _noting(kept: set[int]) -> Iterator[None]:
    """Note where the tensors lie that the operations of the block keep for their gradients."""

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor if tensor.is_leaf else tensor.detach()  # a result would keep itself for ever

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def parts(count: int, most: int) -> Iterator[slice]:
    """Yield slices of 0..count of about the same length, none longer than `most`."""
    step = -(-count // max(1, -(-count // most))) or 1
    for begin in range(0, count, step):
        yield slice(begin, begin + step)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    gradient: Tensor | None,
    ignores: bool = False,
) -> None:
    """Write -log softmax(logits)[target] to `losses`, softmax(logits) - onehot to `gradient`.

    logits, gradient: [tokens, vocabulary], the same tensor or two; losses: float32 [tokens].
    Computed in float32.
    """
    compute = implementation("cross_entropy", logits.device)
    tokens, vocabulary = logits.shape
    most = max(1, BLOCK_LOGITS // vocabulary) if logits.device.type == "cpu" else tokens
    for part in parts(tokens, most):
        outward = None if gradient is None else gradient[part]
        compute(logits[part], targets[part], losses[part], outward, ignores)


def _add_gradients(
    gradients: list[Tensor | None],
    positions: Tensor | slice,
    leaves: tuple[Tensor, ...],
    logits: Tensor,
    outward: Tensor,
) -> None:
    """Take the logits' gradient `outward` to the leaves: the rows at `positions`, then the head."""
    wanted = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    found = torch.autograd.grad(logits, [leaves[i] for i in wanted], outward, allow_unused=True)
    for i, gradient in zip(wanted, found, strict=True):
        total = gradients[i]
        if gradient is None:
            continue
        if total is None:
            total = gradient.new_zeros(
                gradient.shape, dtype=torch.promote_types(gradient.dtype, torch.float32)
            )
            gradients[i] = total
        if i == 0:
            total[positions] = gradient
        else:
            total += gradient
