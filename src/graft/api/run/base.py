"""Loading a run's base: quantised for it, or as an earlier part of the run left it."""

from __future__ import annotations

import shutil
from pathlib import Path

from graft.adapters.starts.base import Packer
from graft.api.checks import default_solver
from graft.api.events import Events
from graft.api.quantize import Rounding, load_quantised
from graft.api.run.folder import load_run_base, write_base_reference
from graft.api.run.layout import BASE, BASE_REFERENCE, CHECKPOINTS
from graft.api.run.prepare import Prepared
from graft.export.registry import TARGETS
from graft.formats.config import WIDTHS
from graft.model.load import LoadedModel
from graft.model.save import save_model
from graft.model.targets import freeze_layers
from graft.train.checkpoint import checkpoint_step, checkpoints


def load_base(prepared: Prepared, run: Path, packer: Packer | None, events: Events) -> LoadedModel:
    """Load the base that a run trains on, and keep in the run's folder what loads it again.

    packer: what rounds each layer together with the start of its adapter.
    """
    config, method = prepared.config, prepared.method
    dtype = method.compute_dtype(config.dtype)
    saved = checkpoints(run / CHECKPOINTS)
    if prepared.dense_steps and (not saved or checkpoint_step(saved[-1]) <= prepared.dense_steps):
        shutil.rmtree(run / BASE, ignore_errors=True)  # rounded after the step that is resumed from
    if config.resume and ((run / BASE).is_dir() or (run / BASE_REFERENCE).is_file()):
        return load_run_base(run, config, dtype, config.device)
    assert config.solver is not None, "it is filled in"
    rounding = Rounding(
        weight_format=prepared.weight_format,
        solver=default_solver(None) if prepared.dense_steps else config.solver,
        targets=config.targets,
        calibration=prepared.training.examples[: config.calibration_rows],
        damping=config.damping,
        start=None if packer is None else packer.pack,
        budget=config.budget,
        widths=[
            bits
            for bits in WIDTHS
            if all(bits in TARGETS[target].widths for target in config.export)
        ],
    )
    loaded = load_quantised(
        prepared.subject,
        rounding,
        dtype=dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        events=events,
    )
    if prepared.weight_format is None:
        write_base_reference(run, prepared.subject.folder)
        if method.trains_adapter:
            freeze_layers(loaded.model, prepared.targets)
    elif not prepared.dense_steps:
        save_model(loaded, run / BASE)
    return loaded
