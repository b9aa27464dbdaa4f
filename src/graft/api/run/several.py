"""A model with the adapters that a command asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from graft.adapters.attach import frozen_layers
from graft.api.adapter.files import adapter_folder
from graft.api.adapters import active_adapters, load_adapter, set_adapters
from graft.api.run.folder import (
    PromptStyle,
    is_run,
    load_any,
    prompt_style,
    read_run_config,
    with_template,
)
from graft.api.run.layout import BASE
from graft.errors import raise_problems
from graft.evaluate.config import AdaptersConfig
from graft.model.adapter_files import read_configs
from graft.model.load import LoadedModel


def load_with_adapters(
    path: str | Path,
    chosen: AdaptersConfig,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load what `load_any` loads, with the adapters that are asked for beside its own, or none.

    What is odd about them (trained on another base) is in the notes. Raises GraftError when flags
    contradict each other or an adapter does not fit.
    """
    _check(chosen)
    loaded = load_any(
        path, dtype, device, tokenizer, trust_remote_code, with_adapter=not chosen.no_adapter
    )
    notes = []
    for adapter in chosen.adapter:
        load_adapter(loaded.model, adapter)
        notes += _notes(Path(adapter), path, loaded)
    if chosen.adapter_weights:
        before = list(active_adapters(loaded.model))
        own = before[: len(before) - len(chosen.adapter)]
        added = zip(before[len(own) :], chosen.adapter_weights, strict=True)
        set_adapters(loaded.model, {**dict.fromkeys(own, 1.0), **dict(added)})
    styled = _styled(path, chosen)
    if styled is not None and not is_run(Path(path)):
        loaded = with_template(loaded, styled)
    return replace(loaded, notes=(*loaded.notes, *notes))


def style_with_adapters(path: str | Path, chosen: AdaptersConfig) -> PromptStyle:
    """Return how prompts are dressed: as the model's own run, or else its first adapter's, did."""
    return prompt_style(_styled(path, chosen) or Path(path))


def _styled(path: str | Path, chosen: AdaptersConfig) -> Path | None:
    return next((one for one in map(Path, (path, *chosen.adapter)) if is_run(one)), None)


def _check(chosen: AdaptersConfig) -> None:
    problems = []
    if chosen.no_adapter and chosen.adapter:
        problems.append("--no-adapter and --adapter contradict each other; give one of them")
    if chosen.adapter_weights and len(chosen.adapter_weights) != len(chosen.adapter):
        problems.append(
            f"--adapter-weights has {len(chosen.adapter_weights)} values for "
            f"{len(chosen.adapter)} adapters"
        )
    raise_problems(problems, "adapters")
    for adapter in chosen.adapter:
        adapter_folder(adapter)


def _notes(adapter: Path, model: str | Path, loaded: LoadedModel) -> list[str]:
    """Return what to tell of an adapter that was trained on something else than it is put on."""
    path = Path(model)
    own, config = read_configs(adapter_folder(adapter))
    named = (own.base if own is not None else None) or config.get("base_model_name_or_path") or ""
    here = read_run_config(path).model if is_run(path) else str(model)
    if path.name == BASE and is_run(path.parent):  # a run's packed base
        here = read_run_config(path.parent).model
    if named and Path(named).name != Path(here).name:
        return [f"adapter {adapter} was trained on {named}; here it is put on {here}"]
    quantised = any(layer.weight_format.quantised for _, layer in frozen_layers(loaded.model))
    if is_run(adapter) and (adapter / BASE).is_dir() != quantised:
        what = "quantised weights" if not quantised else "unquantised weights"
        return [
            f"adapter {adapter} was trained on {what}, and those here are not: what it computes "
            "differs by their rounding" + ("" if quantised else f" (its base is {adapter / BASE})")
        ]
    return []
