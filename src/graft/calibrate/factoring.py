"""Low-rank factors over a model: layer by layer, each on the factored ones before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.adapters.attach import replace_module
from graft.calibrate.base import OnLayer
from graft.calibrate.chain import StageChain
from graft.calibrate.driver import stages
from graft.calibrate.hessian import HessianSum, output_error
from graft.calibrate.low_rank import Spectrum, spectrum
from graft.errors import GraftError
from graft.layers.factored import factored, is_smaller
from graft.layers.registry import kind_of

ChooseRank = Callable[[Spectrum], int]
"""From a layer's singular values to its rank."""


@dataclass(frozen=True)
class FactoredLayer:
    """What became of one layer."""

    rank: int | None
    """None: it stayed whole, as its factors would be no smaller."""
    asked: int
    """The rank that was chosen."""
    weights: int
    """Of the matrix, or of the factors in its place."""
    weight_error: float
    """‖W - B A‖² / ‖W‖²."""
    output_error: float | None
    """The same of the outputs on the calibration text; None without any."""


@torch.no_grad()
def factor_model(
    model: nn.Module,
    names: Sequence[str],
    choose: ChooseRank,
    batches: Sequence[Tensor] = (),
    damping: float = 0.01,
    on_layer: OnLayer | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, FactoredLayer]:
    """Replace linear layers of a model by low-rank factors, and return what became of each.

    Without batches each weight is factored by itself. With them its factors are the best for the
    inputs that it gets behind the factored layers before it (`graft.calibrate.low_rank`), found as
    the calibrated solvers find theirs (`graft.calibrate.driver`). A layer whose factors would have
    as many weights as the matrix stays whole.

    names: of unquantised layers. batches: input_ids int64 [rows, tokens], without padding. dtype:
    what the factors are rounded to, in which they will be stored; by default what the layers have.
    Raises GraftError when a layer's inputs are not finite.
    """
    done: dict[str, FactoredLayer] = {}
    was_training = model.training
    model.eval()

    def take(name: str, inputs: HessianSum | None) -> None:
        done[name] = _factor(model, name, choose, inputs, damping, dtype)
        if on_layer is not None:
            on_layer(len(done), len(names))

    if batches:
        grouped = stages(model, names)
        chain = StageChain(model, list(grouped), batches)
        for stage, inside in grouped.items():
            layers = {name: model.get_submodule(name) for name in inside}
            sums = {name: _sum_for(layer) for name, layer in layers.items()}
            chain.run(stage, [(layers[name], sums[name]) for name in inside])
            for name in inside:
                take(name, sums.pop(name))
    else:
        for name in names:
            take(name, None)
    model.train(was_training)
    return {name: done[name] for name in names}


def _sum_for(layer: nn.Module) -> HessianSum:
    in_features, _ = kind_of(layer).shape(layer)
    return HessianSum(in_features, next(layer.parameters()).device)


def _factor(
    model: nn.Module,
    name: str,
    choose: ChooseRank,
    inputs: HessianSum | None,
    damping: float,
    dtype: torch.dtype | None,
) -> FactoredLayer:
    module = model.get_submodule(name)
    kind = kind_of(module)
    stored = module.get_parameter(kind.weight)
    weight = kind.rows(module, stored.detach())
    seen = inputs is not None and inputs.tokens > 0
    try:
        found = spectrum(weight, inputs.value if inputs is not None and seen else None, damping)
    except GraftError as error:
        raise GraftError(f"{name}: {error}") from error
    asked = choose(found)
    if not is_smaller(asked, *weight.shape):
        return FactoredLayer(None, asked, weight.numel(), 0.0, 0.0 if seen else None)
    down, up = (part.to(dtype or stored.dtype).to(stored.dtype) for part in found.factors(asked))
    layer = factored(module, asked)
    layer.down.weight = nn.Parameter(down.contiguous(), requires_grad=False)
    layer.up.weight = nn.Parameter(up.contiguous(), requires_grad=False)
    replace_module(model, name, layer)
    product = up.double() @ down.double()
    lost = (found.weight - product).square().sum() / found.weight.square().sum()
    outputs: float | None = None
    if inputs is not None and seen:
        nothing = torch.zeros_like(product)
        size = output_error(found.weight, nothing, inputs.value)
        outputs = output_error(found.weight, product, inputs.value) / size if size else 0.0
    weights = down.numel() + up.numel()
    return FactoredLayer(asked, asked, weights, lost.nan_to_num().item(), outputs)
