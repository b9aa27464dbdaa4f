"""Packed rows: several one behind the other in one row of tokens, none of which sees another."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft.errors import GraftError
from graft.model.internals import attention_of
from graft.model.running.attention import NAME
from graft.model.running.modes import evaluating

_LENGTHS = (4, 7, 3)
_NEAR = 0.1
"""What packed rows may differ from the same rows alone, as a share of what they would differ if
they saw each other. Rounding gives thousandths, of experts that are chosen otherwise too."""


def packed(starts: Tensor, device: torch.device) -> dict[str, Any]:
    """Return what a model is called with, beside input_ids [1, length], for packed rows.

    starts: int32 [rows + 1] on the CPU; see `graft.kernels.attention.ops`. The model must have our
    attention. Its rows get positions from 0 on, each, and no mask is ever made: a mask of four
    dimensions is passed on as it is, and this one holds no number, so that whatever would add it to
    scores fails.
    """
    begins = torch.repeat_interleave(starts[:-1].long(), starts.diff().long())
    positions = torch.arange(len(begins)) - begins
    return {
        "position_ids": positions[None].to(device),
        "attention_mask": torch.empty(1, 1, len(begins), 0, dtype=torch.bool, device=device),
        "cu_seq_lens_q": starts,
    }


def unmasked(input_ids: Tensor) -> dict[str, Any]:
    """Return what a model is called with, beside input_ids [batch, length], for rows without mask.

    The model must have our attention, without a window. No mask is made, which would ask the GPU
    whether there are packed rows; the one that is passed on instead holds no number.
    """
    length, device = input_ids.shape[1], input_ids.device
    return {
        "position_ids": torch.arange(length, device=device)[None],
        "attention_mask": torch.empty(1, 1, length, 0, dtype=torch.bool, device=device),
    }


def check_packing(model: PreTrainedModel) -> None:
    """Raise GraftError when packed rows do not give the logits of the same rows alone.

    A few tokens are taken through the model to find out; nothing in it is changed. What is rounding
    is told by what the rows differ when they do see each other.
    """
    if attention_of(model) != NAME:
        raise GraftError(
            f"--batching packed: {type(model).__name__} does not leave its attention to graft, so "
            "packed rows would see each other; use --batching grouped"
        )
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    starts = torch.tensor([0, *_LENGTHS]).cumsum(0).int()
    ids = (torch.arange(int(starts[-1])) * 7 + 3).remainder(vocabulary).to(device)[None]
    rows = ids.squeeze(0).split(_LENGTHS)
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad(), evaluating(model):
        alone = torch.cat(
            [one[:length] for one, length in zip(_logits(model, padded), _LENGTHS, strict=True)]
        )
        layout = packed(starts, device)
        together = _logits(model, ids, **layout)[0]
        no_starts = {"attention_mask": torch.ones_like(ids)}
        seeing = _logits(model, ids, position_ids=layout["position_ids"], **no_starts)[0]
    if not alone.isfinite().all():
        return  # a damaged model: the loss says so
    off, most = ((one - alone).norm().item() for one in (together, seeing))
    rounding = math.sqrt(torch.finfo(alone.dtype).eps) * alone.norm().item()
    if not off <= max(_NEAR * most, rounding):
        raise GraftError(
            f"--batching packed: the logits of packed rows are not those of the rows alone (they "
            f"differ by {off:.3g}, and would by {most:.3g} if the rows saw each other); use "
            "--batching grouped"
        )


def _logits(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False, **options).logits
    return logits.double()
