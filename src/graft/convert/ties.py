"""Tied tensors of which the files of another tool hold two that differ."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from graft.convert.source import DenseLayer, Source, of_layer
from graft.errors import GraftError
from graft.model.names import parted, parted_note
from graft.model.subject import build_skeleton


def with_own_heads(source: Source) -> Source:
    """Return the source with a model that ties nothing which the source holds as two tensors.

    A head that was trained lies beside settings that tie it to the embedding, or one is quantised
    and the other is not.
    """
    held = {*source.tensors, *(f"{name}.weight" for name in source.layers)}
    found = parted(source.model, held, partial(_equal, source))
    if not found:
        return source
    config = copy.deepcopy(source.model.config)
    config.tie_word_embeddings = False
    source.notes.append(parted_note(found))
    return replace(source, model=build_skeleton(config))


def _equal(source: Source, one: str, other: str) -> bool:
    try:
        first, second = _value(source, one), _value(source, other)
    except GraftError:
        return False  # it is told when the tensor is brought in
    if first.shape != second.shape:
        return False
    wide = torch.promote_types(first.dtype, second.dtype)
    return all(torch.equal(a.to(wide), b.to(wide)) for a, b in zip(first, second, strict=True))


def _value(source: Source, name: str) -> Tensor:
    if name in source.tensors:
        return source.tensors[name].make()
    rows, columns = source.model.get_parameter(name).shape
    owner = name.removesuffix(".weight")
    with of_layer(owner):
        layer = source.layers[owner](rows, columns)
        if isinstance(layer, DenseLayer):
            return layer.make()
        return layer.weight_format.unpack(layer.make(), rows, columns, torch.float32)
