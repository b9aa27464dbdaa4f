"""Merging a run into a model folder, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from graft.adapters.attach import (
    activate_adapters,
    adapted_layers,
    adapter_names,
    frozen_layers,
    replace_module,
)
from graft.adapters.merge import merge_adapters
from graft.adapters.starts.registry import STARTS
from graft.api.events import Events
from graft.api.original import Original, original_layers, take_the_rest
from graft.api.run.adopted import base_changes
from graft.api.run.folder import is_run, load_any, read_run_config
from graft.api.run.layout import ADAPTER, MODEL, START
from graft.errors import GraftError
from graft.files.write import check_new
from graft.formats.base import WeightFormat
from graft.formats.dense import DenseFormat
from graft.layers.frozen import FrozenLinear
from graft.model.adapter_files import check_adapter_file, load_adapter, read_own_config
from graft.model.hub import base_name
from graft.model.load import LoadedModel, load_model
from graft.model.save import round_as_saved, save_model
from graft.model.subject import open_subject

Into = Literal["trained", "original"]
MERGE_REPORT = "merge-report.json"


@dataclass(frozen=True)
class MergeReport:
    """How far a merged model is from the model that was trained."""

    into: str
    """What was merged into, in words: weights of a format (int keeps the trained codes), or the
    original base, which, and what it is to the weights that were trained on."""
    layers: int
    exact: bool
    """Every merged weight equals the weight that training computed with."""
    max_abs_weight_error: float
    worst_relative_error: float
    """Largest over the layers: RMS of the error over RMS of the update."""
    max_logit_difference: float
    """Largest |merged - trained| logit on fixed random tokens, in the compute dtype."""
    max_logit: float
    layer_errors: Mapping[str, Mapping[str, float | bool]]

    def summary(self) -> str:
        """Return one line for the terminal."""
        if self.exact and self.max_logit_difference == 0.0:
            return f"merged {self.layers} layers into {self.into}: exact, logits equal bit for bit"
        return (
            f"merged {self.layers} layers into {self.into}: weight error "
            f"{self.worst_relative_error:.2g} of the update in the worst layer, logits differ by "
            f"at most {self.max_logit_difference:.3g} (largest logit {self.max_logit:.3g})"
        )


def merge(
    run: str | Path,
    out: str | Path,
    *,
    into: Into = "trained",
    original: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    events: Events | None = None,
) -> MergeReport:
    """Merge a run's adapter, write the model folder `out` with merge-report.json in it.

    qalora, affine and merge_aware merge exactly into the quantised weights that they were trained
    as. lora and qlora merge into the weights that they were trained on, dequantised
    (into='trained'), or into the original base (into='original'; of an adapter that began as a
    part of quantised weights, which the original has whole, only what was trained since), stored in
    `dtype` (auto: the source's dtype). The original is the base that the run names; where that was
    quantised already it is `original`, a folder or hub id of the unquantised model. Whatever was
    rounded is in the report. Raises GraftError when the run is not finished, when the
    original is none, or when `out` exists.
    """
    events = events or Events()
    target = Path(out)
    check_new(target)
    run = Path(run)
    if not is_run(run):
        raise GraftError(f"{run} is no run folder; give the --out of a graft train")
    if (run / MODEL).is_dir():
        raise GraftError(f"{run} trained the whole model; it lies merged in {run / MODEL}")
    loaded = load_any(run, "exact", device, trust_remote_code=trust_remote_code)
    check_biases(loaded)
    merged_dtype = loaded.source_dtype if dtype == "auto" else getattr(torch, dtype)
    unquantised, start = None, None
    if original is not None and into != "original":
        raise GraftError("--original names what --into original merges into; give both")
    if into == "original":
        unquantised = _original_base(run, original, loaded, device, trust_remote_code)
        own = read_own_config(run / ADAPTER)
        if own is not None and STARTS[own.init].changes_base:
            start, active = START, adapter_names(loaded.model)
            check_adapter_file(run / START)
            load_adapter(loaded.model, run / START, start)
            activate_adapters(loaded.model, active)
    report = merge_loaded(
        loaded,
        original=unquantised,
        start=start,
        dtype=merged_dtype,
        whole=True,
        events=events,
    )
    save_model(loaded, target, merged_dtype, beside={MERGE_REPORT: asdict(report)})
    return report


def check_biases(loaded: LoadedModel) -> None:
    """Raise GraftError when an adapter trained biases for layers that a model folder has none of.

    Transformers and mlx-lm build the layers that config.json describes.
    """
    names = [
        name
        for name, layer in adapted_layers(loaded.model)
        if layer.base.bias is None and layer.delta_bias() is not None
    ]
    if names:
        raise GraftError(
            f"the adapter has a bias for {len(names)} layers that have none in the model, such as "
            f"{names[0]}: a merged folder of a {loaded.model.config.model_type} has no place for "
            "it. Export to gguf, onnx or openvino, or the adapter by itself, to peft"
        )


def merge_loaded(
    loaded: LoadedModel,
    *,
    original: Original | None = None,
    start: str | None = None,
    dtype: torch.dtype = torch.float32,
    target: WeightFormat | None = None,
    whole: bool = False,
    events: Events | None = None,
) -> MergeReport:
    """Merge the active adapters of a loaded model in place and measure what that changed.

    `target` re-quantises to a format; else grid adapters keep theirs and the rest becomes dense in
    `dtype`, as does a layer without an adapter that is stored as nf4, fp4 or int8. `start` names
    the adapter as it started, where that is to be left out of `original`. whole: a model that is
    dense then is rounded to `dtype` outside its layers too, as a folder stores it.
    """
    events = events or Events()
    model = loaded.model
    layers = dict(adapted_layers(model))
    if not layers:
        raise GraftError("the model carries no adapter to merge")
    trained = _probe(loaded)
    exact = all(layer.moves_grid_only() for layer in layers.values())
    if target is None and not exact:
        target = DenseFormat(str(dtype).removeprefix("torch."))
    if original is not None and target is None:
        raise GraftError(
            "--into original: this adapter moves the grid of quantised weights, and the original "
            "weights have none; merge into the trained base"
        )
    base_format = next(iter(layers.values())).base.weight_format.deployed
    bases = None
    if original is not None:
        bases = original_layers(model, original)
    errors = merge_adapters(
        model, target, bases, start, lambda done, total: events.progress("merging", done, total)
    )
    if target is not None:
        _follow(model, target, bases or {})
    into = f"{(target or base_format).name} weights"
    if original is not None:
        into = f"the original base, {original.name}"
        if original.given:
            take_the_rest(model, original.loaded.model, original.kept)
    if whole and not any(layer.weight_format.quantised for _, layer in frozen_layers(model)):
        round_as_saved(model, dtype)
    merged = _probe(loaded)
    return MergeReport(
        into=into,
        layers=len(errors),
        exact=all(error.exact for error in errors.values()),
        max_abs_weight_error=max(error.max_abs for error in errors.values()),
        worst_relative_error=max(error.relative_to_update for error in errors.values()),
        max_logit_difference=(merged - trained).abs().max().item(),
        max_logit=trained.abs().max().item(),
        layer_errors={layer: error.as_dict() for layer, error in errors.items()},
    )


def _follow(model: nn.Module, target: WeightFormat, bases: Mapping[str, FrozenLinear]) -> None:
    """Store the layers in formats that other programs do not read as `target`, from their bases."""
    for name, layer in list(frozen_layers(model)):
        if not layer.weight_format.deployed.portable:
            packed = target.pack(bases.get(name, layer).dense_weight(torch.float32))
            replace_module(model, name, layer.replaced(target, packed))


def _probe(loaded: LoadedModel) -> torch.Tensor:
    """Return the logits on fixed random tokens, float32."""
    generator = torch.Generator().manual_seed(0)
    size: int = loaded.model.config.vocab_size
    ids = torch.randint(size, (2, 64), generator=generator).to(loaded.model.device)
    with torch.no_grad():
        logits: torch.Tensor = loaded.model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _original_base(
    run: Path, given: str | None, loaded: LoadedModel, device: str, trust_remote_code: bool
) -> Original:
    """Return the unquantised model that a run's base was made of; raises GraftError for none."""
    config = read_run_config(run)
    name = given or config.model
    subject = open_subject(name, trust_remote_code)
    if subject.formats:
        raise GraftError(
            f"--into original: {name} is quantised itself, so there is no original to merge into"
            + (
                "; give the unquantised model that it was made of: --original FOLDER"
                if given is None
                else "; give the unquantised model"
            )
        )
    words = base_name(name)
    if not any(layer.weight_format.quantised for _, layer in frozen_layers(loaded.model)):
        words += " (unquantised, as the run was trained on it)"
    else:
        words += " (unquantised)"
    original = load_model(
        subject, dtype="float32", device=device, trust_remote_code=trust_remote_code
    )
    return Original(original, words, given is not None, frozenset(base_changes(run)))
