"""What is trained beside (or inside) the frozen weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

from graft.adapters.registry import METHODS, method_of
from graft.adapters.starts.registry import STARTS

MethodName = Annotated[str, METHODS]
Init = Annotated[str, STARTS]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The adapter that a run trains."""

    GROUP: ClassVar[str] = "method"
    RARE: ClassVar[frozenset[str]] = frozenset(
        {
            *("grid_rank", "rslora", "dense_fraction", "adapter_bias", "train"),
            *("loftq_rounds", "svd_steps", "eva_rho"),
        }
    )

    method: MethodName = "qalora"
    """How it is trained."""
    rank: int | None = None
    """Rank of the low-rank update (not of affine and full); 16, or 14 for merge_aware where its
    grid trains too, so that it has no more trained parameters. qalora's ends at the number of
    groups in a row."""
    grid_rank: int | None = None
    """Rank of the moves of the scales (qalora), and of those of the offsets (merge_aware). The
    default is --rank for qalora, where 0 leaves the scales alone and the adapter an ordinary LoRA;
    for merge_aware it is 1 at 2 bits and 0, a grid that stays, at more."""
    alpha: float | None = None
    """Numerator of the scaling alpha/rank; None is the rank, a scaling of 1."""
    rslora: bool = False
    """Scale by alpha/sqrt(rank) instead of alpha/rank (arXiv 2312.03732)."""
    dora: bool = False
    """Train the length of each row of the weight beside its low-rank update, which then turns the
    rows alone (DoRA, arXiv 2402.09353; lora and qlora only)."""
    init: Init = "default"
    """How the adapter starts."""
    loftq_rounds: int = 5
    """Times that loftq rounds the weights and fits the adapter to the rest in turn."""
    svd_steps: int | None = None
    """Power steps of the randomised singular value decomposition of pissa, corda and eva; the
    default decomposes in full where a side has at most 512, and takes 4 steps beyond that."""
    eva_rho: float = 2.0
    """The largest rank that eva gives a layer, over --rank, which is the mean of all; 1 gives each
    layer the same."""
    dense_fraction: float | None = None
    """Share of the steps that merge_aware trains as LoRA before it rounds the weights; the default
    is 0.99 at 4 and 8 bits, 0.7 at 3, and 0.5 at 2."""
    dropout: float = 0.0
    """Probability of dropping an input of the low-rank path (lora and qlora only)."""
    adapter_bias: bool = False
    """Train a bias beside the low-rank update (lora and qlora only)."""
    targets: tuple[str, ...] = ()
    """Layers to adapt: names, suffixes, or regular expressions; none means every linear layer but
    the output head."""
    train: tuple[str, ...] = ()
    """What method full trains, words or a list with commas: kinds (norms, biases, embeddings,
    lm_head, attention, mlp, factors), ranges of layers (layers.20-31, layers.20-31.mlp), names,
    suffixes, or regular expressions; none means everything."""

    @property
    def update_rank(self) -> int:
        """The rank of the low-rank update."""
        return self.rank or 16

    def with_rank(self, rank: int) -> Self:
        """Return the configuration of a layer with another rank and the same scaling."""
        alpha = self.update_rank if self.alpha is None else self.alpha
        share = rank / self.update_rank
        return replace(self, rank=rank, alpha=alpha * (math.sqrt(share) if self.rslora else share))

    def resolved(self, bits: int | None) -> Self:
        """Return the configuration with the defaults of its method on codes of `bits` filled in."""
        return method_of(self).resolved(self, bits)
