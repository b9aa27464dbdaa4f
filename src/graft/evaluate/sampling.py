"""How a token is chosen from the logits: greedily, or drawn from those that are likely enough."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LIKELY = 1024
"""As many tokens are looked at first: they hold the nucleus, unless the model knows nothing."""


@dataclass(frozen=True)
class Sampling:
    """Temperature, top-k and top-p, in the order of Transformers.

    p = softmax(logits / temperature) over the tokens that are left, the others are 0. With top_k
    those of the k largest logits are left, then with top_p the fewest whose probability is at
    least top_p (nucleus sampling, arXiv 1904.09751). Tokens of equal logits are left together.
    """

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 leaves all."""
    top_p: float = 1.0
    """1 leaves all."""

    def problems(self) -> list[str]:
        """Return what of it cannot be."""
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(f"--temperature is {self.temperature}; expected 0 or more")
        if self.top_k < 0:
            problems.append(f"--top-k is {self.top_k}; expected more than 0, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            problems.append(f"--top-p is {self.top_p}; expected more than 0, up to 1")
        if not self.temperature and not problems and (self.top_k or self.top_p < 1):
            problems.append(
                "--top-k and --top-p choose what is sampled, and --temperature 0 samples nothing: "
                "the likeliest token is taken. Give a temperature above 0 too, such as 1"
            )
        return problems

    def left(self, logits: Tensor) -> Tensor:
        """Return the logits [..., tokens] over the temperature, -inf where a token is not left."""
        scores = logits / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p < 1:
            scores = scores.masked_fill(scores < _nucleus_end(scores, self.top_p), -math.inf)
        return scores

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a token of each row of logits float32 [rows, tokens]; int64 [rows]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = self.left(logits).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


GREEDY = Sampling()


def _nucleus_end(scores: Tensor, top_p: float) -> Tensor:
    """Return the smallest score of the nucleus, [..., 1].

    Sums are taken in float64: a vocabulary has 100,000 terms, and float32 loses the last digits.
    """
    count = scores.shape[-1]
    total = scores.double().logsumexp(-1, keepdim=True)
    for first in (_LIKELY, count):
        likely = scores.topk(min(first, count), dim=-1).values
        sums = (likely.double() - total).exp().cumsum(-1)
        if first >= count or bool((sums[..., -1] >= top_p).all()):
            break
    # Up to and with the first token that brings the sum to top_p; rounding may leave it below.
    place = (sums < top_p).sum(-1, keepdim=True).clamp_max(likely.shape[-1] - 1)
    return likely.gather(-1, place)
