"""Factored layers in a model folder: which they are, and the products that they stand for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.attach import replace_module
from graft.errors import raise_problems
from graft.formats.dense import DenseFormat
from graft.layers.factored import Factored, factored, factored_layers
from graft.layers.frozen import FrozenLinear
from graft.layers.registry import kind_of
from graft.model.targets import linear_layers
from graft.text import quoted


def factor_ranks(model: nn.Module) -> dict[str, int]:
    """Return the ranks of a model's factored layers by name; empty where it has none."""
    return {name: _factor_shape(layer.down)[1] for name, layer in factored_layers(model)}


def build_factors(model: PreTrainedModel, ranks: Mapping[str, object], where: str) -> None:
    """Put factored layers without data in the place of the named linear layers of a skeleton.

    ranks: as a folder's graft.json says them. Raises GraftError with every one that does not fit.
    """
    layers, problems = linear_layers(model), []
    for name, rank in ranks.items():
        if name not in layers:
            problems.append(f"{quoted(name)} is no linear layer of this model")
        elif type(rank) is not int or not 1 <= rank <= min(
            kind_of(layers[name]).shape(layers[name])
        ):
            problems.append(f"{quoted(name)} has rank {quoted(rank)}, which no factors of it have")
    raise_problems(problems[:20], f"{where}, which may be from another version of graft")
    for name, rank in ranks.items():
        assert isinstance(rank, int)
        replace_module(model, name, factored(layers[name], rank))


def multiply_factors(model: PreTrainedModel) -> dict[str, int]:
    """Replace factored layers by whole ones that hold the products; return the ranks by name.

    A product is in the dtype of its factors, in float32 where either is quantised. The layers carry
    no adapter.
    """
    ranks = factor_ranks(model)
    for name, layer in list(factored_layers(model)):
        weight = product_of(layer)
        parts = layer.down, layer.up
        packed = any(isinstance(p, FrozenLinear) and p.weight_format.quantised for p in parts)
        dtype = torch.float32 if packed else next(layer.up.parameters()).dtype
        whole = FrozenLinear(
            weight.shape[1],
            weight.shape[0],
            DenseFormat(str(dtype).removeprefix("torch.")),
            {"weight": weight.to(dtype)},
            bias_of(layer),
            layer.transposed,
        )
        replace_module(model, name, whole)
    return ranks


def product_of(layer: Factored) -> Tensor:
    """Return B A of a factored layer, adapters merged, as float32 [out_features, in_features]."""
    product = _factor_weight(layer.up).double() @ _factor_weight(layer.down).double()
    return product.float()


def bias_of(layer: Factored) -> Tensor | None:
    """Return what a factored layer adds to its product; [out_features], or None.

    That is the bias of `up`, and what `up` makes of one of `down`, which an adapter may have left.
    """
    found = (dict(_bare(part).named_parameters(recurse=False)) for part in (layer.down, layer.up))
    down, up = (one.get("bias") for one in found)
    if down is None:
        return up
    moved = _factor_weight(layer.up).double() @ down.double()
    return (moved if up is None else moved + up.double()).to(down.dtype)


def products_note(ranks: Mapping[str, int]) -> str:
    """Return in words what an export did with so many factored layers."""
    low, high = min(ranks.values()), max(ranks.values())
    of_ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return (
        f"{len(ranks)} layers are low-rank factors of {of_ranks} in graft's folder; this holds "
        "their products, whole matrices, so it is no smaller than an export of the original model"
    )


def _factor_weight(module: nn.Module) -> Tensor:
    if isinstance(module, AdaptedLinear):
        return module.effective_weight().detach()
    if isinstance(module, FrozenLinear):
        return module.dense_weight().detach()
    return module.get_parameter(kind_of(module).weight).detach()


def _factor_shape(module: nn.Module) -> tuple[int, int]:
    base = _bare(module)
    return kind_of(base).shape(base)


def _bare(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, AdaptedLinear) else module
