"""Singular values of updates: cutting one to a rank, and how much of it a rank holds.

Everything is float64: what is taken apart is a difference of weights, or a trained low-rank update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_SMALLEST = 1e-7
"""Singular values below this share of the largest are the rounding of float32 weights."""


class LowRank(NamedTuple):
    """An update B A of a weight [out, in]: A [rank, in], B [out, rank]."""

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Spectrum:
    """A matrix W = U diag(S) Vᵀ, its singular values the largest first; float64."""

    U: Tensor
    """[out, values], orthonormal columns."""
    S: Tensor
    """[values]."""
    V: Tensor
    """[in, values]."""

    @property
    def rank(self) -> int:
        """How many singular values there are; 0 for a matrix of zeros."""
        return len(self.S)

    def cut(self, rank: int | None = None) -> LowRank:
        """Return the nearest matrix of that rank (Eckart and Young), √S in both of its factors."""
        root = self.S[:rank].sqrt()
        return LowRank(root[:, None] * self.V[:, :rank].T, self.U[:, :rank] * root)

    def rank_for(self, energy: float) -> int:
        """Return the smallest rank that holds a share of Σ S², at least 1 where there is any."""
        return rank_for(self.S, energy)


def rank_for(singular_values: Tensor, energy: float) -> int:
    """Return how many of the largest singular values hold a share of the sum of their squares."""
    if not len(singular_values):
        return 0
    squares = singular_values.double().square()
    lost = squares.flip(0).cumsum(0).flip(0)  # of those from here on, the small ones summed first
    return max(1, int((lost > (1 - energy) * lost[0]).sum()))


def spectrum(weight: Tensor) -> Spectrum:
    """Return the singular values of a dense matrix, by the eigenvectors of its smaller Gram matrix.

    That is some times quicker than a singular value decomposition, and the eigenvectors are
    orthonormal: with all of them the matrix comes back to float64 rounding. Values below 1e-7 of
    the largest are left out.
    """
    W = weight.double()
    turned = W.shape[0] > W.shape[1]
    W = W.T if turned else W
    U = torch.linalg.eigh(W @ W.T).eigenvectors.flip(1)
    projected = U.T @ W
    S = torch.linalg.vector_norm(projected, dim=1)
    order = S.argsort(descending=True, stable=True)[: _above_rounding(S)]
    U, S, V = U[:, order], S[order], projected[order].T / S[order]
    return Spectrum(V, S, U) if turned else Spectrum(U, S, V)


def spectrum_of_product(update: LowRank) -> Spectrum:
    """Return the singular values of B A, which is never formed: of the triangles of B's and Aᵀ's QR
    factors alone."""
    left, upper = torch.linalg.qr(update.B.double())
    right, lower = torch.linalg.qr(update.A.double().T)
    U, S, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    count = _above_rounding(S)
    return Spectrum(left @ U[:, :count], S[:count], right @ Vh[:count].T)


def _above_rounding(values: Tensor) -> int:
    """Return how many singular values there are."""
    return int((values > values.max() * _SMALLEST).sum()) if len(values) else 0


def left_of(spectra: Iterable[Tensor], ranks: Sequence[int]) -> float:
    """Return √(Σ of the squares of what the ranks cut off / Σ of all): the relative error."""
    lost = total = 0.0
    for values, rank in zip(spectra, ranks, strict=True):
        squares = values.double().square()
        lost += float(squares[rank:].sum())
        total += float(squares.sum())
    return (lost / total) ** 0.5 if total else 0.0


def effective_rank(singular_values: Tensor) -> float:
    """Return exp(-Σ p ln p) with p = S / Σ S (Roy and Vetterli, EUSIPCO 2007); 0 without values.

    It is the rank where all singular values are equal, and 1 where one of them is all there is.
    """
    if not len(singular_values):
        return 0.0
    p = singular_values.double() / singular_values.double().sum()
    return float(torch.special.entr(p).sum().exp())


def subspace_similarity(one: Tensor, other: Tensor) -> float:
    """Return |UᵀV|² / min(columns) of two orthonormal bases [features, columns], from 0 to 1.

    1: the smaller space lies in the larger one (LoRA, arXiv 2106.09685, section 7.2).
    """
    fewest = min(one.shape[1], other.shape[1])
    return float((one.T @ other).square().sum() / fewest) if fewest else 0.0


def inner_product(one: LowRank, other: LowRank) -> float:
    """Return ⟨B A, B' A'⟩, the sum of the products of their elements, from products of factors."""
    rows = one.B.double().T @ other.B.double()
    columns = one.A.double() @ other.A.double().T
    return float((rows * columns).sum())
