"""One of each kind of entry, made in this file, through a whole run: what a newcomer writes.

A method with its adapter, a start, a solver, a shape of rows, an objective, an optimizer and an
export target. Nothing under src/graft knows of them but the tables that they are added to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import graft
from graft.adapters.adapted import AdaptedLinear
from graft.adapters.attach import adapted_layers
from graft.adapters.base import Adapter, StoredAdapter, fill
from graft.adapters.config import AdapterConfig
from graft.adapters.method import Kept, Method
from graft.adapters.registry import METHODS
from graft.adapters.starts.base import Preparation, Start
from graft.adapters.starts.registry import STARTS
from graft.api.config import PlanConfig, as_plain
from graft.api.plan import plan
from graft.api.run.folder import load_any, prompt_style
from graft.calibrate.base import Solver
from graft.calibrate.registry import SOLVERS
from graft.cli.main import main
from graft.data.batches import IGNORED, Batch
from graft.data.shapes.base import AnsweredShape, Tokenizer
from graft.data.shapes.registry import SHAPES
from graft.entries import Entries
from graft.errors import GraftError
from graft.export.base import OnTensor, Origin, Target, Usage
from graft.export.registry import TARGETS
from graft.files.write import new_folder, write_json
from graft.formats.base import Packed, WeightFormat
from graft.layers.frozen import FrozenLinear
from graft.model.load import LoadedModel
from graft.objectives.base import Objective
from graft.objectives.registry import OBJECTIVES
from graft.optimizers.base import OptimizerKind, OptimizerSettings
from graft.optimizers.registry import OPTIMIZERS

# A method: (IA)³, arXiv 2205.05638 ----------------------------------------------------------------


class GainAdapter(Adapter):
    """y = (1 + g) W x; g: float32 [out_features], zero."""

    method = "gain"
    own_names = ("g",)

    def __init__(self, out_features: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(out_features, device=device))

    @classmethod
    def from_layer(cls, layer: FrozenLinear, config: AdapterConfig) -> Self:
        return cls(layer.out_features, next(layer.parameters()).device)

    @classmethod
    def from_stored(cls, layer: FrozenLinear, stored: StoredAdapter) -> Self:
        adapter = cls(layer.out_features)
        fill(adapter, stored.tensors)
        return adapter

    def added_output(self, x: Tensor, base: FrozenLinear) -> Tensor:
        return base.linear(x, base.packed) * self.g.to(x.dtype)

    def delta(self, base: FrozenLinear) -> Tensor:
        return self.g.double()[:, None] * base.dense_weight(torch.float32).double()


class Gain(Method):
    """A gain for each output of each layer."""

    name = "gain"
    adapter = GainAdapter
    default_format = "int"

    def card_rows(self, config: AdapterConfig) -> dict[str, object]:
        return {"gains": "one per output"}

    def learning_rate(self, config: AdapterConfig, hidden_size: int) -> float:
        return 0.01

    def kept(self, layer: AdaptedLinear, config: AdapterConfig, dtype: torch.dtype) -> Kept:
        return Kept(2 * (layer.base.out_features,), per_token=layer.base.out_features)


class Raised(Start):
    """Every gain begins at 1/8."""

    name = "raised"

    def problems(self, config: AdapterConfig, **facts: Any) -> list[str]:
        return [] if config.method == "gain" else [f"--init raised: {config.method} has no gains"]

    def begin(
        self, model: nn.Module, preparation: Preparation | None, name: str = "default"
    ) -> str:
        with torch.no_grad():
            for _, layer in adapted_layers(model):
                layer.adapter(name).get_parameter("g").fill_(0.125)
        return "all gains are raised"


class Shrinking(Solver):
    """Rounds to the value nearest to three quarters of the weight."""

    name = "shrinking"

    def pack(self, weight: Tensor, weight_format: WeightFormat) -> Packed:
        return weight_format.pack(0.75 * weight.float())


# What is learned, and how -------------------------------------------------------------------------


class Translated(AnsweredShape):
    """{"source": ..., "target": ...}."""

    name = "translated"
    required = ("source", "target")
    answer = "target"

    def render_prompt(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> str:
        return f"{fields['source']} => "


class Softened(Objective):
    """The next token, with label smoothing of a tenth."""

    name = "softened"

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
        loss = functional.cross_entropy(
            logits.transpose(1, 2),
            batch.labels[:, 1:],
            ignore_index=IGNORED,
            label_smoothing=0.1,
            reduction="sum",
        )
        return loss, {}


class Momentum(OptimizerKind):
    """Gradient descent with momentum."""

    name = "momentum"
    states = ("momentum_buffer",)
    memory_note = "momentum: one state per trained parameter"

    def make(
        self,
        groups: list[dict[str, Any]],
        learning_rate: float,
        settings: OptimizerSettings,
        device: torch.device,
    ) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)

    def state_bytes(self, numbers: int, size: int) -> int:
        return size


# Where it goes ------------------------------------------------------------------------------------


class Summary(Target):
    """A folder whose one file says the mean of every layer's weight."""

    name = "summary"

    def write(
        self, loaded: LoadedModel, path: Path, origin: Origin, on_tensor: OnTensor
    ) -> tuple[str, ...]:
        layers = [
            (name, layer)
            for name, layer in loaded.model.named_modules()
            if isinstance(layer, FrozenLinear)
        ]
        with new_folder(path) as part:
            means = {
                name: layer.dense_weight(torch.float32).mean().item() for name, layer in layers
            }
            write_json(part / "means.json", means)
        on_tensor(len(layers), len(layers))
        return (f"the means of {len(layers)} layers",)

    def usage(self, file: str, base: str | None) -> Usage:
        return Usage("Read it:", "", f"cat {file}/means.json")

    def matches(self, path: Path) -> bool:
        return (path / "means.json").is_file()


