"""Compressing a model: low-rank factors of its matrices, rounded or not, measured against size."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from graft.adapters.attach import frozen_layers
from graft.api.checks import check_solver, chosen_solver, format_description
from graft.api.config import CompressConfig
from graft.api.events import Events
from graft.api.quantize import Rounding, load_quantised, round_loaded, text_rows
from graft.calibrate.factoring import ChooseRank, FactoredLayer, factor_model
from graft.calibrate.low_rank import Spectrum, rank_for_ratio
from graft.calibrate.registry import SOLVERS
from graft.data.examples import Example
from graft.errors import GraftError, Problems
from graft.evaluate.curve import plot_curve
from graft.evaluate.loss import evaluate_loss
from graft.files.write import check_new, make_folders, write_json
from graft.formats.base import WeightFormat, storage_bytes
from graft.formats.registry import parse_format
from graft.layers.factored import DOWN, UP
from graft.model.load import LoadedModel, load_model
from graft.model.save import named_tensors, narrowed, save_model
from graft.model.subject import Subject, open_subject
from graft.model.targets import linear_shape, select_targets
from graft.text import listed

COMPRESSED = "compress.json"
"""In the folder of a compressed model: its point of the curve, and what became of each layer."""
CURVE, PICTURE = "curve.json", "curve.png"
_INTEGERS = "int"
"""What --bits without --format means."""


@dataclass(frozen=True)
class Point:
    """A model of some size."""

    name: str
    """As in 'ratio 0.5'."""
    folder: str | None
    """Where it lies in --out; None: it was measured and not kept."""
    bytes: int
    """Of its tensors in the file, embeddings and head included."""
    parameters: int
    """Weights of the chosen matrices, or of the factors in their place."""
    perplexity: float | None = None
    """Per token of the evaluation text; None without any."""
    weight_error: float = 0.0
    """√ of the mean of ‖W - B A‖² / ‖W‖² over the chosen matrices, before rounding."""
    output_error: float | None = None
    """The same of their outputs on the calibration text; None without any."""
    whole: tuple[str, ...] = ()
    """The matrices whose factors would have been no smaller, and which stayed."""


@dataclass(frozen=True)
class Curve:
    """What several sizes cost."""

    model: str
    factors: str
    """In words: what they are the best for."""
    rounded: str | None
    """Format and solver, in words."""
    rows: int
    """Of text that the perplexity was measured on."""
    points: tuple[Point, ...]
    """The compressed models."""
    beside: tuple[Point, ...]
    """The original, and with --bits the original rounded alone."""


def compress(config: CompressConfig, events: Events | None = None) -> Curve:
    """Write compressed model folders, which `graft.load` loads, and return how good they are.

    One ratio, energy or rank gives config.out itself; several give a folder for each in it, with
    curve.json and curve.png. Raises GraftError with everything that does not fit, before weights
    are read.
    """
    events = events or Events()
    wanted, weight_format, solver = _checked(config)
    out = Path(config.out)
    check_new(out)
    subject = open_subject(config.model, config.trust_remote_code)
    if subject.formats or subject.factors:
        raise GraftError(
            f"{subject.folder} is quantised or compressed already; give the original model"
        )
    names = select_targets(subject.skeleton, config.targets)
    calibration, held_out = _texts(config, subject)
    if not held_out:
        events.note(
            "no text to measure the perplexity on: give --eval-data, or more rows of --data"
        )
    rounding = Rounding(
        weight_format=weight_format,
        solver=solver,
        targets=config.targets,
        calibration=calibration,
        damping=config.damping,
        budget=config.budget,
    )
    job = _Job(config, subject, names, rounding, held_out, events)
    beside = job.beside()
    several = len(wanted) > 1
    points = []
    for name, choose in wanted.items():
        folder = out / name.replace(" ", "-") if several else out
        if several:
            make_folders(out)
        points.append(job.point(name, choose, folder, out))
    curve = Curve(
        model=config.model,
        factors=f"the outputs on {len(calibration)} rows of {Path(config.data).name}"
        if config.data and calibration
        else "the weights",
        rounded=None if weight_format is None else f"{weight_format.words()}, {solver}",
        rows=len(held_out),
        points=tuple(points),
        beside=tuple(beside),
    )
    if several:
        write_json(out / CURVE, asdict(curve))
        curves = {"low-rank factors": drawn(curve.points)}
        plot_curve(curves, drawn(curve.beside), out / PICTURE, _title(curve))
    return curve


def _checked(
    config: CompressConfig,
) -> tuple[dict[str, ChooseRank], WeightFormat | None, str]:
    """Return how each size chooses its ranks, the format to round to, and the solver.

    Raises GraftError with everything that cannot be.
    """
    found = Problems()
    kinds = {"ratio": config.ratio, "energy": config.energy, "rank": config.rank}
    given = [kind for kind, values in kinds.items() if values]
    if len(given) != 1:
        said = " and ".join(f"--{kind}" for kind in given) or "none"
        found.found.append(f"give one of --ratio, --energy and --rank; {said} is given")
    for kind in ("ratio", "energy"):
        found.found += [
            f"--{kind} is {value:g}; expected more than 0 and less than 1"
            for value in kinds[kind]
            if not 0 < value < 1
        ]
    found.found += [f"--rank is {rank}; expected 1 or more" for rank in config.rank if rank < 1]
    for name in ("calibration_rows", "calibration_length", "eval_rows"):
        if getattr(config, name) < 1:
            found.found.append(f"--{name.replace('_', '-')} is {getattr(config, name)}; expected 1")
    description = None
    solver = chosen_solver(config)
    with found.collecting():
        rounds = config.bits is not None or config.group_size is not None or config.budget
        settings = config
        if config.format is None and rounds:
            settings = dataclasses.replace(config, format=_INTEGERS)
        description = format_description(settings, None)
    with found.collecting():
        if description is not None or config.solver is not None:
            check_solver(solver, description)
        if config.data is None and (SOLVERS[solver].needs_text or config.bits == "auto"):
            asked = "--bits auto" if config.bits == "auto" else f"--solver {solver}"
            raise GraftError(f"{asked} needs --data, whose text calibrates it")
    found.raise_all("nothing was started")
    weight_format = None if description is None else parse_format(description)
    wanted = {f"ratio {value:g}": _by_ratio(value, weight_format) for value in config.ratio}
    wanted |= {f"energy {value:g}": _by_energy(value) for value in config.energy}
    wanted |= {f"rank {value}": _by_rank(value) for value in config.rank}
    return wanted, weight_format, solver


def _by_ratio(ratio: float, weight_format: WeightFormat | None) -> ChooseRank:
    """Return what gives the largest rank of that share of the weights, or of the bytes once they
    are rounded: rows of codes are filled up to whole blocks."""
    if weight_format is None:
        return lambda seen: rank_for_ratio(ratio, *seen.weight.shape)

    def choose(seen: Spectrum) -> int:
        out_features, in_features = seen.weight.shape

        def stored(rank: int) -> int:
            down = storage_bytes(weight_format, rank, in_features)
            return down + storage_bytes(weight_format, out_features, rank)

        most = ratio * storage_bytes(weight_format, out_features, in_features)
        return max(1, bisect_right(range(1, len(seen.values) + 1), most, key=stored))

    return choose


def _by_energy(energy: float) -> ChooseRank:
    return lambda seen: seen.rank_for(energy)


def _by_rank(rank: int) -> ChooseRank:
    return lambda seen: min(rank, len(seen.values))


def _texts(config: CompressConfig, subject: Subject) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return the rows that calibrate, and those that the perplexity is measured on."""
    rows = [] if config.data is None else text_rows(config, subject, config.data)
    calibration, held_out = rows[: config.calibration_rows], rows[config.calibration_rows :]
    if config.eval_data is not None:
        held_out = text_rows(config, subject, config.eval_data)
    return calibration, held_out[: config.eval_rows]


