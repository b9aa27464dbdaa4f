"""Exporting a run or a model to what other programs read."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from graft.adapters.attach import adapted_layers, adapter_names, frozen_layers, replace_module
from graft.adapters.registry import method_of
from graft.adapters.starts.base import DEFAULT
from graft.api.config import TrainConfig
from graft.api.events import Events
from graft.api.merge import MergeReport, check_biases, merge_loaded
from graft.api.run.adopted import base_changes, changes_in_words
from graft.api.run.card import weights_in_words, write_card
from graft.api.run.folder import (
    is_run,
    load_any,
    prompt_style,
    read_base_reference,
    read_run_config,
)
from graft.api.run.layout import ADAPTER, BASE
from graft.data.shapes.registry import CHAT, PLAIN
from graft.errors import raise_problems
from graft.export.base import FACTORED_BASE, Origin, Target
from graft.export.card import GRAFT_TAG, front_matter
from graft.export.config import ExportTarget
from graft.export.registry import TARGETS
from graft.files.write import check_new, staged
from graft.formats.base import WeightFormat
from graft.formats.dense import DenseFormat
from graft.formats.int_group import IntGroupFormat
from graft.model.adapter_files import read_own_config
from graft.model.factors import multiply_factors, products_note
from graft.model.folder import read_config, stored_formats
from graft.model.hub import base_name
from graft.model.load import LoadedModel
from graft.model.running.memory import reuse_freed_memory
from graft.model.tokenizer_itself import tokenizer_note
from graft.model.tokens import beyond_notes


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what the way there changed."""

    path: Path
    bytes: int
    merge: MergeReport | None
    """The merge before the export; None when there was nothing to merge."""
    notes: tuple[str, ...]


def export_model(
    model: str | Path,
    to: ExportTarget,
    out: str | Path,
    *,
    requantize: bool = False,
    license: str | None = None,
    trust_remote_code: bool = False,
    events: Events | None = None,
) -> ExportReport:
    """Write a run or a model folder to `out` for another program, one of `export.registry.TARGETS`.

    Where the target takes a whole model, a run's adapter is merged first: exactly where it moves
    the grid of the integers, unquantised otherwise, or with `requantize` rounded to INT4, and the
    error is measured. A model card is written with it: README.md in a folder, FILE.md beside a
    file; `license` is the model's on the card, by default that which the base's own card names.
    Raises GraftError when the target cannot hold the model, or when there is a file already where
    one is to be written.
    """
    events = events or Events()
    reuse_freed_memory()  # one tensor after another needs buffers of the same few sizes
    target = TARGETS[to]
    source, path = Path(model), Path(out)
    check_new(path)
    _check_card(target.card_path(path))
    # No weight may be rounded on its way, whatever this machine computes in.
    dtype = "exact" if is_run(source) else "stored"
    loaded = load_any(model, dtype, trust_remote_code=trust_remote_code)
    for note in loaded.notes:
        events.note(note)
    # A merge takes long, and it mends neither.
    problems = target.problems(loaded.model.config, DenseFormat())
    if adapter_names(loaded.model) and not target.takes_adapter:
        problems += target.prompt_problems(loaded.tokenizer, loaded.model.config, None, "")
    raise_problems(problems, f"--to {target.name}")
    merged: MergeReport | None = None
    read_otherwise = tokenizer_note(loaded.tokenizer)
    if read_otherwise is not None:
        events.note(read_otherwise)
    if not target.takes_adapter:
        if not target.holds_new_biases:
            check_biases(loaded)
        merged = merge_for_export(loaded, to, requantize, events)
    products = () if target.takes_adapter else _multiplied(loaded, target, requantize, events)
    weights = weights_in_words(loaded)
    with staged(path) as part:
        notes = target.write(
            loaded,
            part,
            _origin(source, loaded),
            lambda done, total: events.progress(target.stage, done, total),
        )
        if target.keeps_tokenizer:
            notes += beyond_notes(loaded.model, loaded.tokenizer)
        notes += products
        report = ExportReport(path, bytes_on_disk(part), merged, notes)
        write_card(source, target, part, loaded.folder, weights, merged, license, notes)
    return report


def _check_card(path: Path) -> None:
    """Raise GraftError for a file in a card's place, unless it is a card that graft wrote.

    One without its file is what an export left that was killed at the very end.
    """
    tags = front_matter(path).get("tags") if path.is_file() and not path.is_symlink() else None
    if not isinstance(tags, list) or GRAFT_TAG not in tags:
        check_new(path)


