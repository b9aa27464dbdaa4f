"""The report of a run: report.json for programs, report.md and a plot for people."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from graft.adapters.attach import frozen_layers
from graft.adapters.registry import method_of
from graft.api.config import TrainConfig
from graft.api.run.ending import Ending
from graft.api.run.folder import fingerprint_weights
from graft.api.run.layout import METRICS, REPORT
from graft.data.encode import EncodedData
from graft.data.overlap import Overlap
from graft.data.sources.places import fingerprint
from graft.evaluate.forgetting import Drift
from graft.export.base import CARD
from graft.export.card import license_of
from graft.files.write import write_json, write_text
from graft.formats.base import storage_bytes
from graft.model.hub import hub_id_of
from graft.model.running.memory import peak_bytes
from graft.model.trained import of_total
from graft.objectives.registry import DEFAULT_OBJECTIVE, OBJECTIVES
from graft.plan.memory import MemoryPlan
from graft.text import markdown
from graft.train.loop import Trained
from graft.train.metrics import read_metrics
from graft.train.plots import plot_loss


@dataclass(frozen=True)
class RunReport:
    """What a run gave and what it cost."""

    method: str
    title: str
    """The method in words, with what its flags make of it."""
    model: str
    base_name: str
    base_hub_id: str | None
    base_fingerprint: str
    """See `fingerprint_weights`."""
    base_license: dict[str, str]
    """As the base's own model card names it; empty where none does."""
    steps: int
    """That were planned."""
    steps_done: int
    learning_rate: float
    loss: float
    """Training loss of the last step, nats per target token."""
    eval_loss: float
    """Held-out loss of what is kept."""
    eval_loss_before: float
    eval_loss_last: float
    """After the last step."""
    perplexity: float | None
    """Of what is kept; None for an objective that measures no such thing."""
    keep: str
    """best or last."""
    kept_step: int
    """The step whose parameters are kept, and deployed by every export."""
    kept: str
    """That step in words."""
    ended: str
    """Why the run ended."""
    next_steps: tuple[str, ...]
    """What to do next."""
    drift: Drift | None
    """From the base on general text; None where it was not measured."""
    eos_share: float
    """Of the training rows that train the end of sequence."""
    seconds: float
    tokens_per_second: float
    """Tokens of the rows per second of training steps, without padding; 0 where it is not known."""
    peak_memory_bytes: int
    planned_memory_bytes: int
    init: str
    """How the adapter started."""
    checkpointing: str
    """What the layers kept for the backward pass, and why."""
    trainable_parameters: int
    total_parameters: int
    bits_per_weight: float | None
    """Of the quantised or adapted layers."""
    training_rows: int
    training_tokens: int
    """Tokens of the training rows, after cutting."""
    held_out_rows: int
    data_fingerprint: str
    held_out_fingerprint: str | None
    """None where a share of the training file was held out."""
    versions: dict[str, str]
    trained_tokens: int | None = None
    """Those of the training rows' tokens that are trained; None in reports of earlier versions."""
    repeated_rows: int | None = None
    """Training rows whose text an earlier training row has; None in those of earlier versions."""
    held_out_rows_trained: int | None = None
    """Held-out rows whose text a training row has; None likewise."""
    held_out_prompts_trained: int | None = None
    """Held-out rows whose prompt a training row has; None likewise."""
    left_out: str | None = None
    """What stays as it is besides embeddings, head and norms; None where nothing does."""
    batching: str = "padded"
    """How rows became tensors, and what that saved."""
    objective: str = DEFAULT_OBJECTIVE
    loss_unit: str = "nats per token"
    """Of what the losses are means."""
    reward_margin: float | None = None
    """By how much more the held-out answers that are chosen are rewarded than the others, of what
    is kept; None for an objective that measures no such thing."""
    reward_margin_before: float | None = None
    reward_accuracy: float | None = None
    """Share of the held-out answers whose reward is on the right side."""

    @property
    def worse(self) -> bool:
        """Whether what is kept is worse on held-out rows than before training."""
        return not self.eval_loss <= self.eval_loss_before


