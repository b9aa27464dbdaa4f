"""What is watched of a run, as far as it can be known before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from graft.api.config import TrainConfig
from graft.data.encode import EncodedData
from graft.data.examples import Example
from graft.errors import GraftError
from graft.evaluate.forgetting import general_windows
from graft.evaluate.samples import sampled_rows
from graft.model.subject import Subject


@dataclass(frozen=True)
class Watched:
    """What the model is asked beside the held-out rows."""

    sampled: list[Example]
    """Held-out rows whose prompts are continued at each evaluation."""
    general: Tensor | None
    """The windows of the general text; None where its tokens are not the model's."""


def watched(config: TrainConfig, subject: Subject, held_out: EncodedData) -> Watched:
    """Return what is watched; raises GraftError for what was asked for and cannot be."""
    limit = subject.position_limit
    return Watched(sampled_rows(held_out, config.samples, limit), _general(config, subject, limit))


def _general(config: TrainConfig, subject: Subject, limit: int | None) -> Tensor | None:
    path = None if config.general_text is None else Path(config.general_text)
    known = next(subject.skeleton.get_input_embeddings().parameters()).shape[0]
    try:
        return general_windows(subject.tokenizer, path, limit=limit, vocabulary=known)
    except GraftError:
        if path is not None:
            raise
        return None  # a model of another alphabet, say
