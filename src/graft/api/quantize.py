"""Loading a base in a weight format, by rounding while it is read or by a calibrated solver."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graft.adapters.attach import frozen_layers
from graft.api.checks import check_solver, chosen_solver, format_description
from graft.api.config import CompressConfig, QuantizeConfig
from graft.api.events import Events
from graft.calibrate.registry import SOLVERS
from graft.calibrate.widths import choose_widths
from graft.data.config import DataConfig
from graft.data.examples import Example
from graft.data.load import load_examples, resolve_max_length
from graft.errors import GraftError
from graft.files.write import check_new
from graft.formats.base import Packed, WeightFormat
from graft.formats.config import WIDTHS
from graft.formats.registry import describe_format, parse_format
from graft.model.left_out import left_out
from graft.model.load import LoadedModel, PackLayer, load_model
from graft.model.save import save_model
from graft.model.subject import Subject, open_subject
from graft.model.targets import freeze_layers, select_targets
from graft.model.tokens import check_tokens

PackAround = Callable[[str, Tensor, WeightFormat, Callable[[Tensor], Packed]], Packed]
"""Rounds the weight of the named layer to a format, given how the solver rounds a weight."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How the weights of a base are rounded."""

    weight_format: WeightFormat | None
    """None leaves them as they are."""
    solver: str = "rtn"
    targets: Sequence[str] = ()
    """As `select_targets` takes them."""
    calibration: Sequence[Example] = ()
    """The text that a solver may look at."""
    damping: float = 0.01
    start: PackAround | None = None
    """What rounds each layer together with the start of its adapter."""
    budget: float | None = None
    """Bits per weight; each layer then gets a width of its own."""
    widths: Sequence[int] = WIDTHS
    """The widths that a budget is spent on."""

    @property
    def batches(self) -> list[Tensor]:
        """The calibration text, input_ids int64 [1, tokens] by row."""
        return [torch.tensor([example.input_ids]) for example in self.calibration]


def load_quantised(
    model: str | Subject,
    rounding: Rounding,
    *,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    events: Events,
    trains_whole: bool = False,
) -> LoadedModel:
    """Load a base model with its target layers in a weight format; see `load_model`.

    A solver that needs the whole model is given it dense, with the calibration rows; any other
    rounds each weight while it is read. With a `budget` the model is first read as it is, to choose
    a width for each layer.
    """
    solver = SOLVERS[rounding.solver]

    def load(
        weight_format: WeightFormat | Mapping[str, WeightFormat] | None,
        pack: PackLayer | None = None,
        heard: Callable[[int, int], None] | None = None,
    ) -> LoadedModel:
        return load_model(
            model,
            weight_format=weight_format,
            targets=rounding.targets,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            pack=pack,
            on_tensor=heard,
            trains_whole=trains_whole,
        )

    def reading(done: int, total: int) -> None:
        events.progress("reading the model", done, total)

    formats: WeightFormat | Mapping[str, WeightFormat] | None = rounding.weight_format
    if rounding.budget is not None:
        formats = _chosen_widths(load(None), rounding, rounding.budget, events)
    if formats is None or not solver.needs_model:
        return load(formats, _packing(rounding), reading)
    loaded = load(None, heard=reading)
    _round(loaded, select_targets(loaded.model, rounding.targets), formats, rounding, events)
    return loaded


def round_loaded(
    loaded: LoadedModel, names: Sequence[str], rounding: Rounding, events: Events
) -> None:
    """Round the named layers of a dense model in memory as `load_quantised` rounds its targets."""
    formats: WeightFormat | Mapping[str, WeightFormat] | None = rounding.weight_format
    if rounding.budget is not None:
        formats = _widths(loaded, names, rounding, rounding.budget, events)
    assert formats is not None
    _round(loaded, names, formats, rounding, events)


