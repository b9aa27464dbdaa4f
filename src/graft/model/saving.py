"""What Transformers' own saving writes of a model with packed, adapted or factored layers.

`save_pretrained`, and `push_to_hub` and `Trainer` through it, write a model's tensors under their
names. Those of packed and adapted layers are graft's, and `from_pretrained` would start from random
weights in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.attach import adapted_layers, frozen_layers
from graft.errors import GraftError
from graft.layers.factored import factored_layers
from graft.layers.registry import kind_of
from graft.model.factors import bias_of, product_of
from graft.text import quoted


def saved_whole(model: PreTrainedModel) -> PreTrainedModel:
    """Let `save_pretrained` of a model write the weights that it computes with, and return it.

    A model without packed or adapted layers stays as it is.
    """
    if any(True for _ in (*frozen_layers(model), *factored_layers(model))):
        model.__class__ = _saving(type(model))  # type: ignore[arg-type]
    return model


def plain_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's tensors under the names that Transformers gives them.

    Packed, adapted and factored layers give the weight that they compute with, adapters merged, in
    float32.
    """
    products = dict(factored_layers(model))
    parts = tuple(f"{name}." for name in products)
    adapted: dict[str, AdaptedLinear] = dict(adapted_layers(model))
    layers = {name: layer for name, layer in frozen_layers(model) if not name.startswith(parts)}
    inside = (*parts, *(f"{name}." for name in layers))
    state = model.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith(inside)}
    for name, layer in layers.items():
        kind = kind_of(layer)
        weight = adapted[name].effective_weight() if name in adapted else layer.dense_weight()
        tensors[f"{name}.{kind.weight}"] = kind.stored(layer, weight.float()).contiguous()
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias.detach()
    for name, product in products.items():
        weight = product_of(product)
        tensors[f"{name}.weight"] = weight.T.contiguous() if product.transposed else weight
        if (bias := bias_of(product)) is not None:
            tensors[f"{name}.bias"] = bias.detach()
    return tensors


class _Whole(PreTrainedModel):
    """What a model with packed or adapted layers does differently."""

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *arguments: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write a folder that `from_pretrained` reads as this very model.

        Adapters are merged and packed weights become floats; those are written in float32, whatever
        the model computes in. `graft merge` and `graft export` keep packed weights as they are.
        Raises GraftError when `state_dict` holds other values than the model.
        """
        if arguments:  # is_main_process and state_dict may be given by their places
            names = ("is_main_process", "state_dict")
            options |= dict(zip(names, arguments, strict=False))
            state_dict = options.pop("state_dict", state_dict)
        if state_dict is not None and not _is_of(self, state_dict):
            raise GraftError(
                "save_pretrained got a state_dict that is not this model's: its packed and adapted "
                "layers are written as the model has them\n"
                "load that state into the model first, and call save_pretrained without it"
            )
        super().save_pretrained(save_directory, state_dict=plain_weights(self), **options)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state of this model; raises GraftError for one that save_pretrained wrote."""
        own = self.state_dict().keys()
        merged = [
            name
            for name in state_dict
            if name not in own
            and name.rpartition(".")[0]
            in {**dict(frozen_layers(self)), **dict(factored_layers(self))}
        ]
        if merged:
            raise GraftError(
                f"this state has {quoted(merged[0])}, as a folder of save_pretrained has: whole "
                "weights, and no adapter to go on with\n"
                "a run goes on with: graft train --resume; a state that goes on is what "
                "torch.save(model.state_dict(), FILE) keeps"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the class of Transformers, as this one has no name of its own."""
        return _revived, (type(self).__mro__[2],), self.__dict__


@cache
def _saving(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a class that differs from a model's own in nothing but what `_Whole` has."""
    if issubclass(kind, _Whole):
        return kind
    same = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (_Whole, kind), same)


def _revived(kind: type[PreTrainedModel]) -> PreTrainedModel:
    made = _saving(kind)  # type: ignore[arg-type]
    return made.__new__(made)


def _is_of(model: PreTrainedModel, state: Mapping[str, Tensor]) -> bool:
    own = model.state_dict()
    return state.keys() == own.keys() and all(
        tensor.data_ptr() == own[name].data_ptr() or torch.equal(tensor.cpu(), own[name].cpu())
        for name, tensor in state.items()
    )
