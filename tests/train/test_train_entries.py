"""A shape, an objective and an optimizer that are added from outside, through a whole training."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

import graft
from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.api.config import PlanConfig
from graft.api.events import Events
from graft.api.plan import plan
from graft.data.batches import IGNORED, Batch, collate
from graft.data.config import DataConfig
from graft.data.encode import EncodedData, Example
from graft.data.load import load_train_and_eval
from graft.data.shapes.base import AnsweredShape, Rendered, RowShape, Tokenizer
from graft.data.shapes.registry import SHAPES
from graft.errors import GraftError
from graft.evaluate.loss import evaluate_loss
from graft.model.load import load_model
from graft.model.targets import freeze_layers, select_targets
from graft.objectives.base import Objective
from graft.objectives.registry import OBJECTIVES
from graft.optimizers.base import OptimizerKind, OptimizerSettings
from graft.optimizers.registry import OPTIMIZERS
from graft.train.config import LoopConfig
from graft.train.loop import train
from graft.train.metrics import Metrics, read_metrics
from graft.train.task import TrainingTask

SMOOTHING = 0.1
NOT_TIMED = ("step", "loss", "learning_rate", "grad_norm", "weight", "right", "eval_loss")


class Rated(AnsweredShape):
    """{"question": ..., "answer": ..., "rating": how much the row counts}."""

    name = "rated"
    required = ("question", "answer", "rating")
    answer = "answer"

    def problems(self, fields: Mapping[str, Any]) -> list[str]:
        rating = fields["rating"]
        wrong = [] if isinstance(rating, int | float) else [f"'rating' is {rating!r}"]
        return super().problems({key: fields[key] for key in ("question", "answer")}) + wrong

    def render(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> Rendered:
        whole = super().render(fields, tokenizer, separator)
        return Rendered(whole.text, whole.spans, {"rating": float(fields["rating"])})

    def render_prompt(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> str:
        return f"Q: {fields['question']}\nA: "


@dataclass(frozen=True)
class RatedBatch(Batch):
    """Rows that count differently; ratings: float32 [batch]."""

    ratings: Tensor

    @property
    def targets(self) -> float:
        return (self.ratings * (self.labels[:, 1:] != IGNORED).sum(1)).sum().item()


class SmoothedNextToken(Objective):
    """Next token with label smoothing; a row's tokens count as the row is rated."""

    name = "smoothed"
    counted = "weight"

    def takes(self, shape: RowShape) -> bool:
        return "rating" in shape.required

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = collate(examples)
        ratings = torch.tensor([example.values["rating"] for example in examples])
        return RatedBatch(batch.input_ids, batch.labels, ratings)

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        assert isinstance(batch, RatedBatch)
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
        labels = batch.labels[:, 1:]
        losses = functional.cross_entropy(
            logits.transpose(1, 2), labels, reduction="none", label_smoothing=SMOOTHING
        )
        right = (logits.argmax(-1) == labels).sum(1)
        return (batch.ratings @ losses.sum(1)), {"right": (batch.ratings @ right.float()).item()}


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
        return torch.optim.SGD(
            groups, lr=learning_rate, momentum=0.9, weight_decay=settings.weight_decay
        )

    def state_bytes(self, numbers: int, size: int) -> int:
        return size


@pytest.fixture(autouse=True)
def _entries() -> Iterator[None]:
    SHAPES.add("rated", Rated())
    OBJECTIVES.add("smoothed", SmoothedNextToken())
    OPTIMIZERS.add("momentum", Momentum())
    yield
    SHAPES.remove("rated")
    OBJECTIVES.remove("smoothed")
    OPTIMIZERS.remove("momentum")