@dataclass(frozen=True)
class _Job:
    """What every point of a curve shares."""

    config: CompressConfig
    subject: Subject
    names: list[str]
    rounding: Rounding
    held_out: Sequence[Example]
    events: Events

    def beside(self) -> list[Point]:
        """Return the original, and that rounded alone; without text they say nothing."""
        if not self.held_out:
            return []
        loaded = self._load()
        for note in loaded.notes:
            self.events.note(note)
        found = [self._measured("original", loaded)]
        if self.rounding.weight_format is not None:
            del loaded
            rounded = load_quantised(
                self.subject,
                self.rounding,
                dtype=self._dtype,
                device=self.config.device,
                trust_remote_code=self.config.trust_remote_code,
                events=self.events,
            )
            found.append(self._measured("rounded alone", rounded))
        return found

    def point(self, name: str, choose: ChooseRank, folder: Path, out: Path) -> Point:
        """Write the model of one size, and return how good it is."""
        loaded = self._load()
        rounds = self.rounding.weight_format is not None
        layers = factor_model(
            loaded.model,
            self.names,
            choose,
            self.rounding.batches if self.config.data is not None else (),
            self.config.damping,
            lambda done, total: self.events.progress(f"{name}: factors", done, total),
            None if rounds else loaded.source_dtype,
        )
        whole = tuple(name for name, layer in layers.items() if layer.rank is None)
        if whole:
            self.events.note(
                f"{name}: {len(whole)} of {len(layers)} layers stay whole, as their factors would "
                f"be no smaller: {listed(whole, 3)}"
            )
        if rounds:
            parts = [
                part
                for layer in self.names
                for part in ([layer] if layer in whole else [f"{layer}.{DOWN}", f"{layer}.{UP}"])
            ]
            round_loaded(loaded, parts, self.rounding, self.events)
        inside = None if folder == out else folder.name
        found = self._measured(name, loaded, layers, whole, inside)
        told = asdict(found) | {"layers": {key: asdict(layer) for key, layer in layers.items()}}
        save_model(loaded, folder, None if rounds else "exact", beside={COMPRESSED: told})
        return found

    @property
    def _dtype(self) -> str:
        # What is not compressed is written as it is, whatever this machine computes in.
        return "exact" if self.config.dtype == "auto" else self.config.dtype

    def _load(self) -> LoadedModel:
        return load_model(
            self.subject,
            dtype=self._dtype,
            device=self.config.device,
            trust_remote_code=self.config.trust_remote_code,
            on_tensor=lambda done, total: self.events.progress("reading the model", done, total),
        )

    def _measured(
        self,
        name: str,
        loaded: LoadedModel,
        layers: dict[str, FactoredLayer] | None = None,
        whole: tuple[str, ...] = (),
        folder: str | None = None,
    ) -> Point:
        perplexity = None
        if self.held_out:
            self.events.progress(f"{name}: perplexity", 0, 1)
            perplexity = evaluate_loss(loaded.model, self.held_out, 8).perplexity
        found = list((layers or {}).values())
        outputs = [layer.output_error for layer in found if layer.output_error is not None]
        shapes = (linear_shape(self.subject.skeleton.get_submodule(name)) for name in self.names)
        weights = sum(layer.weights for layer in found) or sum(map(math.prod, shapes))
        return Point(
            name=name,
            folder=folder,
            bytes=weight_bytes(loaded),
            parameters=weights,
            perplexity=perplexity,
            weight_error=_root_mean([layer.weight_error for layer in found] or [0.0]),
            output_error=_root_mean(outputs) if outputs else None,
            whole=whole,
        )


def _root_mean(values: Sequence[float]) -> float:
    return math.sqrt(sum(values) / len(values))


def drawn(points: Sequence[Point]) -> list[tuple[str, float, float | None, float]]:
    """Return of each point its name, its size in MiB, the perplexity, and the weights' error."""
    return [(one.name, one.bytes / 2**20, one.perplexity, one.weight_error) for one in points]


def _title(curve: Curve) -> str:
    rounded = "" if curve.rounded is None else f", rounded to {curve.rounded}"
    return f"{Path(curve.model).name}: low-rank factors for {curve.factors}{rounded}"


def weight_bytes(loaded: LoadedModel) -> int:
    """Return the bytes of the tensors that `save_model` writes of a model, each as narrow as it
    goes there."""
    packed = {
        f"{name}.{key}"
        for name, layer in frozen_layers(loaded.model)
        if layer.weight_format.quantised
        for key in layer.packed
    }
    stored = (
        tensor if name in packed else narrowed(tensor, loaded.source_dtype)
        for name, tensor in named_tensors(loaded.model)
    )
    return sum(tensor.numel() * tensor.itemsize for tensor in stored)
