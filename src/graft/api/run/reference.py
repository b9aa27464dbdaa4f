"""The reference of a run that learns from preferences: the model as it was before the first step.

It is no second model. Before the first step the adapter changes nothing, so the very model that is
about to be trained says what the reference says; that is kept, a number for each answer, in the
run's folder. It costs one forward pass over the rows that the steps will see, and nothing in a
step. Whoever needs more of it later (more steps, an evaluation) loads that model again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from graft.adapters.registry import method_of
from graft.adapters.starts.registry import STARTS
from graft.api.config import TrainConfig
from graft.api.events import Events
from graft.api.run.folder import load_run_base
from graft.api.run.layout import BASE, REFERENCE, START
from graft.api.run.prepare import Prepared
from graft.data.examples import Example
from graft.data.sampler import make_sampler
from graft.errors import GraftError
from graft.layers.activations import compute_with
from graft.model.adapter_files import load_adapter
from graft.model.load import LoadedModel, load_model
from graft.model.running.attention import use_own_attention
from graft.model.running.pointwise import use_own_pointwise
from graft.model.running.rotary import use_own_rotary
from graft.model.subject import open_subject
from graft.objectives.reference import (
    Known,
    Referenced,
    find_out,
    lacks,
    read_known,
    save_known,
    unknown,
)

TRAINING, HELD_OUT = "training", "held_out"


class References:
    """What the model said of a run's rows before the first step."""

    def __init__(self, run: Path, prepared: Prepared, events: Events) -> None:
        self._run, self._prepared, self._events = run, prepared, events
        self._rows = {
            TRAINING: prepared.training.examples,
            HELD_OUT: prepared.held_out.examples,
        }
        self._known = {name: unknown(rows) for name, rows in self._rows.items()}

    def read(self) -> None:
        """Take what an earlier part of the run has found out, and find out what it has not.

        The model from before the first step is loaded for the rest, and let go of again.
        """
        shapes = {name: known.shape for name, known in self._known.items()}
        try:
            self._known = read_known(self._run / REFERENCE, shapes)
        except GraftError as error:
            self._events.note(f"{error}; it is made anew")
        if any(self._missing().values()):
            self.find_out(model_before(self._run, self._prepared.config))

    def find_out(self, loaded: LoadedModel) -> None:
        """Find out what a model says that is as the run's was before its first step."""
        batch_size = self._prepared.config.batch_size
        for name, numbers in self._missing().items():
            rows, known = self._rows[name], self._known[name]
            find_out(known, loaded.model, rows, numbers, batch_size, self._heard)
        save_known(self._run / REFERENCE, self._known)

    def training(self) -> Sequence[Example]:
        """Return the training rows with their reference."""
        return Referenced(self._rows[TRAINING], self._known[TRAINING])

    def held_out(self) -> Sequence[Example]:
        """Return the held-out rows with theirs."""
        return Referenced(self._rows[HELD_OUT], self._known[HELD_OUT])

    def _missing(self) -> dict[str, list[int]]:
        """Return the rows that the run will see, and of which nothing is known."""
        numbers = {
            TRAINING: _seen(self._prepared, len(self._rows[TRAINING])),
            HELD_OUT: range(len(self._rows[HELD_OUT])),
        }
        return {name: lacks(self._known[name], some) for name, some in numbers.items()}

    def _heard(self, done: int, total: int) -> None:
        self._events.progress("what the model says before training", done, total)


def _seen(prepared: Prepared, count: int) -> Sequence[int]:
    """Return the training rows that the steps will see, which may be fewer than all."""
    config = prepared.config
    batches = prepared.steps * config.grad_accum
    if batches * config.batch_size >= count:
        return range(count)
    examples = prepared.training.examples
    sampler = make_sampler(config.batching, examples, config.batch_size, config.seed)
    drawn = itertools.chain.from_iterable(itertools.islice(sampler, batches))
    return sorted(set(drawn))


def model_before(run: Path, config: TrainConfig, dtype: str = "auto") -> LoadedModel:
    """Load the model that a run began with: its base, with a start that was not zero.

    A method that trains the weights themselves, or rounds them between two steps, began with the
    model that --model names. Raises GraftError when that is gone or has changed.
    """
    method = method_of(config)
    if not method.trains_adapter or method.rounds_in_training(config):
        subject = open_subject(config.model, config.trust_remote_code)
        asked = method.compute_dtype(config.dtype) if dtype == "auto" else dtype
        loaded = load_model(subject, dtype=asked, device=config.device)
    else:
        loaded = load_run_base(run, config, method.compute_dtype(config.dtype), config.device)
        # An unquantised base has nothing taken out of it: it is whole without the start.
        if STARTS[config.init].changes_base and (run / BASE).is_dir():
            load_adapter(loaded.model, run / START)
        compute_with(loaded.model, config.activations or "float")
    use_own_attention(loaded.model)
    use_own_pointwise(loaded.model)
    use_own_rotary(loaded.model)
    return loaded


def with_reference(
    rows: Sequence[Example],
    loaded: LoadedModel,
    batch_size: int,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Sequence[Example]:
    """Return rows with what a model says of them, its adapters off or on as they are."""
    known: Known = unknown(rows)
    find_out(known, loaded.model, rows, range(len(rows)), batch_size, on_batch)
    return Referenced(rows, known)