@pytest.fixture(scope="module")
def rated_rows(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    path = tmp_path_factory.mktemp("rated") / "rows.jsonl"
    read = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    lines = [
        json.dumps({"question": row["prompt"], "answer": row["completion"], "rating": 1 + n % 3})
        for n, row in enumerate(read)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Run:
    """A model with an adapter, ready to train on the rated rows."""

    def __init__(self, base: Path, data: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        loaded = load_model(str(base), dtype="float32")
        names = select_targets(loaded.model, ("q_proj", "v_proj"))
        freeze_layers(loaded.model, names)
        attach_adapter(loaded.model, names, AdapterConfig(method="lora", rank=4))
        config = DataConfig(data=str(data), max_length=48)
        self.training: EncodedData
        self.training, self.held_out = load_train_and_eval(config, loaded.tokenizer, 48, 0)
        self.model, self.folder = loaded.model, folder
        self.parameters = adapter_parameters(loaded.model, "default")
        self.objective, self.optimizer = OBJECTIVES["smoothed"], OPTIMIZERS["momentum"]
        self.began: list[tuple[int, int]] = []

    def train(self, checkpoint: Path | None = None, **changes: Any) -> Metrics:
        task = TrainingTask(
            model=self.model,
            parameters=self.parameters,
            examples=self.training.examples,
            objective=self.objective,
            evaluate=lambda: evaluate_loss(self.model, self.held_out.examples, 4, self.objective),
            optimizer=self.optimizer,
            learning_rate=0.5,
            steps=6,
            folder=self.folder,
            checkpoint=checkpoint,
        )
        config = LoopConfig(out=str(self.folder), **({"batch_size": 4} | changes))
        return train(task, config, on_begin=lambda *told: self.began.append(told)).last

    def metrics(self) -> list[dict[str, Any]]:
        """Return what was recorded, without times and memory."""
        read = read_metrics(self.folder / "metrics.jsonl")
        return [{key: entry[key] for key in NOT_TIMED if key in entry} for entry in read]


def test_a_resumed_run_ends_as_the_unbroken_one(tiny_base, rated_rows, tmp_path):
    whole = Run(tiny_base, rated_rows, tmp_path / "whole")
    last = whole.train(save_every=3, eval_every=2)
    assert whole.training.kind == "rated"
    assert {"right", "weight", "eval_right", "eval_weight"} <= set(last)
    assert "perplexity" not in last and "target_tokens" not in last

    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000003"
    stored = set(load_file(checkpoint / "state.safetensors"))
    assert {name for name in stored if name.startswith("optimizer.")} == {
        f"optimizer.momentum_buffer.{name}" for name in whole.parameters
    }
    broken = Run(tiny_base, rated_rows, tmp_path / "broken")
    shutil.copy(whole.folder / "metrics.jsonl", broken.folder)
    broken.train(checkpoint, save_every=3, eval_every=2)
    assert (whole.began, broken.began) == ([(6, 1)], [(6, 4)])
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, broken.parameters[name]), name
    assert broken.metrics() == whole.metrics()


def test_the_loss_is_the_one_that_a_loop_finds(tiny_base, rated_rows, tmp_path):
    run = Run(tiny_base, rated_rows, tmp_path)
    total = right = weight = 0.0
    for example in run.held_out.examples:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            scores = run.model(input_ids=ids).logits[0].double().log_softmax(-1)
        for position in range(1, len(example.input_ids)):
            if example.targets[position]:
                token, before = example.input_ids[position], scores[position - 1]
                loss = -(1 - SMOOTHING) * before[token] - SMOOTHING * before.mean()
                total += example.values["rating"] * loss.item()
                right += example.values["rating"] * (int(before.argmax()) == token)
                weight += example.values["rating"]
    found = evaluate_loss(run.model, run.held_out.examples, 2, run.objective)
    assert found.targets == weight
    assert found.loss == pytest.approx(total / weight, rel=1e-5)
    assert found.metrics == {"right": pytest.approx(right / weight)}


def test_a_step_does_not_depend_on_how_its_rows_are_cut(tiny_base, rated_rows, tmp_path):
    runs = [Run(tiny_base, rated_rows, tmp_path / name) for name in ("whole", "cut")]
    ends = [
        run.train(batch_size=size, grad_accum=8 // size)
        for run, size in zip(runs, (8, 2), strict=True)
    ]
    assert ends[0]["weight"] == ends[1]["weight"]
    assert ends[0]["loss"] == pytest.approx(ends[1]["loss"], rel=1e-5)
    for name, parameter in runs[0].parameters.items():
        torch.testing.assert_close(parameter, runs[1].parameters[name], rtol=1e-3, atol=1e-6)


def test_another_optimizers_checkpoint_is_refused(tiny_base, rated_rows, tmp_path):
    run = Run(tiny_base, rated_rows, tmp_path)
    run.train(save_every=3)
    run.optimizer = OPTIMIZERS["adamw"]
    with pytest.raises(GraftError, match="has no state 'exp_avg', which adamw needs"):
        run.train(tmp_path / "checkpoints" / "step-00000006")


class Begins(Events):
    """Remembers which steps were to be done."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def training_begins(self, steps: int, first_step: int) -> None:
        self.told.append((steps, first_step))


def test_the_command_takes_them_by_name(tiny_base, rated_rows, tmp_path):
    common = {
        "model": str(tiny_base),
        "data": str(rated_rows),
        "method": "qalora",
        "rank": 4,
        "steps": 4,
        "batch_size": 4,
        "max_length": 48,
        "learning_rate": 0.5,
        "save_every": 2,
        "objective": "smoothed",
        "optimizer": "momentum",
    }
    events = Begins()
    run = tmp_path / "run"
    report = graft.finetune(graft.TrainConfig(**common, out=str(run)), events)
    assert report.perplexity is None
    assert math.isfinite(report.eval_loss)
    assert "held-out perplexity" in (run / "report.md").read_text(encoding="utf-8")
    adapter = run / "adapter" / "adapter_model.safetensors"
    trained = adapter.read_bytes()
    assert graft.merge(run, tmp_path / "merged").max_logit_difference == 0.0

    for folder in ("checkpoints/step-00000004", "adapter"):
        shutil.rmtree(run / folder)
    graft.finetune(graft.TrainConfig(**common, out=str(run), resume=True), events)
    assert adapter.read_bytes() == trained
    assert events.told == [(4, 1), (4, 3)]


def test_wrong_names_and_rows_are_told_before_training(tiny_base, rows, tmp_path):
    common = {"model": str(tiny_base), "data": str(rows), "out": str(tmp_path / "run")}
    with pytest.raises(GraftError, match="smoothed cannot be trained on prompt rows; .* rated"):
        graft.finetune(graft.TrainConfig(**common, objective="smoothed"))
    with pytest.raises(GraftError, match="unknown objective 'smothed'.*smoothed"):
        graft.finetune(graft.TrainConfig(**common, objective="smothed"))
    with pytest.raises(GraftError, match="unknown optimizer 'adam'.*adamw"):
        graft.finetune(graft.TrainConfig(**common, optimizer="adam"))
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_the_optimizers_states(tiny_base):
    found = {
        name: next(
            row
            for row in plan(PlanConfig(model=str(tiny_base), optimizer=name)).rows
            if row.name == "optimizer"
        )
        for name in OPTIMIZERS
    }
    assert found["adamw"].note == "AdamW: two states per trained parameter"
    assert found["momentum"].note == Momentum.memory_note
    assert found["adamw"].bytes == 2 * found["momentum"].bytes
