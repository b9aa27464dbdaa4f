"""Loading a run's base: quantised for it, or as an earlier part of the run left it."""

from __future__ import annotations

from pathlib import Path

from graft.adapters.starts.base import Preparation
from graft.adapters.starts.registry import STARTS
from graft.api.checks import default_solver
from graft.api.events import Events
from graft.api.quantize import Rounding, load_quantised
from graft.api.run.folder import load_run_base, write_base_reference
from graft.api.run.layout import BASE, BASE_REFERENCE
from graft.api.run.prepare import Prepared
from graft.api.run.starting import look
from graft.export.registry import TARGETS
from graft.files.read import passing_damage
from graft.files.write import remove_folder
from graft.formats.config import WIDTHS
from graft.model.folder import check_weights
from graft.model.load import LoadedModel, load_model
from graft.model.save import save_model
from graft.model.targets import freeze_layers
from graft.model.weight_files import WeightFiles
from graft.train.stop import Stop


def load_base(
    prepared: Prepared, run: Path, preparation: Preparation | None, events: Events, stop: Stop
) -> LoadedModel:
    """Load the base that a run trains on, and keep in the run's folder what loads it again.

    One that lies there whole is taken as it is. preparation: what rounds each layer
    together with the start of its adapter.
    """
    config, method = prepared.config, prepared.method
    dtype = method.compute_dtype(config.dtype)
    unquantised = prepared.weight_format is None
    if base_is_whole(run) or (unquantised and (run / BASE_REFERENCE).is_file()):
        return load_run_base(run, config, dtype, config.device)
    assert config.solver is not None, "it is filled in"
    start = STARTS[config.init]
    if preparation is not None and start.reads_inputs and start.changes_base and not unquantised:
        _look_at_dense(prepared, preparation, events, stop)
    rounding = Rounding(
        weight_format=prepared.weight_format,
        solver=default_solver(None) if prepared.dense_steps else config.solver,
        targets=config.targets,
        calibration=prepared.calibration,
        damping=config.damping,
        start=None if preparation is None else preparation.pack,
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
        trains_whole=not method.trains_adapter,
    )
    if unquantised:
        write_base_reference(run, prepared.subject.folder, bool(prepared.subject.parted))
        if method.trains_adapter:
            freeze_layers(loaded.model, prepared.targets)
    elif not prepared.dense_steps:
        save_base(loaded, run)
    return loaded


def _look_at_dense(
    prepared: Prepared, preparation: Preparation, events: Events, stop: Stop
) -> None:
    """Show a start the unquantised layers and their inputs, before each is rounded as it is read.

    The model is read once more for that.
    """
    config = prepared.config
    dense = load_model(
        prepared.subject,
        dtype=prepared.method.compute_dtype(config.dtype),
        device=config.device,
        on_tensor=lambda done, total: events.progress("reading the model", done, total),
    )
    freeze_layers(dense.model, prepared.targets)
    look(dense, prepared, preparation, events, stop)


def save_base(loaded: LoadedModel, run: Path) -> None:
    """Write the packed base of a run."""
    remove_folder(run / BASE)
    save_model(loaded, run / BASE)


def base_is_whole(run: Path) -> bool:
    """Return whether a run's folder holds its base, as it was written.

    Raises GraftError when it cannot be read for another reason than damage.
    """
    if (run / BASE).is_dir():
        with passing_damage():
            check_weights(run / BASE)
            WeightFiles(run / BASE)
            return True
    return False
