"""Loading a base in a weight format, by rounding while it is read or by a calibrated solver."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from graft.adapters.starts.loftq import LoftQ
from graft.api.config import WIDTHS, QuantizeConfig, check_solver, chosen_solver, format_description
from graft.api.events import Events
from graft.calibrate.config import CALIBRATED, Solver
from graft.calibrate.driver import calibrate_model, drift_share
from graft.calibrate.hqq import hqq_pack
from graft.calibrate.widths import choose_widths
from graft.data.config import DataConfig
from graft.data.encode import Example
from graft.data.load import load_examples, resolve_max_length
from graft.errors import GraftError
from graft.formats.base import Packed, WeightFormat
from graft.formats.int_group import IntGroupFormat
from graft.formats.registry import parse_format
from graft.model.load import LoadedModel, PackLayer, load_model
from graft.model.save import save_model
from graft.model.targets import freeze_layers, select_targets


def load_quantised(
    model: str,
    weight_format: WeightFormat | None,
    *,
    targets: Sequence[str],
    dtype: str,
    device: str,
    trust_remote_code: bool,
    solver: Solver,
    calibration: Sequence[Example],
    damping: float,
    events: Events,
    loftq: LoftQ | None = None,
    budget: float | None = None,
    widths: Sequence[int] = WIDTHS,
) -> LoadedModel:
    """Load a base model with its target layers in a weight format; see `load_model`.

    rtn and hqq round each weight while it is read; gptq and qep load the whole model first and
    quantise it layer by layer on the calibration rows. With `loftq` each layer is rounded together
    with the start of its adapter. With a `budget` of bits per weight the model is first read as it
    is, to choose a width out of `widths` for each layer.
    """
    formats: WeightFormat | Mapping[str, WeightFormat] | None = weight_format
    batches = [torch.tensor([example.input_ids]) for example in calibration]
    if budget is not None:
        assert isinstance(weight_format, IntGroupFormat)
        dense = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        names = select_targets(dense.model, targets)
        freeze_layers(dense.model, names)
        candidates = [dataclasses.replace(weight_format, bits=bits) for bits in widths]
        formats = choose_widths(
            dense.model,
            names,
            batches,
            candidates,
            budget,
            lambda done, total: events.progress("choosing widths", done, total),
        )
        del dense
        events.note(_widths_note(formats))
    at_once = None if solver in CALIBRATED else formats
    loaded = load_model(
        model,
        weight_format=at_once,
        targets=targets,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        pack=_rounding(solver, loftq),
        on_tensor=lambda done, total: events.progress("reading the model", done, total),
    )
    if formats is not None and solver in CALIBRATED:
        names = select_targets(loaded.model, targets)
        freeze_layers(loaded.model, names)
        reports = calibrate_model(
            loaded.model,
            names,
            batches,
            formats,
            damping,
            lambda done, total: events.progress(solver, done, total),
            drift_share(solver),
        )
        gptq = sum(report.gptq for report in reports.values())
        rtn = sum(report.rtn for report in reports.values())
        events.note(
            f"{solver} on {len(batches)} rows: squared output error {gptq / rtn:.2f} times "
            "that of rounding to nearest"
        )
    return loaded


def _widths_note(formats: Mapping[str, IntGroupFormat]) -> str:
    counts = Counter(chosen.bits for chosen in formats.values())
    return "widths: " + ", ".join(
        f"{counts[bits]} layers of {bits} bits" for bits in sorted(counts)
    )


def _rounding(solver: Solver, loftq: LoftQ | None) -> PackLayer:
    """Return how the weight of one layer is rounded by itself."""

    def alone(weight: Tensor, weight_format: WeightFormat) -> Packed:
        if solver == "hqq":
            return hqq_pack(weight, weight_format)
        return weight_format.pack(weight)

    if loftq is None:
        return lambda _, weight, weight_format: alone(weight, weight_format)
    return lambda name, weight, weight_format: loftq.pack(
        name, weight, weight_format, lambda moved: alone(moved, weight_format)
    )


def quantize(config: QuantizeConfig, events: Events | None = None) -> Path:
    """Write a quantised model folder to config.out, which `graft.load` maps; return its path.

    Raises GraftError with everything that does not fit, before the weights are read.
    """
    events = events or Events()
    description = format_description(config, None)
    if description is None:
        raise GraftError("--format says nothing to quantise to; give nf4, fp4, int8 or int")
    solver = chosen_solver(config)
    check_solver(solver, description)
    measured = f"--solver {solver}" if solver in CALIBRATED else "--bits auto"
    if config.data is None and (solver in CALIBRATED or config.bits == "auto"):
        raise GraftError(f"{measured} needs --data, whose text calibrates it")
    out = Path(config.out)
    if out.exists():
        raise GraftError(f"{out} exists already; choose another name or remove it")
    loaded = load_quantised(
        config.model,
        parse_format(description),
        targets=config.targets,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        solver=solver,
        calibration=_calibration(config),
        damping=config.damping,
        events=events,
        budget=config.budget,
    )
    save_model(loaded, out)
    return out


def _calibration(config: QuantizeConfig) -> list[Example]:
    if config.data is None or (chosen_solver(config) not in CALIBRATED and config.bits != "auto"):
        return []
    from graft.model.load import find_folder, read_config, read_tokenizer

    folder = find_folder(config.model)
    model_config = read_config(folder, config.trust_remote_code)
    data = DataConfig(data=config.data, max_length=config.calibration_length, eos=False)
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and config.calibration_length > limit:
        data = DataConfig(data=config.data, max_length=limit, eos=False)
    tokenizer = read_tokenizer(folder, config.trust_remote_code)
    encoded = load_examples(config.data, tokenizer, data, resolve_max_length(data, limit))
    return encoded.examples[: config.calibration_rows]