def check_exports(
    config: TrainConfig,
    model_config: PretrainedConfig,
    weight_formats: Iterable[WeightFormat],
    tokenizer: PreTrainedTokenizerBase,
    kind: str | None,
) -> None:
    """Raise GraftError with every export that a run asks for and that could not be written.

    weight_formats: those of the layers that are quantised once the run is merged. kind: that of the
    training rows, or None where they could not be read.
    """
    asked = [TARGETS[name] for name in config.export]
    formats = (DenseFormat(), *weight_formats)
    problems = [
        f"--export {target.name}: {problem}"
        for target in asked
        for weight_format in formats
        for problem in target.problems(model_config, weight_format)
    ]
    problems += [
        f"--export {target.name}: {problem}"
        for target in asked
        for problem in target.prompt_problems(tokenizer, model_config, kind, config.separator)
    ]
    raise_problems(list(dict.fromkeys(problems)), "exports")


def check_bias_exports(config: TrainConfig, skeleton: PreTrainedModel, targets: list[str]) -> None:
    """Raise GraftError when the adapter's biases have no place in what a run is to export."""
    if not config.adapter_bias:
        return
    bare = [name for name in targets if skeleton.get_submodule(name).bias is None]
    refused = {name: TARGETS[name].without_bias(skeleton.config, bare) for name in config.export}
    problems = [
        f"--export {name}: --adapter-bias trains a bias for {len(layers)} layers that have none in "
        f"the model, such as {layers[0]}, and there is no place for it; drop either"
        for name, layers in refused.items()
        if layers
    ]
    raise_problems(problems, "exports")


def next_export(run: Path) -> str:
    """Return a command that exports a run: to a file, or where no other program has a format for
    the weights that a merge keeps, or knows the model, to a folder of dense ones."""
    own, config = run / BASE, read_run_config(run)
    kept = stored_formats(own) if own.is_dir() else {}
    exact = method_of(config).merges_exactly
    base = own if own.is_dir() else Path(read_base_reference(run).path)
    model_config = read_config(base, config.trust_remote_code)
    if not exact or all(weight_format.deployed.portable for weight_format in kept.values()):
        for target in TARGETS.values():
            if target.suffix and not target.problems(model_config, DenseFormat()):
                return f"graft export {run} --to {target.name} --out {run.name}{target.suffix}"
    return f"graft export {run} --to hf --out {run.name}-hf"


def merge_for_export(
    loaded: LoadedModel, to: ExportTarget, requantize: bool, events: Events
) -> MergeReport | None:
    """Merge the adapters of a loaded model as its export does; None where there are none."""
    if not adapter_names(loaded.model):
        if requantize:
            _requantize_dense(loaded)
        return None
    layers = [layer for _, layer in adapted_layers(loaded.model)]
    exact = all(layer.moves_grid_only() for layer in layers)
    target: WeightFormat | None = None
    dtype = torch.float32
    if not exact and requantize and TARGETS[to].requantizes:
        target = IntGroupFormat(4, 32)
    elif not exact:
        dtype = loaded.source_dtype
    report = merge_loaded(loaded, dtype=dtype, target=target, events=events)
    if not report.exact:
        events.note(report.summary())
    return report


def _multiplied(
    loaded: LoadedModel, target: Target, requantize: bool, events: Events
) -> tuple[str, ...]:
    """Put the products of low-rank factors in their place, which no other program knows; return
    that it was done."""
    ranks = multiply_factors(loaded.model)
    if not ranks:
        return ()
    if requantize and target.requantizes:
        _requantize_dense(loaded)
    note = products_note(ranks)
    events.note(note)
    return (note,)


def check_factor_exports(config: TrainConfig, factors: Collection[str]) -> None:
    """Raise GraftError where a run on a compressed base is to export its adapter by itself."""
    problems = [
        f"--export {name}: {FACTORED_BASE}"
        for name in config.export
        if factors and TARGETS[name].takes_adapter
    ]
    raise_problems(problems, "exports")


def _requantize_dense(loaded: LoadedModel) -> None:
    weight_format = IntGroupFormat(4, 32)
    for name, layer in list(frozen_layers(loaded.model)):
        if not (layer.weight_format.portable and layer.weight_format.quantised):
            packed = weight_format.pack(layer.dense_weight(torch.float32))
            replace_module(loaded.model, name, layer.replaced(weight_format, packed))


def _origin(model: Path, loaded: LoadedModel) -> Origin:
    """Return how a run was trained; of another model, that it chats if it has a chat template."""
    if is_run(model):
        style, config = prompt_style(model), read_run_config(model)
        changes, base = base_changes(model), base_name(config.model)
        words = changes_in_words(changes) if changes else None
        name = Path(base).name
        own = read_own_config(model / ADAPTER)
        init = DEFAULT.name if own is None else own.init
        return Origin(style.kind, style.separator, init, name, base, words)
    kind = PLAIN if loaded.tokenizer.chat_template is None else CHAT
    return Origin(kind, name=model.absolute().name)


def bytes_on_disk(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
