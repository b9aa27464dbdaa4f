"""Which tokens of a training step a gradient is estimated from: drawn anew in each, kept nowhere.

The draw is a function of the run's seed, the step and the row of the step, by a counter-based
generator (Philox; Salmon et al., SC 2011). So a run that is resumed draws as it would have drawn,
recomputed layers draw what they drew, and the rows of a step may be padded, packed, or taken in
several batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

Sample = tuple[Tensor, Tensor]
"""`means` [tokens, rows] and `points` [n, 4]; see `graft.kernels.moves.sampled`."""


class _Draw:
    """The draw of one batch of a step."""

    def __init__(self, seed: int, step: int, first_row: int, lengths: Sequence[int]) -> None:
        self.key, self.first_row, self.lengths = (seed % 2**64, step), first_row, lengths
        self.found: dict[tuple[object, ...], Sample] = {}

    def sample(self, x: Tensor, one_in: int) -> Sample:
        key = (x.shape[:-1], one_in, x.dtype, x.device)
        if key not in self.found:
            means, points = self._made(x.shape[:-1], one_in)
            # A GPU is not waited for.
            self.found[key] = (
                means.to(x.device, x.dtype, non_blocking=True),
                points.to(x.device, non_blocking=True),
            )
        return self.found[key]

    def _made(self, shape: torch.Size, one_in: int) -> Sample:
        rows = self._rows(shape)
        means, points = torch.zeros(shape.numel(), len(rows)), []
        for row, (begin, end) in enumerate(rows):
            means[begin:end, row] = (end - begin) ** -0.5
            count = -(-(end - begin) // one_in)
            key, counter = self.key, (0, 0, self.first_row + row, 0)
            within = np.random.Generator(np.random.Philox(key=key, counter=counter)).random()
            places = (torch.arange(count, dtype=torch.float64) + within) / count
            points.append(torch.tensor([begin, end, 0, 1 / count]).double().repeat(count, 1))
            points[-1][:, 2] = places
        return means, torch.cat(points)

    def _rows(self, shape: torch.Size) -> list[tuple[int, int]]:
        """Return where each row of tokens begins and ends in the flattened batch."""
        count, (most, total) = shape.numel(), (max(self.lengths), sum(self.lengths))
        if count == total and shape[0] == 1:
            return list(pairwise(np.cumsum([0, *self.lengths]).tolist()))
        if len(shape) == 2 and shape[0] == len(self.lengths) and shape[1] >= most:
            begins = range(0, count, shape[1])
            return [(at, at + size) for at, size in zip(begins, self.lengths, strict=True)]
        return [(0, count)]  # some tokens, as an expert gets them


_draw: _Draw | None = None
"""Read by whatever layer runs meanwhile, in autograd's own threads too."""


@contextmanager
def drawn(seed: int, step: int, first_row: int, lengths: Sequence[int]) -> Iterator[None]:
    """Let `token_sample` draw for one batch of a step, forwards and backwards.

    first_row: rows of the step in batches before this one; lengths: tokens of each row of this one,
    which is padded or packed.
    """
    global _draw  # noqa: PLW0603
    _draw = _Draw(seed, step, first_row, lengths)
    try:
        yield
    finally:
        _draw = None


def token_sample(x: Tensor, one_in: int) -> Sample | tuple[None, None]:
    """Return what is drawn for an input [..., features]: of each row, one token in so many.

    Nothing stands for all tokens: where that is what is asked, and outside `drawn`.
    """
    if one_in == 1 or _draw is None or x.dim() < 2 or not x.numel():
        return None, None
    return _draw.sample(x, one_in)
