"""How the rows of a run's batches become tensors, and what that saves."""

from __future__ import annotations

from dataclasses import dataclass

from graft.api.config import TrainConfig
from graft.data.encode import EncodedData
from graft.data.examples import sequences_of
from graft.data.sampler import make_sampler, measure_batches
from graft.errors import GraftError
from graft.model.internals import attention_of
from graft.model.running.attention import may_use_own_attention
from graft.model.subject import Subject
from graft.objectives.registry import OBJECTIVES
from graft.train.config import Batching


@dataclass(frozen=True)
class Batches:
    """What a run's batches hold."""

    tokens: int
    """Most tokens that are computed at once, padding included."""
    longest: int
    """Tokens of the longest sequence; never too low."""
    sequences: int
    """Most sequences of a batch."""
    words: str


def chosen_batching(config: TrainConfig, subject: Subject) -> Batching:
    """Return packed, grouped or padded; raises GraftError where rows cannot be packed as asked."""
    why = _why_not_packed(config, subject)
    if config.batching == "auto":
        return "packed" if why is None else "grouped"
    if config.batching == "packed" and why is not None:
        raise GraftError(f"--batching packed: {why}; use --batching grouped")
    return config.batching


def _why_not_packed(config: TrainConfig, subject: Subject) -> str | None:
    """Return why a model or an objective takes no packed rows, as far as its classes say."""
    objective = OBJECTIVES[config.objective]
    if config.cuda_graphs:
        return "--cuda-graphs takes rows of a few lengths, not packed ones"
    if not objective.packs:
        return f"the objective {objective.name} takes no packed rows"
    model = subject.skeleton
    if attention_of(model) != "sdpa" or not may_use_own_attention(model):
        return (
            f"graft does not know that {type(model).__name__} leaves its attention to others, so "
            "packed rows might see each other"
        )
    return None


def plan_batches(
    config: TrainConfig, training: EncodedData, steps: int, max_length: int
) -> Batches:
    """Return what the batches of so many steps hold, with the batching that was chosen."""
    sequences = config.batch_size * len(sequences_of(training.examples[0]))
    name = config.batching
    lengths = training.facts.lengths
    sampler = make_sampler(name, training.examples, config.batch_size, config.seed)
    sizes = measure_batches(sampler, lengths, steps * config.grad_accum)
    longest = min(int(lengths.max()), max_length)
    if name == "packed":
        words = f"packed; padded, {sizes.padding:.0%} of the tokens would be padding"
        return Batches(sizes.most_tokens, longest, sequences, words)
    words = f"{name}; {sizes.padding:.0%} of the tokens are padding"
    return Batches(sequences * longest, longest, sequences, words)