def base_facts(model: str, folder: Path) -> dict[str, Any]:
    """Return what a model card says of a base: its name or hub id, fingerprint, and licence."""
    hub_id = hub_id_of(model)
    return {
        "base_name": Path(hub_id or model).absolute().name,
        "base_hub_id": hub_id,
        "base_fingerprint": fingerprint_weights(folder),
        "base_license": license_of(folder / CARD),
    }


def make_report(
    *,
    run: Path,
    config: TrainConfig,
    base: Path,
    model: nn.Module,
    trained: Trained,
    drift: Drift | None,
    plan: MemoryPlan,
    batching: str,
    training: EncodedData,
    held_out: EncodedData,
    steps: int,
    learning_rate: float,
    trainable: int,
    seconds: float,
    bits_per_weight: float | None,
) -> RunReport:
    """Put the report together from what the run measured; `base` is the base model's folder."""
    history = read_metrics(run / METRICS)
    ending = Ending(
        run=run,
        history=history,
        steps=steps,
        done=trained.step,
        kept_step=trained.kept_step,
        keep=config.keep,
        patience=config.patience,
        min_improvement=config.min_improvement,
        learning_rate=learning_rate,
        can_go_on=config.checkpoints,
    )
    timed = [entry for entry in history if {"step_seconds", "tokens_per_second"} <= entry.keys()]
    spent = sum(entry["step_seconds"] for entry in timed)
    tokens = sum(entry["tokens_per_second"] * entry["step_seconds"] for entry in timed)
    return RunReport(
        method=config.method,
        title=method_of(config).title(config),
        model=config.model,
        **base_facts(config.model, base),
        **_twice(training.overlap),
        steps=steps,
        steps_done=trained.step,
        learning_rate=learning_rate,
        loss=float(trained.last["loss"]),
        eval_loss=ending.loss,
        eval_loss_before=ending.before,
        eval_loss_last=ending.last,
        perplexity=ending.kept_evaluation.get("perplexity"),
        keep=config.keep,
        kept_step=trained.kept_step,
        kept=ending.kept(),
        ended=ending.reason(),
        next_steps=tuple(ending.next_steps()),
        drift=drift,
        eos_share=training.eos_rows / len(training.examples),
        seconds=seconds,
        tokens_per_second=tokens / spent if spent else 0.0,
        peak_memory_bytes=peak_bytes(next(model.parameters()).device),
        planned_memory_bytes=plan.peak_bytes,
        init=config.init,
        checkpointing=plan.checkpointing_reason,
        trainable_parameters=trainable,
        total_parameters=plan.total_parameters,
        bits_per_weight=bits_per_weight,
        training_rows=len(training.examples),
        training_tokens=training.total_tokens,
        trained_tokens=training.target_tokens,
        held_out_rows=len(held_out.examples),
        data_fingerprint=fingerprint(config.data),
        held_out_fingerprint=None if config.eval_data is None else fingerprint(config.eval_data),
        versions=versions(),
        left_out=plan.left_out,
        batching=batching,
        objective=config.objective,
        loss_unit=OBJECTIVES[config.objective].unit,
        reward_margin=ending.kept_evaluation.get("eval_reward_margin"),
        reward_margin_before=ending.first_evaluation.get("eval_reward_margin"),
        reward_accuracy=ending.kept_evaluation.get("eval_reward_accuracy"),
    )


