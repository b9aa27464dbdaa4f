"""What a reader of another tool's files hands over: a skeleton, and how to make each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graft.convert.grids.integers import Rounding
from graft.errors import GraftError
from graft.formats.base import Packed, WeightFormat
from graft.understood import understood


@dataclass(frozen=True)
class QuantisedLayer:
    """A weight [out_features, in_features] that graft can hold; `make` reads and packs it."""

    weight_format: WeightFormat
    make: Callable[[], Packed]


@dataclass(frozen=True)
class DenseLayer:
    """A quantised weight that no format of graft holds, so that it is written only dequantised."""

    quantisation: str
    """What the file holds, for the report: 'Q4_K', 'GPTQ in activation order'."""
    make: Callable[[], Tensor]
    """Reads and dequantises it, float32 [out_features, in_features]."""


ReadLayer = Callable[[int, int], QuantisedLayer | DenseLayer]
"""From (out_features, in_features) to the layer; raises GraftError where the two do not fit."""


@contextmanager
def of_layer(name: str) -> Iterator[None]:
    """Raise GraftError that names the layer, for whatever its tensors raise when they are read."""
    try:
        with understood(name):
            yield
    except GraftError as error:
        if name in str(error):
            raise
        raise GraftError(f"{name}: {error}") from error


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that is kept as it is; `make` reads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    quantisation: str = ""
    """What the file holds where that is quantised and no layer's weight, such as fused experts:
    then it is dequantised, and written only where that was asked for."""


@dataclass(frozen=True)
class Source:
    """Everything about a model that another tool wrote; nothing of its weights is in memory."""

    kind: str
    """What was found, for the report."""
    model: PreTrainedModel
    """The modules on the meta device, which say what names and shapes must be there."""
    layers: Mapping[str, ReadLayer]
    """Quantised weights by the name of their module, without '.weight'."""
    tensors: Mapping[str, PlainTensor]
    """All other tensors by name."""
    rounding: Rounding = field(default_factory=Rounding)
    """The largest rounding of statistics in the layers that were made so far."""
    dequantised: tuple[str, ...] = ()
    """Tensors of `tensors` that the file holds quantised and that need no asking: embeddings."""
    notes: list[str] = field(default_factory=list)
    """What is worth telling; readers add to it until the last tensor is made."""
    own_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None
    """Makes the tokenizer that the weights' file describes; None where it describes none."""
    check_tokenizer: Callable[[PreTrainedTokenizerBase], list[str]] | None = None
    """Returns notes on how a given tokenizer differs from it; raises GraftError for another's."""
