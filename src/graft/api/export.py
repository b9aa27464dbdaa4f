"""Exporting a run or a model to what other programs read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from graft.adapters.attach import adapted_layers, adapter_names, frozen_layers, replace_module
from graft.adapters.config import Init
from graft.api.config import TrainConfig
from graft.api.events import Events
from graft.api.merge import MergeReport, check_biases, merge_loaded
from graft.api.run.card import weights_in_words, write_card
from graft.api.run.folder import PromptStyle, is_run, load_any, prompt_style, read_run_config
from graft.data.shapes.registry import CHAT
from graft.errors import GraftError, raise_problems
from graft.export.card import card_path
from graft.export.config import ExportTarget
from graft.export.gguf.tensors import Unquantised
from graft.export.gguf.tokenizer import convert_tokenizer
from graft.export.gguf.write import check_gguf_plan, export_gguf
from graft.export.mlx.write import check_mlx_plan, export_mlx
from graft.export.ollama.write import export_ollama, ollama_prompt
from graft.export.onnx.write import check_onnx_plan, export_onnx
from graft.export.openvino.write import check_openvino_plan, export_openvino
from graft.formats.base import WeightFormat
from graft.formats.dense import DenseFormat
from graft.formats.int_group import IntGroupFormat
from graft.model.adapter_files import save_adapter
from graft.model.load import LoadedModel
from graft.model.running.memory import reuse_freed_memory
from graft.model.save import save_plain_model


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what the way there changed."""

    path: Path
    bytes: int
    merge: MergeReport | None
    """The merge before the export; None when there was nothing to merge."""
    notes: tuple[str, ...]


_Writer = Callable[[LoadedModel, Path, MergeReport | None, Events], ExportReport]


def export_model(
    model: str | Path,
    to: ExportTarget,
    out: str | Path,
    *,
    requantize: bool = False,
    license: str | None = None,
    events: Events | None = None,
) -> ExportReport:
    """Write a run or a model folder to `out` for another program.

    gguf: one file for llama.cpp; INT layers become Q4_1 with the very same weights. ollama: a
    folder with that file and a Modelfile that prompts as training did. mlx: a folder for mlx-lm;
    INT layers keep codes, scales and offsets. onnx, openvino: a folder for ONNX Runtime or
    OpenVINO, with the integers and float zero points. Into these a lora or qlora run is merged and
    written unquantised (with `requantize` rounded to INT4, and the error is measured). hf: a plain
    Hugging Face folder, dequantised. peft: the adapter in PEFT's format, qalora (trained with
    --grid-rank 0) as an ordinary LoRA. A model card is written with it: README.md in a folder,
    FILE.md beside a file; `license` is the model's on the card, by default that which the base's
    own card names. Raises GraftError when the target cannot hold the model, or when there is a file
    already where one is to be written.
    """
    events = events or Events()
    reuse_freed_memory()  # one tensor after another needs buffers of the same few sizes
    target = Path(out)
    source, card = Path(model), card_path(target, to)
    for path in (target, card):
        if path.exists():
            raise GraftError(f"{path} exists already; choose another name or remove it")
    loaded = load_any(model)
    if to == "peft":
        init = read_run_config(source).init if is_run(source) else "default"
        weights = weights_in_words(loaded)
        report = _export_peft(loaded, target, init)
    else:
        if to in ("hf", "mlx"):
            check_biases(loaded)
        merged = merge_for_export(loaded, to, requantize, events)
        weights = weights_in_words(loaded)
        writers: dict[str, _Writer] = {
            "gguf": _export_gguf,
            "ollama": partial(_export_ollama, style=_style(source, loaded)),
            "mlx": _export_mlx,
            "onnx": _export_onnx,
            "openvino": _export_openvino,
            "hf": _export_hf,
        }
        report = writers[to](loaded, target, merged, events)
    write_card(source, to, target, loaded.folder, weights, report.merge, license, report.notes)
    return report


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
    checks: dict[str, Callable[[PretrainedConfig, WeightFormat], list[str]]] = {
        "gguf": check_gguf_plan,
        "ollama": check_gguf_plan,
        "mlx": check_mlx_plan,
        "onnx": check_onnx_plan,
        "openvino": check_openvino_plan,
    }
    problems = [
        f"--export {target}: {problem}"
        for target in config.export
        if target in checks
        for weight_format in (DenseFormat(), *weight_formats)
        for problem in checks[target](model_config, weight_format)
    ]
    for target in (target for target in config.export if target in ("gguf", "ollama")):
        try:
            convert_tokenizer(tokenizer, model_config)
            if target == "ollama" and kind is not None:
                ollama_prompt(tokenizer, model_config, kind, config.separator)
        except GraftError as error:
            problems.append(f"--export {target}: {error}")
    raise_problems(list(dict.fromkeys(problems)), "exports")


