"""The loss of each target by itself, and the divergence from a teacher, in chunks of tokens.

What is computed of a target's loss depends on other targets here (a pair's on all of both answers),
so gradients are weighted when the backward pass brings the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from graft.data.batches import IGNORED
from graft.model.running.loss import (
    Head,
    chunk_tokens,
    cross_entropy,
    parts,
    run_body,
    splits,
    whole_logits,
)
from graft.model.running.packing import packed


class Asked(NamedTuple):
    """What a batch asks of a model."""

    where: Tensor
    """bool [batch, length]: the positions whose next token is a target."""
    targets: Tensor
    """int64 [targets]: those tokens, in the order of the flattened batch."""
    layout: dict[str, Any]
    """What the model is told of rows that are packed."""


def asked_of(input_ids: Tensor, labels: Tensor, starts: Tensor | None) -> Asked:
    """Return what a batch asks; see `graft.model.running.loss.target_loss` for its tensors."""
    where = functional.pad(labels[:, 1:] != IGNORED, (0, 1))
    layout = {} if starts is None else dict(packed(starts.cpu(), input_ids.device))
    return Asked(where, labels.roll(-1, dims=1)[where], layout)


def target_losses(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, starts: Tensor | None = None
) -> Tensor:
    """Return -log p of each target, float32 [targets], in the order of the flattened batch.

    The arguments are those of `target_loss`, whose sum this is. There are never more logits than
    those of a chunk; where the head trains, they are computed again in the backward pass.
    """
    asked = asked_of(input_ids, labels, starts)
    if not splits(model, input_ids):
        logits = whole_logits(model, input_ids, asked.where, asked.layout).float()
        return functional.cross_entropy(logits, asked.targets, reduction="none")
    head, hidden = _states(model, input_ids, asked)
    trained = head.trained() if torch.is_grad_enabled() else []
    losses: Tensor = _TargetLosses.apply(hidden, asked.targets, head, *trained)
    return losses


def distillation_losses(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: tuple[Tensor, Tensor, Tensor | None],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return (-log p, T² KL(teacher || model)) of each target, each float32 [targets].

    With p = softmax(logits / T) and q = softmax(teacher's logits / T) the divergence is
    sum q (log q - log p) (Hinton et al., arXiv 1503.02531, with its factor T²). batch: input_ids,
    labels, starts. Neither model's logits are there for more than a chunk of tokens, where its
    logits are a function of each position's last hidden state.
    """
    asked = asked_of(*batch)
    with torch.no_grad():
        given = _logits_of(teacher, batch[0], asked)
    if not splits(model, batch[0]):
        logits = whole_logits(model, batch[0], asked.where, asked.layout).float()
        told = given.of(slice(None)).float()
        nll = functional.cross_entropy(logits, asked.targets, reduction="none")
        return nll, _divergence(logits, told, temperature)[0]
    head, hidden = _states(model, batch[0], asked)
    trained = head.trained() if torch.is_grad_enabled() else []
    losses: tuple[Tensor, Tensor] = _Distilled.apply(
        hidden, asked.targets, given, temperature, head, *trained
    )
    return losses


def _states(model: PreTrainedModel, input_ids: Tensor, asked: Asked) -> tuple[Head, Tensor]:
    """Run the model's body; return its head and the hidden states [targets, hidden]."""
    (output,), _ = run_body(model, input_ids, torch.zeros_like(input_ids[0, :1]), asked.layout)
    hidden: Tensor = output["last_hidden_state"]
    return Head(model, output), hidden[asked.where]


class _Given:
    """A teacher's logits: those of a chunk from its hidden states, or all of them."""

    def __init__(self, states: Tensor, head: Head | None) -> None:
        self._states, self._head = states, head

    def of(self, part: slice) -> Tensor:
        """Return the logits [targets of the part, vocabulary]."""
        return self._states[part] if self._head is None else self._head(self._states[part])


def _logits_of(teacher: PreTrainedModel, input_ids: Tensor, asked: Asked) -> _Given:
    if not splits(teacher, input_ids):
        return _Given(whole_logits(teacher, input_ids, asked.where, asked.layout), None)
    head, hidden = _states(teacher, input_ids, asked)
    return _Given(hidden, head)


