"""The largest singular values of a matrix, with their vectors."""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLING = 8
_POWER_STEPS = 4
_SMALL = 512
"""Up to this side a full decomposition costs no more than reading the weight does."""


def leading_svd(
    matrix: Tensor, rank: int, steps: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values with their vectors, as `truncated_svd` does.

    steps: power steps of the randomised one. None decomposes in full where the shorter side has at
    most 512 rows or columns, and takes 4 steps beyond that.
    """
    if steps is not None or min(matrix.shape) > _SMALL:
        return truncated_svd(matrix, rank, _POWER_STEPS if steps is None else steps)
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], sizes[:rank], right[:rank]


def truncated_svd(
    matrix: Tensor, rank: int, steps: int = _POWER_STEPS
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values s [k] with their vectors u [rows, k] and v [k, columns].

    k = min(rank, rows, columns). Randomised subspace iteration with power steps and a fixed seed
    (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4): the cost grows with the rank,
    where a full decomposition of a large layer takes minutes.
    """
    rows, columns = matrix.shape
    rank = min(rank, rows, columns)
    width = min(rank + _OVERSAMPLING, rows, columns)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(columns, width, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ probes.to(matrix.device)).Q
    for _ in range(steps):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    left, sizes, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left[:, :rank], sizes[:rank], right[:rank]
