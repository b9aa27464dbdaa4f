"""How a run's adapters begin: what their start asks of the base, and what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from graft.adapters.attach import frozen_layers, replace_module
from graft.adapters.starts.base import Preparation
from graft.adapters.starts.registry import STARTS
from graft.api.events import Events
from graft.api.run.layout import BASE, START
from graft.api.run.prepare import Prepared
from graft.calibrate.inputs import look_at_inputs
from graft.files.write import remove_folder
from graft.model.adapter_files import read_factors, save_adapter
from graft.model.load import LoadedModel
from graft.train.checkpoint import parameter_shapes
from graft.train.stop import Stop

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""A and B by layer."""


def prepare_layers(
    loaded: LoadedModel,
    prepared: Prepared,
    preparation: Preparation | None,
    run: Path,
    checkpoint: Path | None,
    events: Events,
    stop: Stop,
) -> Mapping[str, int] | None:
    """Let a start look at the frozen layers and change those that are not quantised.

    Returns the layers' ranks, where they have ranks of their own. With a checkpoint the layers
    become what they were when the run began.
    """
    if preparation is None:
        return None
    start = STARTS[prepared.config.init]
    quantised = prepared.weight_format is not None
    if checkpoint is None and start.reads_inputs and not (start.changes_base and quantised):
        look(loaded, prepared, preparation, events, stop)
    if taken_out(prepared):
        if checkpoint is not None:
            preparation.recall(read_factors(run / START))
        _change_layers(loaded, prepared, preparation)
    if not start.chooses_ranks:
        return None
    if checkpoint is None:
        return preparation.ranks()
    factors = parameter_shapes(checkpoint, ".A")
    return {name: factors[name][0] if name in factors else 0 for name in prepared.targets}


def look(
    loaded: LoadedModel,
    prepared: Prepared,
    preparation: Preparation,
    events: Events,
    stop: Stop,
) -> None:
    """Show a start what the frozen target layers get as inputs on rows of the training data."""
    rows = prepared.calibration

    def on_layer(done: int, total: int) -> None:
        stop.check()
        events.progress("looking at the layers' inputs", done, total)

    batches = [torch.tensor([row.input_ids]) for row in rows]
    look_at_inputs(loaded.model, prepared.targets, batches, preparation.look, on_layer)


def taken_out(prepared: Prepared) -> bool:
    """Return whether what an adapter began with is taken out of it when it is saved.

    It is then an ordinary one on the unquantised base that the run names. What a quantised base
    lost in its rounding, no adapter can say.
    """
    return STARTS[prepared.config.init].changes_base and prepared.weight_format is None


def _change_layers(loaded: LoadedModel, prepared: Prepared, preparation: Preparation) -> None:
    layers = dict(frozen_layers(loaded.model))
    for name in prepared.targets:
        layer = layers.pop(name)
        kept = layer.weight_format
        packed = preparation.pack(name, layer.dense_weight(torch.float32), kept, kept.pack)
        replace_module(loaded.model, name, layer.replaced(kept, packed))


def begin_adapters(
    loaded: LoadedModel,
    prepared: Prepared,
    preparation: Preparation | None,
    run: Path,
    events: Events,
) -> None:
    """Begin the adapters; a start that changed the base is kept."""
    init = prepared.config.init
    start = STARTS[init]
    note = start.begin(loaded.model, preparation)
    if start.changes_base:
        remove_folder(run / START)
        save_adapter(loaded.model, run / START, base=str(run / BASE), init=init)
    if note is not None:
        events.note(note)