def _round(
    loaded: LoadedModel,
    names: Sequence[str],
    formats: WeightFormat | Mapping[str, WeightFormat],
    rounding: Rounding,
    events: Events,
) -> None:
    freeze_layers(loaded.model, names)
    note = SOLVERS[rounding.solver].round_model(
        loaded.model,
        formats if isinstance(formats, Mapping) else dict.fromkeys(names, formats),
        rounding.batches,
        rounding.damping,
        lambda done, total: events.progress(rounding.solver, done, total),
    )
    if note is not None:
        events.note(note)


def _chosen_widths(
    dense: LoadedModel, rounding: Rounding, budget: float, events: Events
) -> dict[str, WeightFormat]:
    """Return the format of each target: the one of the rounding, in one of its widths."""
    names = select_targets(dense.model, rounding.targets)
    return _widths(dense, names, rounding, budget, events)


def _widths(
    dense: LoadedModel, names: Sequence[str], rounding: Rounding, budget: float, events: Events
) -> dict[str, WeightFormat]:
    assert rounding.weight_format is not None
    freeze_layers(dense.model, names)
    description = describe_format(rounding.weight_format)
    candidates = {parse_format(description | {"bits": bits}): bits for bits in rounding.widths}
    formats = choose_widths(
        dense.model,
        names,
        rounding.batches,
        list(candidates),
        budget,
        lambda done, total: events.progress("choosing widths", done, total),
    )
    counts = Counter(candidates[chosen] for chosen in formats.values())
    words = ", ".join(f"{counts[bits]} layers of {bits} bits" for bits in sorted(counts))
    events.note(f"widths: {words}")
    return formats


def _packing(rounding: Rounding) -> PackLayer:
    """Return how the weight of one layer is rounded by itself."""
    solver, start = SOLVERS[rounding.solver], rounding.start
    if start is None:
        return lambda _, weight, weight_format: solver.pack(weight, weight_format)
    return lambda name, weight, weight_format: start(
        name, weight, weight_format, lambda moved: solver.pack(moved, weight_format)
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
    reads_text = SOLVERS[solver].needs_text
    if config.data is None and (reads_text or config.bits == "auto"):
        measured = f"--solver {solver}" if reads_text else "--bits auto"
        raise GraftError(f"{measured} needs --data, whose text calibrates it")
    out = Path(config.out)
    check_new(out)
    subject = open_subject(config.model, config.trust_remote_code)
    rounding = Rounding(
        weight_format=parse_format(description),
        solver=solver,
        targets=config.targets,
        calibration=calibration_rows(config, subject)
        if reads_text or config.bits == "auto"
        else (),
        damping=config.damping,
        budget=config.budget,
    )
    loaded = load_quantised(
        subject,
        rounding,
        # What is not quantised is written as it is, whatever this machine computes in.
        dtype="exact" if config.dtype == "auto" else config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        events=events,
    )
    for note in loaded.notes:
        events.note(note)
    save_model(loaded, out)
    names = [name for name, layer in frozen_layers(loaded.model) if layer.weight_format.quantised]
    if rest := left_out(subject.skeleton, names, "quantises"):
        events.note(rest)
    return out


def calibration_rows(
    config: QuantizeConfig | CompressConfig, subject: Subject
) -> Sequence[Example]:
    """Return the rows of text that solvers look at; raises GraftError for text that is none."""
    assert config.data is not None
    return text_rows(config, subject, config.data)[: config.calibration_rows]


def text_rows(
    config: QuantizeConfig | CompressConfig, subject: Subject, file: str
) -> Sequence[Example]:
    """Return the rows of a file of text, as they calibrate."""
    limit = subject.position_limit
    length = min(config.calibration_length, limit or config.calibration_length)
    settings = DataConfig(
        data=file,
        columns=config.columns,
        data_format=config.data_format,
        max_length=length,
        eos=False,
    )
    longest = resolve_max_length(settings, limit)
    examples = load_examples(file, subject.tokenizer, settings, longest).examples
    check_tokens(subject.skeleton, subject.tokenizer, examples)
    return examples
