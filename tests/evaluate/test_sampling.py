"""Sampling against a float64 loop over the tokens, and against Transformers' own processors."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from graft.evaluate.sampling import Sampling

CASES = [
    Sampling(1.0, 1),
    Sampling(0.7, 5),
    Sampling(1.3, 0, 0.9),
    Sampling(0.5, 0, 0.01),
    Sampling(2.0, 50, 0.95),
    Sampling(1.0, 10_000, 0.9999),
    Sampling(1.0, 3, 1.0),
]


def loop(logits: Tensor, sampling: Sampling) -> list[float]:
    """The probabilities by their definition, a token at a time."""
    scores = [value / sampling.temperature for value in logits.double().tolist()]
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    if sampling.top_k:
        least = scores[order[min(sampling.top_k, len(order)) - 1]]
        order = [token for token in order if scores[token] >= least]
    highest = scores[order[0]]
    total = math.fsum(math.exp(scores[token] - highest) for token in order)
    left, mass = [], 0.0
    for token in order:
        if mass >= sampling.top_p and scores[token] < scores[left[-1]]:
            break
        left.append(token)
        mass += math.exp(scores[token] - highest) / total
    total = math.fsum(math.exp(scores[token] - highest) for token in left)
    return [
        math.exp(scores[token] - highest) / total if token in set(left) else 0.0
        for token in range(len(scores))
    ]


@pytest.mark.parametrize("sampling", CASES)
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_probabilities_equal_a_loop(sampling: Sampling, spread: float) -> None:
    logits = torch.randn(1500) * spread
    logits[7] = logits[8] = logits.max()  # equal ones stay together
    found = sampling.left(logits).softmax(-1)
    expected = torch.tensor(loop(logits, sampling))
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("sampling", CASES)
def test_what_is_left_is_what_transformers_leaves(sampling: Sampling) -> None:
    logits = torch.randn(3, 400) * 3
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    assert torch.equal(sampling.left(logits), scores)


def test_a_flat_distribution_leaves_more_than_are_looked_at_first() -> None:
    logits = torch.arange(5000, 0, -1) * 1e-4
    left = Sampling(1.0, 0, 0.5).left(logits).isfinite()
    mass = logits.double().softmax(-1).cumsum(-1)
    assert int(left.sum()) == int((mass < 0.5).sum()) + 1 > 1024
    assert left[: int(left.sum())].all()


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -4.0]])
    sampling, generator = Sampling(1.5, 3), torch.Generator().manual_seed(0)
    counts = Counter(int(sampling.choose(logits, generator)) for _ in range(4000))
    expected = loop(logits[0], sampling)
    assert set(counts) == {1, 2, 3}
    for token in counts:
        spread = math.sqrt(expected[token] * (1 - expected[token]) / 4000)
        assert abs(counts[token] / 4000 - expected[token]) < 4 * spread


def test_no_temperature_is_greedy() -> None:
    logits = torch.randn(4, 30)
    assert torch.equal(Sampling().choose(logits), logits.argmax(-1))
