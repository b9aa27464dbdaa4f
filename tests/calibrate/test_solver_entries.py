"""A solver is an entry: two that are written here are taken through quantising and training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import graft
from graft.adapters.attach import frozen_layers
from graft.api.config import QuantizeConfig, TrainConfig
from graft.api.events import Events
from graft.api.finetune import finetune
from graft.api.quantize import quantize
from graft.api.run.folder import read_run_config
from graft.api.run.layout import BASE
from graft.calibrate.base import Solver
from graft.calibrate.driver import Calibrated
from graft.calibrate.hessian import HessianSum
from graft.calibrate.registry import SOLVERS
from graft.errors import GraftError
from graft.formats.base import Packed, WeightFormat
from graft.formats.codebook import CodebookFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.formats.latent import LatentFormat
from graft.formats.registry import FORMATS, make_format
from graft.model.load import load_model
from graft.model.targets import freeze_layers, linear_layers


class Shrinking(Solver):
    """Rounds towards zero: to the nearest value of three quarters of the weight."""

    name = "shrinking"

    def pack(self, weight: Tensor, weight_format: WeightFormat) -> Packed:
        return weight_format.pack(0.75 * weight.float())


class Loudest(Calibrated):
    """Keeps the inputs that calibration text drives hardest, and rounds the others to zero."""

    name = "loudest"

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def pack_on(
        self, weight: Tensor, inputs: HessianSum, weight_format: WeightFormat, damping: float
    ) -> Packed:
        self.tokens.append(inputs.tokens)
        power = inputs.value.diagonal()
        return weight_format.pack(weight * (power > power.median()))


@pytest.fixture
def shrinking() -> Iterator[Solver]:
    SOLVERS.add("shrinking", solver := Shrinking())
    yield solver
    SOLVERS.remove("shrinking")


@pytest.fixture
def loudest() -> Iterator[Loudest]:
    SOLVERS.add("loudest", solver := Loudest())
    yield solver
    SOLVERS.remove("loudest")


class Notes(Events):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def training(base: Path, rows: Path, out: Path, **settings: object) -> TrainConfig:
    return TrainConfig(
        model=str(base), data=str(rows), out=str(out), steps=4, batch_size=4, **settings
    )


def layers(folder: Path) -> dict[str, dict[str, Tensor]]:
    model, _ = graft.load(folder)
    return {name: layer.packed for name, layer in frozen_layers(model)}


def assert_shrunk(folder: Path, base: Path, weight_format: WeightFormat) -> None:
    dense = linear_layers(load_model(str(base)).model)
    found = layers(folder)
    assert len(found) == 14
    for name, packed in found.items():
        expected = weight_format.pack(0.75 * dense[name].weight)
        assert all(torch.equal(packed[key], expected[key]) for key in expected)


def test_a_solver_of_single_weights(
    shrinking: Solver, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    settings = {"solver": "shrinking", "format": "nf4"}
    quantize(QuantizeConfig(model=str(tiny_base), out=str(tmp_path / "quantised"), **settings))
    assert_shrunk(tmp_path / "quantised", tiny_base, CodebookFormat())
    run = tmp_path / "run"
    finetune(training(tiny_base, rows, run, method="qalora", solver="shrinking"))
    assert_shrunk(run / BASE, tiny_base, IntGroupFormat())
    assert read_run_config(run).solver == "shrinking"


def test_a_solver_that_reads_text(
    loudest: Loudest, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    settings = {"model": str(tiny_base), "format": "int", "solver": "loudest"}
    with pytest.raises(GraftError, match="--solver loudest needs --data"):
        quantize(QuantizeConfig(out=str(tmp_path / "quantised"), **settings))
    events = Notes()
    quantize(QuantizeConfig(data=str(rows), out=str(tmp_path / "quantised"), **settings), events)
    assert len(loudest.tokens) == 14 and min(loudest.tokens) > 0
    (note,) = events.notes
    assert note.startswith("loudest on 40 rows: squared output error")
    run = tmp_path / "run"
    finetune(training(tiny_base, rows, run, method="affine", solver="loudest"))
    quiet = [packed["scales"] for packed in layers(run / BASE).values()]
    nearest = tmp_path / "nearest"
    quantize(QuantizeConfig(model=str(tiny_base), format="int", out=str(nearest)))
    plain = [packed["scales"] for packed in layers(nearest).values()]
    assert not any(torch.equal(found, other) for found, other in zip(quiet, plain, strict=True))


def test_it_rounds_in_mid_training_too(
    loudest: Loudest, shrinking: Solver, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    settings = {"method": "merge_aware", "dense_fraction": 0.5}
    finetune(training(tiny_base, rows, tmp_path / "run", solver="loudest", **settings))
    assert len(loudest.tokens) == 14
    with pytest.raises(GraftError, match="in mid-training, by gptq or qep or loudest"):
        finetune(training(tiny_base, rows, tmp_path / "other", solver="shrinking", **settings))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_entry_rounds_a_model_in_memory_or_says_why_not(
    name: str, kind: str, tiny_base: Path
) -> None:
    solver, weight_format = SOLVERS[name], make_format(kind)
    assert solver.name == name and SOLVERS.summary(name)
    model = load_model(str(tiny_base)).model
    names = list(linear_layers(model))
    freeze_layers(model, names)
    before = {key: layer.dense_weight() for key, layer in frozen_layers(model)}
    seen: list[int] = []

    def rounded() -> None:
        solver.round_model(
            model,
            dict.fromkeys(names, weight_format),
            [torch.arange(40).reshape(1, 40)],
            0.01,
            lambda done, total: seen.append(done),
        )

    if solver.problem(weight_format) is not None:
        with pytest.raises(GraftError):
            rounded()
        assert not seen
        return
    rounded()
    assert seen == list(range(1, 15))
    for key, layer in frozen_layers(model):
        assert layer.weight_format == weight_format
        assert (layer.dense_weight() - before[key]).norm() < 0.25 * before[key].norm()


def test_what_each_entry_says_of_each_kind_of_format() -> None:
    formats = {
        None: None,
        "int": IntGroupFormat(),
        "nf4": CodebookFormat(),
        "latent": LatentFormat(),
        "int8": Int8Format(),
    }
    refused = {
        (name, kind)
        for name in ("rtn", "gptq", "qep", "hqq")
        for kind, weight_format in formats.items()
        if SOLVERS[name].problem(weight_format) is not None
    }
    assert refused == {
        *((name, None) for name in ("gptq", "qep", "hqq")),
        *((name, "int8") for name in ("gptq", "qep", "hqq")),
        *(("hqq", kind) for kind in ("nf4", "latent")),
    }