TOYS: list[tuple[Entries[Any], Any]] = [
    (METHODS, Gain()),
    (STARTS, Raised()),
    (SOLVERS, Shrinking()),
    (SHAPES, Translated()),
    (OBJECTIVES, Softened()),
    (OPTIMIZERS, Momentum()),
    (TARGETS, Summary()),
]


@pytest.fixture(scope="module", autouse=True)
def _toys() -> Iterator[None]:
    for table, toy in TOYS:
        table.add(toy.name, toy)
    yield
    for table, toy in TOYS:
        table.remove(toy.name)


Settings = Callable[..., graft.TrainConfig]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows: Path) -> Settings:
    data = tmp_path_factory.mktemp("translated") / "rows.jsonl"
    read = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({"source": row["prompt"], "target": row["completion"]}) for row in read]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def make(out: Path, **changes: Any) -> graft.TrainConfig:
        toys = {
            "method": "gain",
            "init": "raised",
            "solver": "shrinking",
            "objective": "softened",
            "optimizer": "momentum",
            "export": ("summary",),
        }
        sizes = {"steps": 4, "save_every": 2, "batch_size": 4, "max_length": 48}
        options = toys | sizes | changes
        return graft.TrainConfig(model=str(tiny_base), data=str(data), out=str(out), **options)

    return make


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> Path:
    folder = tmp_path_factory.mktemp("toys") / "run"
    file = folder.with_name("settings.yaml")
    file.write_text(yaml.safe_dump(as_plain(settings(folder))), encoding="utf-8")
    assert main(["train", str(file)]) == 0
    return folder


def test_the_run_trained_what_the_entries_say(run: Path, tiny_base: Path) -> None:
    gains = load_file(run / "adapter" / "adapter_model.safetensors")
    assert gains and all(name.endswith(".g") for name in gains)
    assert all(gain.sub(0.125).abs().max() < 0.1 for gain in gains.values()), "the start"
    assert any(not torch.equal(gain, torch.full_like(gain, 0.125)) for gain in gains.values())
    states = load_file(run / "checkpoints" / "step-00000004" / "state.safetensors")
    assert any(name.startswith("optimizer.momentum_buffer.") for name in states)
    layer = "model.layers.0.mlp.down_proj"
    base = load_any(run).model.get_submodule(f"{layer}.base")
    weight = load_file(tiny_base / "model.safetensors")[f"{layer}.weight"].float()
    assert isinstance(base, FrozenLinear)
    rounded = base.dense_weight(torch.float32)
    assert (rounded.norm() / weight.norm()).item() == pytest.approx(0.75, abs=0.02), "the solver"


def test_a_resumed_run_ends_as_the_unbroken_one(
    run: Path, settings: Settings, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    for folder in ("checkpoints/step-00000004", "adapter", "export"):
        shutil.rmtree(broken / folder)
    graft.finetune(settings(broken, resume=True))
    adapters = [folder / "adapter" / "adapter_model.safetensors" for folder in (run, broken)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_the_merged_model_is_the_trained_one(run: Path, tmp_path: Path) -> None:
    report = graft.merge(run, tmp_path / "merged")
    assert not report.exact
    assert report.max_logit_difference < 1e-4
    style = prompt_style(run)
    assert style.kind == "translated"
    trained, merged = (
        graft.generate(folder, "A stone", style=style) for folder in (run, tmp_path / "merged")
    )
    assert trained == merged


def test_the_plan_counts_what_trains(tiny_base: Path) -> None:
    found = plan(PlanConfig(model=str(tiny_base), method="gain", optimizer="momentum"))
    rows = {row.name: row for row in found.rows}
    assert rows["optimizer"].note == Momentum.memory_note
    assert found.trainable_parameters == sum(
        layer.out_features for layer in _linear_layers(tiny_base)
    )


def _linear_layers(folder: Path) -> list[nn.Linear]:
    model = load_any(folder).model
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def test_report_and_card_tell_of_them(run: Path) -> None:
    report = (run / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# gain on ")
    exported = run / "export" / "summary"
    card = (exported / "README.md").read_text(encoding="utf-8")
    for told in ("one per output", "raised", "shrinking", "translated", "the means of"):
        assert told in card, told
    assert "cat summary/means.json" in card
    assert json.loads((exported / "means.json").read_text(encoding="utf-8"))


def test_the_command_line_offers_them(
    capsys: pytest.CaptureFixture[str], tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help-all"])
    told = capsys.readouterr().out
    for table, toy in TOYS:
        assert table is SHAPES or toy.name in told, toy.name
    words = ["--model", str(tiny_base), "--data", str(rows), "--out", str(tmp_path / "run")]
    assert main(["train", *words, "--init", "raised"]) == 1
    assert "qalora has no gains" in capsys.readouterr().err


def test_what_one_cannot_do_is_told_before_training(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="--dropout belongs to lora and qlora, not to gain"):
        graft.finetune(settings(tmp_path / "run", dropout=0.1))
    with pytest.raises(GraftError, match="export peft: PEFT has no gain adapter"):
        graft.finetune(settings(tmp_path / "run", export=("peft",)))
    assert not (tmp_path / "run").exists()