def check_bias_exports(config: TrainConfig, skeleton: PreTrainedModel, targets: list[str]) -> None:
    """Raise GraftError when the adapter's biases have no place in what a run is to export."""
    asked = [target for target in config.export if target in ("hf", "mlx")]
    bare = [name for name in targets if skeleton.get_submodule(name).bias is None]
    if config.adapter_bias and asked and bare:
        raise GraftError(
            f"--export {' '.join(asked)}: --adapter-bias trains a bias for {len(bare)} layers that "
            f"have none in the model, such as {bare[0]}, and there is no place for it; drop either"
        )


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
    if not exact and to != "hf" and requantize:
        target = IntGroupFormat(4, 32)
    elif not exact:
        dtype = loaded.source_dtype
    report = merge_loaded(loaded, dtype=dtype, target=target, events=events)
    if not report.exact:
        events.note(report.summary())
    return report


def _requantize_dense(loaded: LoadedModel) -> None:
    weight_format = IntGroupFormat(4, 32)
    for name, layer in list(frozen_layers(loaded.model)):
        if not (layer.weight_format.portable and layer.weight_format.quantised):
            packed = weight_format.pack(layer.dense_weight(torch.float32))
            replace_module(loaded.model, name, layer.replaced(weight_format, packed))


def _unquantised(loaded: LoadedModel) -> Unquantised:
    """Return the type of tensors that are not quantised, in GGUF: that of the checkpoint."""
    narrow: dict[torch.dtype, Unquantised] = {torch.float16: "F16", torch.bfloat16: "BF16"}
    return narrow.get(loaded.source_dtype, "F32")


def _style(model: Path, loaded: LoadedModel) -> PromptStyle:
    """Return how a run dresses prompts; another model by its chat template, if it has one."""
    if not is_run(model) and loaded.tokenizer.chat_template is not None:
        return PromptStyle(CHAT)
    return prompt_style(model)


def _export_gguf(
    loaded: LoadedModel, path: Path, merged: MergeReport | None, events: Events
) -> ExportReport:
    report = export_gguf(
        loaded.model,
        loaded.tokenizer,
        path,
        unquantised=_unquantised(loaded),
        name=path.stem,
        on_tensor=lambda done, total, _: events.progress("writing GGUF", done, total),
    )
    return ExportReport(path, bytes_on_disk(path), merged, report.notes)


def _export_ollama(
    loaded: LoadedModel,
    path: Path,
    merged: MergeReport | None,
    events: Events,
    style: PromptStyle,
) -> ExportReport:
    notes = export_ollama(
        loaded,
        path,
        kind=style.kind,
        separator=style.separator,
        unquantised=_unquantised(loaded),
        on_tensor=lambda done, total, _: events.progress("writing GGUF", done, total),
    )
    return ExportReport(path, bytes_on_disk(path), merged, notes)


def _export_mlx(
    loaded: LoadedModel, path: Path, merged: MergeReport | None, events: Events
) -> ExportReport:
    report = export_mlx(
        loaded,
        path,
        dtype=loaded.source_dtype,
        on_tensor=lambda done, total: events.progress("writing MLX", done, total),
    )
    return ExportReport(path, bytes_on_disk(path), merged, report.notes)


def _export_onnx(
    loaded: LoadedModel, path: Path, merged: MergeReport | None, events: Events
) -> ExportReport:
    export_onnx(loaded, path, lambda done, total: events.progress("writing ONNX", done, total))
    return ExportReport(path, bytes_on_disk(path), merged, ())


def _export_openvino(
    loaded: LoadedModel, path: Path, merged: MergeReport | None, events: Events
) -> ExportReport:
    report = export_openvino(
        loaded,
        path,
        lambda done, total: events.progress("writing OpenVINO", done, total),
    )
    return ExportReport(path, bytes_on_disk(path), merged, report.notes)


def _export_hf(
    loaded: LoadedModel, path: Path, merged: MergeReport | None, events: Events
) -> ExportReport:
    """Write a plain folder that AutoModelForCausalLM loads, every layer dequantised."""
    layers = [layer for _, layer in frozen_layers(loaded.model)]
    quantised = any(layer.weight_format.quantised for layer in layers)
    save_plain_model(
        loaded,
        path,
        torch.float32 if quantised else loaded.source_dtype,
        lambda done, total: events.progress("writing tensors", done, total),
    )
    notes = ("dequantised to float32, which holds the INT weights exactly",) if quantised else ()
    return ExportReport(path, bytes_on_disk(path), merged, notes)


def _export_peft(loaded: LoadedModel, path: Path, init: Init) -> ExportReport:
    names = adapter_names(loaded.model)
    if not names:
        raise GraftError("--to peft exports an adapter, and this model carries none; give a RUN")
    base = str(loaded.folder)
    save_adapter(loaded.model, path, names[0], base=base, as_lora=True, init=init)
    notes: tuple[str, ...] = ()
    if init == "loftq":
        notes = (
            f"started as loftq: it makes up for the rounding of the quantised base in {base}, and "
            "belongs on those weights (dequantised: export the base with --to hf), not on the "
            "original ones",
        )
    return ExportReport(path, bytes_on_disk(path), None, notes)


def bytes_on_disk(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
