"""GPTQ over a whole model: decoder layer by decoder layer, each on the rounded ones before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.adapters.attach import replace_module
from graft.calibrate.chain import StageChain
from graft.calibrate.config import Solver
from graft.calibrate.gptq import HessianSum, gptq_pack, made_up, output_error, require_grid
from graft.errors import GraftError, raise_problems
from graft.formats.base import WeightFormat
from graft.formats.dense import DenseFormat
from graft.layers.frozen import FrozenLinear

_QEP_SHARE = 0.5
"""Share of the drift that solver qep makes up for, as its authors chose it."""


def drift_share(solver: Solver) -> float:
    """Return the share of the drift that a calibrated solver makes up for; gptq as published, 0."""
    return _QEP_SHARE if solver == "qep" else 0.0


@dataclass(frozen=True)
class LayerReport:
    """What rounding cost one layer: squared output error summed over the calibration tokens.

    W is the weight that was rounded, with what it makes up for.
    """

    gptq: float
    """trace((W - Q) H (W - Q)ᵀ) of the codes that were kept."""
    rtn: float
    """The same of round to nearest, for comparison."""
    tokens: int
    """Inputs that the layer saw; with none, GPTQ rounds to the nearest value of its grid."""


def calibrate_model(
    model: nn.Module,
    layer_names: Sequence[str],
    batches: Sequence[Tensor],
    weight_format: WeightFormat | Mapping[str, WeightFormat],
    damping: float = 0.01,
    on_layer: Callable[[int, int], None] | None = None,
    drift_share: float = 0.0,
) -> dict[str, LayerReport]:
    """Replace the named dense frozen layers by GPTQ-rounded ones and report each one's error.

    One decoder layer's targets are one stage. A stage's Hessians come from forward passes in
    which all stages before it are rounded already. The hidden states between two decoder layers
    are kept, so that all of it costs about three forward passes over the batches, and the memory
    of one hidden state per token. A stage whose input is not the output of the stage before (the
    head, or a layer behind one that is not quantised) runs the model from its start instead.

    With a `drift_share` each weight first makes up for that share of what rounding the stages
    before it has done to its inputs (`made_up`), at the price of a fourth forward pass and of
    another hidden state per token. GPTQ as it was published has none.

    weight_format: one for all, or one by layer name.
    batches: input_ids int64 [rows, tokens], without padding: every position counts.
    on_layer(done, total) is called after each layer.

    Raises GraftError, before anything is changed, when a name is no dense frozen layer, when there
    is nothing to calibrate on, or when the format has no grid.
    """
    formats = (
        weight_format
        if isinstance(weight_format, Mapping)
        else dict.fromkeys(layer_names, weight_format)
    )
    for chosen in formats.values():
        require_grid(chosen)
    problems = [problem for name in layer_names if (problem := _unfit(model, name))]
    if not any(batch.numel() for batch in batches):
        problems.append("no calibration tokens; give --data with at least one row")
    raise_problems(problems, "cannot calibrate")
    reports: dict[str, LayerReport] = {}
    was_training = model.training
    model.eval()
    grouped = stages(model, layer_names)
    chain = StageChain(model, list(grouped), batches, drift=drift_share > 0)
    for stage, names in grouped.items():
        hessians = {name: _hessian_sum(_frozen(model, name)) for name in names}
        chain.run(stage, [(_frozen(model, name), hessians[name]) for name in names])
        for name in names:
            settings = formats[name], damping, drift_share
            reports[name] = _quantise(model, name, hessians.pop(name), *settings)
            if on_layer is not None:
                on_layer(len(reports), len(layer_names))
    model.train(was_training)
    return reports


def stages(model: nn.Module, layer_names: Sequence[str]) -> dict[str, list[str]]:
    """Return layer names by stage, in the model's order.

    A stage is the name up to its first number, the index of the decoder layer: model.layers.3,
    transformer.h.3. A name without a number is a stage of its own.
    """
    wanted = set(layer_names)
    grouped: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        if name in wanted:
            parts = name.split(".")
            numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
            stage = ".".join(parts[: numbers[0] + 1]) if numbers else name
            grouped.setdefault(stage, []).append(name)
    return grouped


def _unfit(model: nn.Module, name: str) -> str | None:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        return f"{name} is not in the model"
    if not isinstance(layer, FrozenLinear):
        return f"{name} is a {type(layer).__name__}; expected a frozen linear layer"
    if not isinstance(layer.weight_format, DenseFormat):
        return f"{name} is already in format {layer.weight_format.name!r}; expected dense"
    return None


def _frozen(model: nn.Module, name: str) -> FrozenLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, FrozenLinear)
    return layer


def _hessian_sum(layer: FrozenLinear) -> HessianSum:
    return HessianSum(layer.in_features, next(layer.parameters()).device)


@torch.no_grad()
def _quantise(
    model: nn.Module,
    name: str,
    hessian: HessianSum,
    weight_format: WeightFormat,
    damping: float,
    drift_share: float,
) -> LayerReport:
    layer = _frozen(model, name)
    weight = layer.dense_weight(torch.float32)
    try:
        if drift_share:
            weight = made_up(weight, hessian, drift_share, damping)
        packed = gptq_pack(weight, hessian.value, weight_format, damping)
    except GraftError as error:
        raise GraftError(f"{name}: {error}") from error
    rounded = layer.replaced(weight_format, packed)
    replace_module(model, name, rounded)
    nearest = layer.replaced(weight_format, weight_format.pack(weight))
    return LayerReport(
        gptq=output_error(weight, rounded.dense_weight(torch.float32), hessian.value),
        rtn=output_error(weight, nearest.dense_weight(torch.float32), hessian.value),
        tokens=hessian.tokens,
    )
