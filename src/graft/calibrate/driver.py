"""Calibrated solvers over a model: layer by layer, each on the rounded ones before it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.adapters.attach import replace_module
from graft.calibrate.base import OnLayer, Solver, frozen_layer
from graft.calibrate.chain import StageChain
from graft.calibrate.hessian import HessianSum, output_error
from graft.errors import GraftError, raise_problems
from graft.formats.base import Packed, WeightFormat
from graft.layers.frozen import FrozenLinear
from graft.model.decoder_layers import by_decoder_layer


@dataclass(frozen=True)
class LayerReport:
    """What rounding cost one layer: squared output error summed over the calibration tokens.

    W is the weight that was rounded, with what it makes up for.
    """

    error: float
    """trace((W - Q) H (W - Q)ᵀ) of the codes that were kept."""
    nearest_error: float
    """The same of round to nearest, for comparison."""
    tokens: int
    """Inputs that the layer saw; with none, GPTQ rounds to the nearest value of its grid."""


class Calibrated(Solver, ABC):
    """A solver that rounds each layer on the inputs that it gets behind the rounded layers before.

    An entry says how it rounds one weight on the sum of its inputs (`pack_on`).
    """

    needs_text = True
    needs_model = True
    counts_drift: bool = False
    """Whether the sums are to know how far the inputs have moved since nothing was rounded."""

    def wanted(self, weight: Tensor, inputs: HessianSum, damping: float) -> Tensor:
        """Return the weight whose outputs the rounded one is to come near; the weight itself."""
        return weight

    @abstractmethod
    def pack_on(
        self, weight: Tensor, inputs: HessianSum, weight_format: WeightFormat, damping: float
    ) -> Packed:
        """Round a weight float32 [out_features, in_features] on its inputs."""

    def round_model(
        self,
        model: nn.Module,
        formats: Mapping[str, WeightFormat],
        batches: Sequence[Tensor],
        damping: float,
        on_layer: OnLayer | None = None,
    ) -> str | None:
        """Round as `calibrate_model` does; return how the error compares with that of nearest."""
        reports = calibrate_model(model, formats, batches, self, damping, on_layer).values()
        error = sum(report.error for report in reports)
        nearest = sum(report.nearest_error for report in reports)
        return (
            f"{self.name} on {len(batches)} rows: squared output error {error / nearest:.2f} times "
            "that of rounding to nearest"
        )


def calibrate_model(
    model: nn.Module,
    formats: Mapping[str, WeightFormat],
    batches: Sequence[Tensor],
    solver: Calibrated,
    damping: float = 0.01,
    on_layer: OnLayer | None = None,
) -> dict[str, LayerReport]:
    """Replace dense frozen layers by rounded ones in the formats and report each one's error.

    One decoder layer's targets are one stage. A stage's Hessians come from forward passes in
    which all stages before it are rounded already. The hidden states between two decoder layers
    are kept, so that all of it costs about three forward passes over the batches, and the memory
    of one hidden state per token. A stage whose input is not the output of the stage before (the
    head, or a layer behind one that is not quantised) runs the model from its start instead.

    A solver that counts the drift of the inputs takes a fourth forward pass and another hidden
    state per token.

    formats: by layer name.
    batches: input_ids int64 [rows, tokens], without padding: every position counts.
    on_layer(done, total) is called after each layer.

    Raises GraftError, before anything is changed, when a name is no dense frozen layer, when there
    is nothing to calibrate on, or when the solver cannot round to a format.
    """
    problems = [
        problem
        for weight_format in dict.fromkeys(formats.values())
        if (problem := solver.problem(weight_format))
    ]
    problems += [problem for name in formats if (problem := _unfit(model, name))]
    if not any(batch.numel() for batch in batches):
        problems.append("no calibration tokens; give --data with at least one row")
    raise_problems(problems, "cannot calibrate")
    reports: dict[str, LayerReport] = {}
    was_training = model.training
    model.eval()
    grouped = stages(model, list(formats))
    chain = StageChain(model, list(grouped), batches, drift=solver.counts_drift)
    for stage, names in grouped.items():
        sums = {name: _hessian_sum(frozen_layer(model, name)) for name in names}
        chain.run(stage, [(frozen_layer(model, name), sums[name]) for name in names])
        for name in names:
            reports[name] = _quantise(model, name, sums.pop(name), formats[name], solver, damping)
            if on_layer is not None:
                on_layer(len(reports), len(formats))
    model.train(was_training)
    return reports


def stages(model: nn.Module, layer_names: Sequence[str]) -> dict[str, list[str]]:
    """Return layer names by stage, in the model's order.

    A stage is a decoder layer, or a layer outside of all.
    """
    wanted = set(layer_names)
    return by_decoder_layer(name for name, _ in model.named_modules() if name in wanted)


def _unfit(model: nn.Module, name: str) -> str | None:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        return f"{name} is not in the model"
    if not isinstance(layer, FrozenLinear):
        return f"{name} is a {type(layer).__name__}; expected a frozen linear layer"
    if layer.weight_format.quantised:
        return f"{name} is already in format {layer.weight_format.name!r}; expected dense"
    return None


def _hessian_sum(layer: FrozenLinear) -> HessianSum:
    return HessianSum(layer.in_features, next(layer.parameters()).device)


@torch.no_grad()
def _quantise(
    model: nn.Module,
    name: str,
    inputs: HessianSum,
    weight_format: WeightFormat,
    solver: Calibrated,
    damping: float,
) -> LayerReport:
    layer = frozen_layer(model, name)
    try:
        weight = solver.wanted(layer.dense_weight(torch.float32), inputs, damping)
        packed = solver.pack_on(weight, inputs, weight_format, damping)
    except GraftError as error:
        raise GraftError(f"{name}: {error}") from error
    rounded = layer.replaced(weight_format, packed)
    replace_module(model, name, rounded)
    nearest = layer.replaced(weight_format, weight_format.pack(weight))
    return LayerReport(
        error=output_error(weight, rounded.dense_weight(torch.float32), inputs.value),
        nearest_error=output_error(weight, nearest.dense_weight(torch.float32), inputs.value),
        tokens=inputs.tokens,
    )
