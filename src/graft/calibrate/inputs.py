"""What the layers of a model get as inputs on a text, one decoder layer after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from graft.adapters.starts.base import Inputs
from graft.calibrate.base import OnLayer, frozen_layer
from graft.calibrate.chain import StageChain
from graft.calibrate.driver import stages
from graft.calibrate.hessian import HessianSum
from graft.errors import GraftError


class InputMoments(HessianSum):
    """The sums of x xᵀ and of x; `total`: float64 [in_features]."""

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        super().__init__(in_features, device)
        self.total = torch.zeros(in_features, dtype=torch.float64, device=device)

    def add(self, x: Tensor, unrounded: Tensor | None = None) -> None:
        """Add the inputs x [..., in_features]."""
        super().add(x, unrounded)
        self.total += x.detach().reshape(-1, x.shape[-1]).double().sum(0)


@torch.no_grad()
def look_at_inputs(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Tensor],
    look: Callable[[str, Tensor, Inputs], None],
    on_layer: OnLayer | None = None,
) -> None:
    """Call look(name, weight, inputs) for each of the named frozen layers, in the model's order.

    The sums of one decoder layer at a time are in memory, as `calibrate_model` has them; the model
    stays as it is. weight: float32 [out_features, in_features]. batches: input_ids int64
    [rows, tokens], without padding: every position counts. Raises GraftError for a layer that none
    of the tokens reach, such as an expert.
    """
    was_training = model.training
    model.eval()
    grouped = stages(model, names)
    chain, done = StageChain(model, list(grouped), batches), 0
    for stage, inside in grouped.items():
        layers = {name: frozen_layer(model, name) for name in inside}
        sums = {
            name: InputMoments(layer.in_features, next(layer.parameters()).device)
            for name, layer in layers.items()
        }
        chain.run(stage, [(layers[name], sums[name]) for name in inside])
        for name, layer in layers.items():
            found = sums.pop(name)
            if not found.tokens:
                raise GraftError(
                    f"{name} gets no input from the {len(batches)} rows that are looked at; raise "
                    "--calibration-rows, or leave it out of --targets"
                )
            inputs = Inputs(found.value, found.total, found.tokens)
            look(name, layer.dense_weight(torch.float32), inputs)
            done += 1
            if on_layer is not None:
                on_layer(done, len(names))
    model.train(was_training)
