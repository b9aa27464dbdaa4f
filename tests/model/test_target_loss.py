"""The loss against a float64 loop over the targets."""

from __future__ import annotations

import math

import pytest
import torch

from graft.model.loss import IGNORED, target_loss


def looped_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    total, count = 0.0, 0
    for row, wanted in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for position in range(1, len(wanted)):
            if wanted[position] == IGNORED:
                continue
            scores = row[position - 1]
            top = max(scores)
            log_sum = top + math.log(sum(math.exp(score - top) for score in scores))
            total += log_sum - scores[wanted[position]]
            count += 1
    return total, count


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_is_the_sum_over_the_targets(family, load, logits, tokens) -> None:
    model = load(family).model
    labels = tokens.clone()
    labels[0, :5] = IGNORED
    labels[1, 9:] = IGNORED
    with torch.no_grad():
        loss, count = target_loss(model, tokens, labels)
    expected, expected_count = looped_loss(logits(model), labels)
    assert count == expected_count == (13 - 5) + 8
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_first_token_is_never_a_target(load, tokens) -> None:
    model = load("llama").model
    labels = torch.full_like(tokens, IGNORED)
    labels[:, 0] = tokens[:, 0]
    with torch.no_grad():
        loss, count = target_loss(model, tokens, labels)
    assert (loss.item(), count) == (0.0, 0)


def test_padding_on_the_right_changes_nothing(load, tokens) -> None:
    model = load("llama").model
    padded = torch.cat([tokens, torch.zeros(2, 6, dtype=torch.long)], dim=1)
    labels = torch.cat([tokens, torch.full((2, 6), IGNORED)], dim=1)
    with torch.no_grad():
        (short, count), (long, padded_count) = (
            target_loss(model, tokens, tokens),
            target_loss(model, padded, labels),
        )
    assert count == padded_count == 24
    assert long.item() == pytest.approx(short.item(), rel=1e-5)


def test_softmax_is_in_float32_for_a_bfloat16_model(load, logits, tokens) -> None:
    model = load("llama", dtype="bfloat16").model
    with torch.no_grad():
        loss, _ = target_loss(model, tokens, tokens)
    expected, _ = looped_loss(logits(model), tokens)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
