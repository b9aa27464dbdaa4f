"""What is known of an exported model, put together for its card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from graft.adapters.attach import frozen_layers
from graft.adapters.registry import method_of
from graft.api.config import TrainConfig
from graft.api.merge import MergeReport
from graft.api.run.adopted import changes_in_words
from graft.api.run.folder import fingerprint_weights, is_run, prompt_style, read_run_config
from graft.api.run.layout import REPORT
from graft.data.shapes.registry import SHAPES
from graft.evaluate.forgetting import Drift
from graft.export.base import CARD, Target
from graft.export.card import CardFacts, license_of, model_card
from graft.files.read import read_typed
from graft.files.write import write_text
from graft.model.load import LoadedModel
from graft.objectives.base import perplexity_of

_VERSIONS = ("graft-llm", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class _Report:
    """What a card reads of report.json, whichever version wrote it, and for whatever run."""

    base_name: str | None = None
    base_hub_id: str | None = None
    base_fingerprint: str | None = None
    base_license: dict[str, str] = field(default_factory=dict)
    steps: int | None = None
    steps_done: int | None = None
    eval_loss: float | None = None
    eval_loss_before: float | None = None
    perplexity: float | None = None
    kept: str | None = None
    drift: Drift | None = None
    trainable_parameters: int | None = None
    training_rows: int | None = None
    training_tokens: int | None = None
    held_out_rows: int | None = None
    data_fingerprint: str | None = None
    held_out_fingerprint: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    adopted_from: str | None = None
    adapter_sha256: str | None = None
    peft_version: str | None = None
    written_by: str | None = None
    base_changes: dict[str, str] = field(default_factory=dict)
    layers: int | None = None
    ranks: tuple[int, ...] = ()
    parameters: int | None = None


def weights_in_words(loaded: LoadedModel) -> str:
    """Return how many layers are in which format, as in '35 layers: nf4'."""
    formats = (layer.weight_format.deployed for _, layer in frozen_layers(loaded.model))
    counts = Counter(one.words() for one in formats)
    return "; ".join(f"{count} layers: {words}" for words, count in counts.items())


def write_card(
    source: Path,
    target: Target,
    exported: Path,
    base: Path,
    weights: str,
    merged: MergeReport | None,
    license: str | None,
    notes: Sequence[str],
) -> None:
    """Write the card of what was exported from a run or a model folder.

    base: the folder that the model was loaded from. weights: `weights_in_words` of the model before
    it was written. license: instead of that which the base's card names. Raises GraftError when the
    card cannot be written.
    """
    run = is_run(source)
    config = read_run_config(source) if run else None
    told = run and (source / REPORT).is_file()
    report = read_typed(source / REPORT, _Report) if told else _Report()
    if run:
        hub_id, fingerprint = report.base_hub_id, report.base_fingerprint
        base_license = report.base_license
    else:
        hub_id = None if source.exists() else source.as_posix()
        fingerprint, base_license = fingerprint_weights(base), license_of(base / CARD)
    name = report.base_name or Path(config.model if config else source).absolute().name
    trained_as = method_of(config).title(config) if config else None
    tags = [
        *([config.method] if config else []),
        *([target.name] if target.tagged else []),
    ]
    facts = CardFacts(
        target=target.name,
        file=exported.name,
        title=name if config is None else f"{name}, fine-tuned with {trained_as}",
        base_model=hub_id,
        license=base_license if license is None else {"license": license},
        tags=tags,
        tables={
            "Base" if run else "Model": _known(
                {"name": hub_id or name, "fingerprint of its weights": fingerprint}
            ),
            "Data": _data(config, report) if config else {},
            "Training": _training(source, config, report) if config else {},
            "Scores on held-out rows, of the trained model itself": _scores(report),
            "This file": {"trained beside": weights}
            if target.takes_adapter
            else _file(weights, merged, run),
        },
        notes=notes if target.notes_on_card else (),
    )
    write_text(target.card_path(exported), model_card(facts))


def _data(config: TrainConfig, report: _Report) -> dict[str, str]:
    held_out = _count(report.held_out_rows)
    other = None if config.eval_data is None else _file_name(config.eval_data)
    share = f"{held_out}, a share of the same file" if held_out else None
    return _known(
        {
            "file": _file_name(config.data),
            "SHA-256": report.data_fingerprint,
            "rows": _count(report.training_rows),
            "tokens": _count(report.training_tokens),
            "held-out file": other,
            "SHA-256 of that": report.held_out_fingerprint,
            "held-out rows": held_out if other else share,
        }
    )


def _file_name(path: str) -> str:
    """Return a path's last part, whichever system wrote it."""
    return path.replace("\\", "/").rpartition("/")[2]


