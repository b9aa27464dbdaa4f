"""What a solver is: how the codes of a weight, or of all weights of a model, are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from graft.adapters.attach import replace_module
from graft.formats.base import Packed, WeightFormat
from graft.layers.frozen import FrozenLinear

OnLayer = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""


class Solver:
    """How the codes of the quantised weights are chosen; as it stands here, to nearest.

    An entry that rounds each weight by itself overrides `pack`, and is asked while the model is
    read. One that has to see the whole model sets `needs_model` and overrides `round_model`; where
    it looks at text as well, `graft.calibrate.driver.Calibrated` has what it takes.
    """

    name: str
    """Its name in the registry."""
    needs_text: bool = False
    """Whether it looks at calibration text."""
    needs_model: bool = False
    """Whether the whole dense model has to be in memory."""

    def problem(self, weight_format: WeightFormat | None) -> str | None:
        """Return why it cannot round to a format, or None where it can; no format means dense."""
        return (
            "there is nothing to quantise; give --format, or drop it" if not weight_format else None
        )

    def pack(self, weight: Tensor, weight_format: WeightFormat) -> Packed:
        """Round a weight [out_features, in_features] by itself."""
        return weight_format.pack(weight)

    @torch.no_grad()
    def round_model(
        self,
        model: nn.Module,
        formats: Mapping[str, WeightFormat],
        batches: Sequence[Tensor],
        damping: float,
        on_layer: OnLayer | None = None,
    ) -> str | None:
        """Replace the dense frozen layers that `formats` names by rounded ones.

        batches: input_ids int64 [rows, tokens], the text, without padding. damping: added to the
        diagonal of second moments, as a fraction of its mean. Returns what there is to tell of the
        result in a note, or None; raises GraftError, before anything is changed, when it cannot.
        """
        for done, (name, weight_format) in enumerate(formats.items(), 1):
            layer = frozen_layer(model, name)
            packed = self.pack(layer.dense_weight(torch.float32), weight_format)
            replace_module(model, name, layer.replaced(weight_format, packed))
            if on_layer is not None:
                on_layer(done, len(formats))
        return None


def frozen_layer(model: nn.Module, name: str) -> FrozenLinear:
    """Return the frozen linear layer of that name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, FrozenLinear)
    return layer
