"""What is learnt from the rows, and by how much of what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from graft.objectives.registry import DEFAULT_OBJECTIVE, OBJECTIVES


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The objective that a run minimises."""

    GROUP: ClassVar[str] = "training"
    RARE: ClassVar[frozenset[str]] = frozenset(
        {
            *("beta", "label_smoothing", "wanted_weight", "unwanted_weight"),
            *("teacher", "teacher_format", "distill_weight", "distill_temperature"),
        }
    )

    objective: Annotated[str, OBJECTIVES] = DEFAULT_OBJECTIVE
    """What is learnt from the rows. dpo, orpo and kto take rows of preferences: a chosen and a
    rejected answer to a prompt, or (kto) an answer and whether it is wanted."""
    beta: float = 0.1
    """How strongly preferences count (orpo: the weight of the odds ratio), or (dpo, kto) how near
    the model stays to what it was: rewards are beta times the log of the ratio of probabilities."""
    label_smoothing: float = 0.0
    """Share of the pairs whose answers are taken to be the wrong way round (dpo)."""
    wanted_weight: float = 1.0
    """Weight of the losses of wanted answers (kto)."""
    unwanted_weight: float = 1.0
    """Weight of the losses of answers that are not wanted (kto)."""
    teacher: str | None = None
    """Folder or hub id of the model that distill learns from, which stays as it is and has the same
    vocabulary."""
    teacher_format: str | None = None
    """Quantise the teacher to this format; default: as it lies in its folder."""
    distill_weight: float = 0.5
    """Share of the loss that is the divergence from the teacher (distill); the rest is the loss of
    the next token."""
    distill_temperature: float = 1.0
    """What the logits of both models are divided by before they are compared (distill)."""
