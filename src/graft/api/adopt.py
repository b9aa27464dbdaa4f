"""Bringing in an adapter that PEFT trained, as a run that every other command takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedModel

from graft.adapters.attach import adapted_layers, adapter_parameters
from graft.adapters.method import Method
from graft.adapters.registry import METHODS, method_of, settings_of
from graft.adapters.starts.registry import STARTS
from graft.api.config import AdoptedFormat, TrainConfig, as_plain
from graft.api.events import Events
from graft.api.run.folder import PromptStyle, write_base_reference, write_prompt_style
from graft.api.run.layout import ADAPTER, BASE, CONFIG, REPORT
from graft.api.run.report import base_facts, stored_bits_per_weight, versions
from graft.data.shapes.registry import CHAT, PLAIN
from graft.errors import GraftError, Problems
from graft.files.digest import file_digest
from graft.files.write import check_new, new_folder, write_json, write_yaml
from graft.formats.base import WeightFormat
from graft.formats.choice import described
from graft.formats.config import FormatConfig
from graft.formats.dense import DenseFormat
from graft.formats.registry import AS_IT_IS, parse_format
from graft.model.adapter_files import load_adapter, read_own_config, save_adapter
from graft.model.load import load_model
from graft.model.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, read_peft_config
from graft.model.save import save_model
from graft.model.subject import Subject, open_subject
from graft.model.targets import freeze_layers, select_targets
from graft.plan.skeleton import freeze_on_meta
from graft.text import markdown


@dataclass(frozen=True)
class AdoptReport:
    """What was brought in, and from where."""

    adopted_from: str
    adapter_sha256: str
    """Of the adapter's tensors as they were found."""
    peft_version: str | None
    """The version of PEFT that wrote it, where it says so."""
    model: str
    method: str
    """The method of `graft train` that would have trained it; graft did not."""
    title: str
    """The method in words, with what its flags make of it."""
    layers: int
    ranks: tuple[int, ...]
    parameters: int
    """Of the adapter."""
    bits_per_weight: float | None
    """Of the quantised or adapted layers of the base."""
    versions: Mapping[str, str]
    base_name: str
    base_hub_id: str | None
    base_fingerprint: str
    base_license: Mapping[str, str]


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
    """Make the run folder `out` of a PEFT adapter's folder, and of the base that it belongs to.

    merge, export, eval, generate and verify then take it as they take a run that graft trained.
    LoRA, rsLoRA and DoRA belong on a dense base, on one that graft quantised, or, with `format`,
    on a dense one whose linear layers are rounded as bitsandbytes rounds them; QA-LoRA on a folder
    of integers that graft wrote. `model` is a folder or hub id, by default the one that the adapter
    names. Everything is checked before a weight of the base is read or anything is written; all
    problems are raised at once as a GraftError.
    """
    events = events or Events()
    run, source = Path(out), Path(adapter)
    found = _checked(source, run, model, format, double_quant, trust_remote_code)
    subject, weight_format, targets = found.subject, found.weight_format, found.targets
    settings = TrainConfig(
        model=found.name,
        data="",
        out=str(run),
        **_adapter_settings(found.method, found.config),
        targets=tuple(targets),
        format=format,
        double_quant=None if weight_format is None else weight_format.options().get("double_quant"),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    loaded = load_model(
        subject,
        weight_format=weight_format,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        on_tensor=lambda done, total: events.progress("reading the model", done, total),
    )
    with new_folder(run) as part:
        if weight_format is None:
            freeze_layers(loaded.model, targets)
            write_base_reference(part, subject.folder, bool(subject.parted))
        else:
            save_model(loaded, part / BASE)
        load_adapter(loaded.model, source)
        base = subject.folder if weight_format is None else run / BASE
        save_adapter(loaded.model, part / ADAPTER, base=str(base))
        report = _report(source, found.config, settings, loaded.model, subject.folder)
        write_yaml(part / CONFIG, as_plain(settings))
        # How its prompts were dressed in training is not known; a chat template says how to.
        chats = loaded.tokenizer.chat_template is not None
        write_prompt_style(part, PromptStyle(CHAT if chats else PLAIN))
        write_json(part / REPORT, asdict(report))
        (part / "report.md").write_text(_markdown(report), encoding="utf-8")
    return report


class _Found(NamedTuple):
    """What is to be adopted."""

    name: str
    """Of the base, as it was given or the adapter names it."""
    subject: Subject
    weight_format: WeightFormat | None
    config: Mapping[str, Any]
    """PEFT's."""
    method: Method
    targets: list[str]


def _checked(
    source: Path,
    run: Path,
    model: str | None,
    format: AdoptedFormat | None,
    double_quant: bool,
    trust_remote_code: bool,
) -> _Found:
    """Return what there is to adopt; raises GraftError with all that hinders."""
    problems = Problems()
    with problems.collecting():
        check_new(run)
    weight_format: WeightFormat | None = None
    with problems.collecting():
        weight_format = _weight_format(format, double_quant)
    config: dict[str, Any] = {}
    with problems.collecting():
        config = _read_settings(source)
    name = model or str(config.get("base_model_name_or_path") or "")
    targets = list[str]()
    if config and not name:
        problems.found.append(f"{source} names no base; give --model")
    if name:
        with problems.collecting():
            subject = open_subject(name, trust_remote_code)
            _ = subject.tokenizer  # which must be there
            skeleton = _skeleton(subject, weight_format)
            if config:
                method = load_adapter(skeleton, source)
                targets = [layer for layer, _ in adapted_layers(skeleton)]
    problems.raise_all("nothing was written")
    if weight_format is not None and method.on_quantised is not None:
        method = METHODS[method.on_quantised]
    return _Found(name, subject, weight_format, config, method, targets)


def _read_settings(source: Path) -> dict[str, Any]:
    """Return adapter_config.json; raises GraftError when there is none that can be adopted."""
    if not source.is_dir():
        raise GraftError(
            f"there is no folder {source}; download an adapter of the hub first: "
            "hf download OWNER/NAME --local-dir FOLDER"
        )
    if not (source / PEFT_CONFIG).is_file():
        raise GraftError(f"{source} is no adapter folder of PEFT: it has no {PEFT_CONFIG}")
    own = read_own_config(source)
    if own is not None and STARTS[own.init].changes_base:
        raise GraftError(
            f"{source} is from a run of graft that started as {own.init}, and its start is not in "
            "it; use the run itself"
        )
    return read_peft_config(source)


def _adapter_settings(method: Method, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `AdapterConfig` that would have trained PEFT's adapter."""
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


def _skeleton(subject: Subject, weight_format: WeightFormat | None) -> PreTrainedModel:
    """Return the base without data, its linear layers frozen as they will be."""
    if subject.formats and weight_format is not None:
        raise GraftError(
            f"{subject.folder} is quantised already; drop --format, or give its dense base"
        )
    skeleton = subject.new_model()
    names = select_targets(skeleton, ())
    freeze_on_meta(skeleton, dict.fromkeys(names, weight_format or DenseFormat()) | subject.formats)
    return skeleton


def _report(
    source: Path,
    config: Mapping[str, Any],
    settings: TrainConfig,
    model: PreTrainedModel,
    folder: Path,
) -> AdoptReport:
    parameters = adapter_parameters(model, "default")
    layers = [layer.adapter("default") for _, layer in adapted_layers(model)]
    return AdoptReport(
        adopted_from=str(source.resolve()),
        adapter_sha256=file_digest(source / PEFT_WEIGHTS),
        peft_version=config.get("peft_version"),
        model=settings.model,
        method=settings.method,
        title=method_of(settings).title(settings),
        layers=len(layers),
        ranks=tuple(sorted({len(layer.get_parameter("A")) for layer in layers})),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        bits_per_weight=stored_bits_per_weight(model),
        versions=versions(),
        **base_facts(settings.model, folder),
    )


def _markdown(report: AdoptReport) -> str:
    bits = "-" if report.bits_per_weight is None else f"{report.bits_per_weight:.3f}"
    rows = {
        "adapter": f"{report.adopted_from}, SHA-256 {report.adapter_sha256[:16]}…",
        "written by": f"PEFT {report.peft_version}" if report.peft_version else "PEFT",
        "layers, ranks": f"{report.layers}, {' '.join(map(str, report.ranks))}",
        "parameters": f"{report.parameters:,}",
        "bits per weight of the adapted layers": bits,
    }
    table = "\n".join(f"| {name} | {markdown(value)} |" for name, value in rows.items())
    versions_line = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return (
        f"# {markdown(f'{report.title} on {Path(report.model).name}, adopted')}\n\n"
        "graft did not train this adapter: it was brought in with `graft adopt`.\n\n"
        f"| | |\n|---|---|\n{table}\n\nBase: {markdown(report.model)}.\n\n"
        f"Versions: {versions_line}.\n"
    )