def _training(source: Path, config: TrainConfig, report: _Report) -> dict[str, str]:
    if report.adopted_from is not None:
        return _adoption(config, report)
    style = prompt_style(source)
    separator = repr(style.separator) if SHAPES[style.kind].uses_separator else None
    versions = report.versions
    batch = config.batch_size * config.grad_accum
    steps = report.steps if report.steps_done is None else report.steps_done
    method = method_of(config)
    every = "every linear layer but the output head" if method.trains_adapter else "all"
    return _known(
        {
            "method": method.title(config),
            "format": config.format,
            "bits, group size": f"{config.bits}, {config.group_size}" if config.bits else None,
            **method.card_rows(config),
            "start": config.init if config.init != TrainConfig.init else None,
            "rounded by": config.solver if config.format else None,
            "layers": ", ".join((*config.targets, *config.train)) or every,
            "rows": style.kind,
            "between prompt and answer": separator,
            "steps, rows in each": None if steps is None else f"{steps}, {batch}",
            "peak learning rate": f"{config.learning_rate:.3g}" if config.learning_rate else None,
            "seed": config.seed,
            "trained parameters": _count(report.trainable_parameters),
            "trained with": ", ".join(
                f"{one} {versions[one]}" for one in _VERSIONS if one in versions
            ),
        }
    )


def _adoption(config: TrainConfig, report: _Report) -> dict[str, str]:
    """Return what is known of an adapter that graft did not train."""
    peft = f"PEFT {report.peft_version}" if report.peft_version else "PEFT"
    writer = report.written_by or peft
    return _known(
        {
            "method": method_of(config).title(config),
            "trained with": f"{writer}; graft brought the adapter in and did not train it",
            "SHA-256 of the adapter": report.adapter_sha256,
            "layers": report.layers,
            "ranks": " ".join(map(str, report.ranks)),
            "trained parameters": _count(report.parameters),
            "of the base itself": changes_in_words(changed)
            if (changed := report.base_changes)
            else "",
        }
    )


def _scores(report: _Report) -> dict[str, str]:
    before, after = report.eval_loss_before, report.eval_loss
    if before is None or after is None:
        return {}
    worse = "" if after <= before else " (worse than before training)"
    scores = {"loss before, after (nats per token)": f"{before:.4f}, {after:.4f}{worse}"}
    if report.perplexity is not None:
        found = (f"{perplexity_of(loss):.4f}" for loss in (before, after))
        scores["perplexity before, after"] = ", ".join(found)
    if report.kept:
        scores["parameters"] = f"of {report.kept}"
    if (drift := report.drift) is not None:
        scores["drift from the base on general text"] = (
            f"KL {drift.kl:.4f} nats per token, perplexity {drift.perplexity_before:.4g}, "
            f"{drift.perplexity:.4g}"
        )
    return scores


def _file(weights: str, merged: MergeReport | None, run: bool) -> dict[str, str]:
    found = {"weights": weights or None}
    if merged is not None:
        found["merge"] = (
            f"{merged.layers} layers: exact, every merged weight is the one that was trained"
            if merged.exact
            else f"{merged.layers} layers: in the worst one the error is "
            f"{merged.worst_relative_error:.1e} of the update (root mean square)"
        )
    if run:
        found["check"] = "graft verify RUN FILE runs it and compares it with the trained model"
    return _known(found)


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _known(rows: Mapping[str, object]) -> dict[str, str]:
    """Return the rows that have a value, as text."""
    return {name: str(value) for name, value in rows.items() if value not in (None, "")}