def stored_bits_per_weight(model: nn.Module) -> float | None:
    """Return the bits per weight of the frozen layers as they are deployed; None: there are none.

    Constants are included, and what only a training needs beside them is not.
    """
    layers = [layer for _, layer in frozen_layers(model)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(
        storage_bytes(layer.weight_format.deployed, layer.out_features, layer.in_features)
        for layer in layers
    )
    return 8 * stored / weights if weights else None


def versions() -> dict[str, str]:
    """Return the versions that a result hangs on."""
    names = ("graft-llm", "torch", "transformers", "safetensors", "tokenizers", "gguf")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def write_report(run: Path, report: RunReport, history: Sequence[dict[str, Any]]) -> None:
    """Write report.json, report.md and plots/loss.png into the run's folder."""
    write_json(run / REPORT, asdict(report))
    title = f"{_described(report)}, {report.steps_done} steps"
    path = run / "plots" / "loss.png"
    plot_loss(history, path, title, report.kept_step, report.loss_unit)
    write_text(run / "report.md", _markdown(report))


def held_out_words(report: RunReport) -> str:
    """Return the held-out loss before and after, and plainly whether it got worse."""
    change = f"{report.eval_loss_before:.4f} → {report.eval_loss:.4f}"
    return f"{change}, worse than before training" if report.worse else change


def margin_words(report: RunReport) -> str | None:
    """Return the held-out reward margin before and after; None where none is measured."""
    if report.reward_margin is None or report.reward_margin_before is None:
        return None
    words = f"{report.reward_margin_before:.4f} → {report.reward_margin:.4f}"
    if report.reward_accuracy is not None:
        words += f", on the right side in {report.reward_accuracy:.0%}"
    return words


def drift_words(report: RunReport) -> str:
    """Return how far the model moved on general text."""
    drift = report.drift
    if drift is None:
        return "not measured"
    return (
        f"KL 0 → {drift.kl:.4f} nats per token; perplexity {drift.perplexity_before:.4g} → "
        f"{drift.perplexity:.4g}"
    )


def trained_words(report: RunReport) -> str:
    """Return how many of the training rows' tokens are trained."""
    if report.trained_tokens is None:
        return "not counted"
    share = report.trained_tokens / report.training_tokens
    return f"{share:.0%} ({report.trained_tokens:,} of {report.training_tokens:,})"


def _twice(found: Overlap | None) -> dict[str, Any]:
    """Return the fields of the report on rows that are there twice."""
    if found is None:
        return {}
    return {
        "repeated_rows": found.repeated,
        "held_out_rows_trained": found.held_out_trained,
        "held_out_prompts_trained": found.prompts_trained,
    }


def overlap_words(report: RunReport) -> str:
    """Return how many rows are there twice, in training and in what is held out."""
    if report.held_out_rows_trained is None:
        return "not counted"
    return (
        f"{report.held_out_rows_trained:,} (their prompts alone: "
        f"{report.held_out_prompts_trained:,}); training rows that repeat an earlier one: "
        f"{report.repeated_rows:,}"
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _described(report: RunReport) -> str:
    """Return what was trained on what, in words."""
    return f"{report.title} on {Path(report.model).name}"


def _markdown(report: RunReport) -> str:
    margin = margin_words(report)
    bits = "-" if report.bits_per_weight is None else f"{report.bits_per_weight:.3f}"
    rows = {
        f"held-out loss ({report.loss_unit})": held_out_words(report),
        **({} if margin is None else {"held-out reward margin": margin}),
        "held-out perplexity": "-" if report.perplexity is None else f"{report.perplexity:.4f}",
        "kept": report.kept,
        "end": report.ended,
        "drift from the base on general text": drift_words(report),
        "last training loss": f"{report.loss:.4f}",
        "steps, peak learning rate": f"{report.steps_done}, {report.learning_rate:.3g}",
        "rows that train the end of sequence": f"{report.eos_share:.0%}",
        "rows (training, held out)": f"{report.training_rows}, {report.held_out_rows}",
        "share of the tokens that is trained": trained_words(report),
        "held-out rows that are trained too": overlap_words(report),
        "trained parameters": of_total(report.trainable_parameters, report.total_parameters),
        "bits per weight of the adapted layers": bits,
        **({"left as it is": report.left_out} if report.left_out else {}),
        "time": f"{report.seconds:.0f} s, {report.tokens_per_second:,.0f} tokens/s",
        "peak memory (planned)": f"{report.peak_memory_bytes / 2**20:,.0f} MiB "
        f"({report.planned_memory_bytes / 2**20:,.0f} MiB)",
        "batching": report.batching,
        "checkpointing": report.checkpointing,
    }
    table = "\n".join(f"| {name} | {markdown(value)} |" for name, value in rows.items())
    following = "".join(f"- {markdown(_sentence(line))}\n" for line in report.next_steps)
    versions_line = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return (
        f"# {markdown(_described(report))}\n\n"
        f"| | |\n|---|---|\n{table}\n\n![loss](plots/loss.png)\n\n"
        + (f"What to do next:\n\n{following}\n" if following else "")
        + f"Base: {markdown(report.model)}. Data: SHA-256 {report.data_fingerprint[:16]}…\n\n"
        f"Versions: {versions_line}.\n"
    )
