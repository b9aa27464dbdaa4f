"""The configuration of a comparison; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from graft.data.config import DataConfig
from graft.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class TrainingsConfig:
    """What all trainings of a comparison have in common."""

    GROUP: ClassVar[str] = "training"
    RARE: ClassVar[frozenset[str]] = frozenset({"calibration_rows", "damping"})

    steps: int | None = None
    """Optimizer steps of each training; give this or --epochs (default: 1 epoch)."""
    epochs: float | None = None
    """Passes over the training rows; give this or --steps."""
    batch_size: int = 16
    """Rows that are computed at once."""
    grad_accum: int = 1
    """Batches that are added up to one optimizer step."""
    learning_rates: tuple[str, ...] = ()
    """Peak learning rates in place of the methods' defaults, as METHOD=RATE."""
    rank: int | None = None
    """Rank of the low-rank update; the default is the method's."""
    alpha: float | None = None
    """Numerator of the scaling alpha/rank; None means rank, so that the scaling is 1."""
    targets: tuple[str, ...] = ()
    """Layers to adapt and to quantise: names, suffixes, or regular expressions; none means every
    linear layer but the output head."""
    group_size: int = 32
    """Inputs that share a scale and an offset in the int format: 8, 16, 32, 64 or 128."""
    calibration_rows: int = 128
    """Rows of the training data that gptq and qep calibrate on."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean (gptq, qep)."""
    checkpointing: Literal["auto", "none", "products", "half", "layers"] = "auto"
    """What each decoder layer keeps for the backward pass; see graft train."""
    eval_every: int | None = None
    """Steps between evaluations; the default makes four of them."""
    save_every: int | None = None
    """Steps between checkpoints, from which a training that was interrupted goes on; the default
    keeps none, and such a training begins anew."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(TrainingsConfig, DataConfig, ModelConfig):
    """A comparison of ways to train and deploy on one model and one set of data.

    `contenders`, `bits`, `seeds` and `keep` say what is compared; they may change between calls on
    the same folder, and what is there already stays. All else is fixed by the first call.
    """

    GROUP: ClassVar[str] = "comparison"

    out: str = "graft-compare"
    """Folder of the comparison; the same command with the same folder goes on where it stopped."""
    contenders: tuple[str, ...] = (
        *("base", "lora", "lora+rtn", "lora+gptq"),
        *("qalora", "affine", "merge_aware"),
    )
    """What competes, each METHOD[@SOLVER][+SOLVER]. METHOD: base (untrained) or any of graft
    train's. @SOLVER: what quantises the weights that it trains on, if not the method's default.
    +SOLVER: merge to dense weights, then quantise those; without it base, lora, qlora and full stay
    dense. A method that trains on integers merges exactly and takes no +SOLVER."""
    bits: tuple[int, ...] = (4,)
    """Widths at which each contender that ends in integers competes: 2, 3, 4, 8."""
    seeds: int = 1
    """Number of seeds: every training runs with 0, 1, ... of them; the held-out rows are the same
    for all."""
    generate: int | None = None
    """Held-out prompts to continue greedily and to score by exact match, BLEU, ROUGE-L and
    attribute coverage; default: 32 for rows with a prompt or an instruction, else 0. Without the
    packages of the eval extra the default goes without BLEU and ROUGE-L."""
    max_new_tokens: int = 128
    """Most tokens of a continuation."""
    keep: bool = False
    """Keep every deployed model folder, below OUT/deployed; else they go when they are scored. The
    runs stay in any case."""