def _divergence(logits: Tensor, told: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return T² KL(told || logits) [tokens] and its gradient by the logits, T (p - q)."""
    log_p = (logits.float() / temperature).log_softmax(-1)
    log_q = (told.float() / temperature).log_softmax(-1)
    q = log_q.exp()
    divergence = (q * (log_q - log_p)).sum(-1) * temperature**2
    return divergence, (log_p.exp() - q) * temperature


class _TargetLosses(torch.autograd.Function):
    """-log softmax(head(hidden))[target] of each row of hidden [targets, hidden].

    Where nothing trains in the head, the gradient by each hidden state is found at once and kept
    in its dtype, to be multiplied by what the backward pass brings for its target. A head that
    trains adds the targets' gradients up, so they are found in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, *trained: Tensor) -> Tensor:
        losses = torch.empty(len(targets), device=hidden.device)
        ctx.head, ctx.trained = head, trained
        ctx.once = not any(one.requires_grad for one in trained)
        keeps = ctx.once and hidden.requires_grad
        gradient = torch.empty_like(hidden) if keeps else None
        buffer: Tensor | None = None
        for part in parts(len(targets), chunk_tokens(head.vocabulary, hidden.device)):
            rows = hidden[part].detach().requires_grad_(keeps)
            with torch.set_grad_enabled(keeps):
                logits = head(rows)
            if gradient is None:
                cross_entropy(logits.detach(), targets[part], losses[part], None)
            else:
                buffer = torch.empty_like(logits) if buffer is None else buffer[: len(rows)]
                cross_entropy(logits.detach(), targets[part], losses[part], buffer)
                (gradient[part],) = torch.autograd.grad(logits, rows, buffer)
            del logits
        ctx.save_for_backward(hidden if gradient is None else gradient, targets)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, targets = ctx.saved_tensors
        trained = ctx.trained
        if ctx.once:
            return (states * grad[:, None]).to(states.dtype), None, None, *(None for _ in trained)

        def outward(logits: Tensor, part: slice) -> Tensor:
            gradient = torch.empty_like(logits)
            cross_entropy(logits, targets[part], torch.empty_like(grad[part]), gradient)
            return gradient * grad[part, None].to(gradient.dtype)

        return _through_head(ctx.head, states, trained, outward, before=2)


class _Distilled(torch.autograd.Function):
    """Both losses of `distillation_losses`; logits are computed again in the backward pass.

    The backward pass weighs each of them, so what is kept are the hidden states alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        given: _Given,
        temperature: float,
        head: Head,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(targets), device=hidden.device)
        divergences = torch.empty_like(losses)
        for part in parts(len(targets), chunk_tokens(head.vocabulary, hidden.device)):
            with torch.no_grad():
                logits = head(hidden[part])
                cross_entropy(logits, targets[part], losses[part], None)
                divergences[part], _ = _divergence(logits, given.of(part), temperature)
        ctx.head, ctx.trained = head, trained
        ctx.given, ctx.temperature = given, temperature
        ctx.save_for_backward(hidden, targets)
        return losses, divergences

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor, by_divergence: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets = ctx.saved_tensors

        def outward(logits: Tensor, part: slice) -> Tensor:
            gradient = torch.empty_like(logits)
            cross_entropy(logits, targets[part], torch.empty_like(by_loss[part]), gradient)
            _, other = _divergence(logits, ctx.given.of(part), ctx.temperature)
            found = gradient.float() * by_loss[part, None] + other * by_divergence[part, None]
            return found.to(logits.dtype)

        return _through_head(ctx.head, hidden, ctx.trained, outward, before=4)


def _through_head(
    head: Head,
    hidden: Tensor,
    trained: Sequence[Tensor],
    outward: Callable[[Tensor, slice], Tensor],
    before: int,
) -> tuple[Tensor | None, ...]:
    """Take the gradient by the logits back through the head, chunk by chunk.

    outward: (logits, part) -> the gradient by them. Returns the gradients by the hidden states,
    None for so many arguments, and those by what trains in the head, summed in float32.
    """
    by_hidden = torch.empty_like(hidden)
    sums: list[Tensor | None] = [None] * len(trained)
    for part in parts(len(hidden), chunk_tokens(head.vocabulary, hidden.device)):
        rows = hidden[part].detach().requires_grad_()
        with torch.enable_grad():
            logits = head(rows)
        wanted = [rows, *trained]
        with torch.no_grad():
            back = outward(logits.detach(), part)
        by_hidden[part], *more = torch.autograd.grad(logits, wanted, back, allow_unused=True)
        for index, one in enumerate(more):
            if one is not None:
                wide = one.to(torch.promote_types(one.dtype, torch.float32))
                total = sums[index]
                sums[index] = wide if total is None else total + wide
        del logits
    found = [
        None if total is None else total.to(leaf.dtype)
        for total, leaf in zip(sums, trained, strict=True)
    ]
    return by_hidden, *(None for _ in range(before)), *found
