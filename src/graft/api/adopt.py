"""Bringing in an adapter that another program trained, as a run that every other command takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from graft.adapters.attach import adapted_layers, adapter_parameters
from graft.adapters.method import Method
from graft.adapters.registry import METHODS, method_of, settings_of
from graft.api.adopt_base import base_skeleton, open_base
from graft.api.adopt_source import PEFT_PICKLE, read_source
from graft.api.adopt_tokenizer import BroughtTokenizer, bring_tokenizer
from graft.api.config import AdoptedFormat, TrainConfig, as_plain
from graft.api.events import Events
from graft.api.run.adopted import AdoptReport, write_adopt_report
from graft.api.run.folder import PromptStyle, write_base_reference, write_prompt_style
from graft.api.run.layout import ADAPTER, BASE, CONFIG, MODEL, TOKENIZER
from graft.api.run.report import base_facts, stored_bits_per_weight, versions
from graft.data.shapes.registry import CHAT, PLAIN
from graft.errors import GraftError, Problems
from graft.files.digest import file_digest
from graft.files.write import check_new, make_folders, new_folder, write_yaml
from graft.formats.base import WeightFormat
from graft.formats.choice import described
from graft.formats.config import FormatConfig
from graft.formats.registry import AS_IT_IS, parse_format
from graft.model.adapter_extras import apply_extras
from graft.model.adapter_files import attach_stored, save_adapter
from graft.model.folder import QUANTISATION_FILE
from graft.model.foreign_adapter import FittedAdapter, ForeignAdapter, fit_adapter
from graft.model.hub import base_name
from graft.model.load import LoadedModel, load_model
from graft.model.save import save_model, write_words
from graft.model.subject import Subject
from graft.model.targets import freeze_layers
from graft.model.tokens import beyond_notes


def adopt(
    adapter: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    format: AdoptedFormat | None = None,
    double_quant: bool = False,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    trust_remote_code: bool = False,
    events: Events | None = None,
) -> AdoptReport:
    """Make the run folder `out` of an adapter's folder, and of the base that it belongs to.

    merge, export, eval, generate and verify then take it as they take a run that graft trained.
    Adapters of PEFT (safetensors, or pickled as PEFT once did) and of mlx-lm are read. LoRA, rsLoRA
    and DoRA belong on a dense base, on one that graft quantised, or, with `format`, on a dense one
    whose linear layers are rounded as bitsandbytes rounds them; QA-LoRA on a folder of integers
    that graft wrote. What an adapter brings for embeddings, the head, norms, biases and whole
    layers goes into a base of the run's own, and its tokenizer and chat template go into the run.
    `model` is a folder or hub id, by default the one that the adapter names. Everything is checked
    before a weight of the base is read or anything is written; all problems are raised at once as a
    GraftError.
    """
    events = events or Events()
    run = Path(out)
    with TemporaryDirectory(prefix="graft-") as scratch:
        found = _checked(
            Path(adapter), run, model, format, double_quant, trust_remote_code, Path(scratch)
        )
        settings = TrainConfig(
            model=found.name,
            data="",
            out=str(run),
            **_adapter_settings(found),
            targets=tuple(found.targets),
            format=format,
            double_quant=None
            if found.weight_format is None
            else found.weight_format.options().get("double_quant"),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        own_base = found.weight_format is not None or bool(found.fitted.extras)
        loaded = load_model(
            found.subject,
            weight_format=found.weight_format,
            dtype="float32" if own_base else dtype,  # in which nothing of a 16-bit base is lost
            trust_remote_code=trust_remote_code,
            on_tensor=lambda done, total: events.progress("reading the model", done, total),
        )
        tie = bool(found.adapter.config.get("ensure_weight_tying"))
        changes, notes = apply_extras(loaded.model, found.fitted.extras, tie)
        if not changes and found.fitted.files is None:
            raise GraftError(f"adapter {adapter} changes nothing: all that it holds is the base's")
        with new_folder(run) as part:
            _write_model(part, loaded, found, bool(changes))
            report = _report(found, settings, loaded, changes, notes)
            write_yaml(part / CONFIG, as_plain(settings))
            # How its prompts were dressed in training is not known; a chat template says how to.
            chats = loaded.tokenizer.chat_template is not None
            write_prompt_style(part, PromptStyle(CHAT if chats else PLAIN))
            write_adopt_report(part, report)
    return report


def _write_model(part: Path, loaded: LoadedModel, found: _Found, changed: bool) -> None:
    """Write the base of the run, or where it lies, and its adapter; attaches it to the model."""
    files = found.fitted.files
    if files is None:
        save_model(loaded, part / MODEL, "exact")
        return
    if found.weight_format is None and not changed:
        write_base_reference(part, found.subject.folder, bool(found.subject.parted))
        if found.tokenizer is not None:
            make_folders(part / TOKENIZER)
            write_words(loaded.tokenizer, loaded.model.generation_config, part / TOKENIZER)
    else:
        save_model(loaded, part / BASE, "exact")
        if not (part / BASE / QUANTISATION_FILE).is_file():
            write_base_reference(part, part / BASE, False)
    freeze_layers(loaded.model, found.targets)
    attach_stored(loaded.model, files)
    save_adapter(loaded.model, part / ADAPTER, base=base_name(found.name))


@dataclass(frozen=True)
class _Found:
    """What is to be adopted."""

    name: str
    """Of the base, as it was given or the adapter names it."""
    subject: Subject
    weight_format: WeightFormat | None
    adapter: ForeignAdapter
    fitted: FittedAdapter
    method: Method
    targets: list[str]
    tokenizer: BroughtTokenizer | None


def _checked(
    source: Path,
    run: Path,
    model: str | None,
    format: AdoptedFormat | None,
    double_quant: bool,
    trust_remote_code: bool,
    scratch: Path,
) -> _Found:
    """Return what there is to adopt; raises GraftError with all that hinders."""
    problems = Problems()
    with problems.collecting():
        check_new(run)
    weight_format: WeightFormat | None = None
    with problems.collecting():
        weight_format = _weight_format(format, double_quant)
    adapter: ForeignAdapter | None = None
    with problems.collecting():
        adapter = read_source(source)
    named = "" if adapter is None else str(adapter.config.get("base_model_name_or_path") or "")
    name = model or named
    if adapter is not None and not name:
        problems.found.append(f"{source} names no base; give --model")
    if name:
        with problems.collecting():
            subject = open_base(name, None if model else source, trust_remote_code)
            brought = None
            if adapter is not None:
                brought = bring_tokenizer(
                    source, subject.folder, subject.config, scratch, trust_remote_code
                )
            if brought is not None:
                subject = replace(subject, tokenizer_folder=brought.folder)
            _ = subject.tokenizer  # which must be there
            skeleton = base_skeleton(subject, weight_format)
            if adapter is not None:
                fitted = fit_adapter(adapter, skeleton)
    problems.raise_all("nothing was written")
    assert adapter is not None, "its problems were raised"
    targets = [layer for layer, _ in adapted_layers(skeleton)]
    # Without an adapter of linear layers the run holds the model itself.
    whole = next(one for one in METHODS.values() if not one.trains_adapter)
    method = fitted.method or whole
    if weight_format is not None and method.on_quantised is not None:
        method = METHODS[method.on_quantised]
    return _Found(name, subject, weight_format, adapter, fitted, method, targets, brought)


def _adapter_settings(found: _Found) -> dict[str, Any]:
    """Return the fields of `AdapterConfig` that would have trained such an adapter."""
    method, config = found.method, found.adapter.config
    if not method.trains_adapter:
        return {**settings_of(method), **method.unsaid({})}
    return {
        **settings_of(method),
        "rank": int(config["r"]),
        "alpha": float(config["lora_alpha"]),
        "rslora": bool(config.get("use_rslora")),
        "dropout": float(config.get("lora_dropout") or 0.0),
        "adapter_bias": bool(config.get("lora_bias")),
        **method.unsaid({}),
    }


def _weight_format(name: AdoptedFormat | None, double_quant: bool) -> WeightFormat | None:
    settings = FormatConfig(format=name, double_quant=double_quant or None)
    description = described(settings, name or AS_IT_IS)
    return None if description is None else parse_format(description)


def _report(
    found: _Found,
    settings: TrainConfig,
    loaded: LoadedModel,
    changes: Mapping[str, str],
    notes: list[str],
) -> AdoptReport:
    model, adapter = loaded.model, found.adapter
    parameters = adapter_parameters(model, "default")
    layers = [layer.adapter("default") for _, layer in adapted_layers(model)]
    return AdoptReport(
        adopted_from=str(adapter.folder.resolve()),
        adapter_sha256=file_digest(adapter.file),
        peft_version=adapter.config.get("peft_version"),
        model=settings.model,
        method=settings.method,
        title=method_of(settings).title(settings),
        layers=len(layers),
        ranks=tuple(sorted({len(layer.get_parameter("A")) for layer in layers})),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        bits_per_weight=stored_bits_per_weight(model),
        versions=versions(),
        **base_facts(settings.model, found.subject.folder),
        written_by=adapter.written_by,
        base_changes=changes,
        tokenizer=None if found.tokenizer is None else found.tokenizer.differs,
        notes=(
            *_not_read(adapter),
            *found.fitted.notes,
            *notes,
            *beyond_notes(model, loaded.tokenizer),
        ),
    )


def _not_read(adapter: ForeignAdapter) -> list[str]:
    """Return a line on a second file of weights, of which PEFT, too, reads the first alone."""
    second = adapter.folder / PEFT_PICKLE
    beside = second.is_file() and second != adapter.file
    return [f"read is {adapter.file.name}; {second.name} beside it is not"] if beside else []
