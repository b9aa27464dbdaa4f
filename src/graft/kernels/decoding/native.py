"""A whole decoder of the Llama family in one call of the native library for each token.

What surrounds the products costs as much as they do when there is one token: Python, PyTorch's
dispatcher, the start of parallel work. Here the decoder is described to the library once, as C
structs that point at the model's own tensors, and the threads meet only between its stages. Several
sequences may go on in one call, which reads each weight once for all of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.kernels.backend.native_library import (
    DTYPES,
    PackedWeight,
    address,
    call,
    prepared,
)
from graft.kernels.decoding.prompt import prompt_caches
from graft.kernels.decoding.weights import DecoderLayer, DecoderWeights, Projection
from graft.kernels.packed.weight import Weight

STRIDE = 64
"""A head's cached rows are filled up with zeros to a multiple of this."""
MOST_SEQUENCES = 16
"""That go on in one call."""


_int, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_PARTS = tuple(field.name for field in fields(DecoderLayer))


class Next(NamedTuple):
    """A token that stands at `position` of a sequence, in the order of graft_next."""

    token: int
    position: int
    sequence: int = 0


class _Next(ctypes.Structure):
    _fields_ = [(name, _int) for name in Next._fields]


class _Projection(ctypes.Structure):
    _fields_ = [("weight", PackedWeight), ("bias", _pointer)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _pointer if name.endswith("norm") else _Projection) for name in _PARTS),
        *((name, _pointer) for name in ("keys", "values")),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        *((name, _int) for name in ("dtype", "layers", "hidden", "intermediate", "heads")),
        *((name, _int) for name in ("key_value_heads", "head_dim", "capacity", "rounds_inputs")),
        ("folds_inputs", _int),
        *((name, _float) for name in ("epsilon", "attention_scaling")),
        ("layer", ctypes.POINTER(_Layer)),
        ("embedding", PackedWeight),
        ("norm", _pointer),
        ("head", _Projection),
        *((name, _pointer) for name in ("cosines", "sines")),
    ]


class NativeDecoder:
    """Computes the logits of one token after another, with a cache of keys and values.

    Up to MOST_SEQUENCES sequences have a cache each, and go on alone or together; a sequence's
    logits do not depend on those beside it. A decoder of one sequence takes sums in a quicker order
    where there is one (AVX2), so that its logits differ from those by rounding.
    """

    def __init__(self, weights: DecoderWeights, sequences: int = 1) -> None:
        self._alive: list[Any] = []
        self._weights = weights
        capacity, count = len(weights.cosines), len(weights.layers)
        stride = -(-weights.head_dim // STRIDE) * STRIDE
        shape = (count, 2, sequences, weights.key_value_heads, capacity, stride)
        self._cache = torch.zeros(shape, dtype=weights.dtype)
        self._layers = (_Layer * count)()
        for place, layer, cache in zip(self._layers, weights.layers, self._cache, strict=True):
            for name in _PARTS:
                part = getattr(layer, name)
                held = (
                    self._projection(part) if isinstance(part, Projection) else self._floats(part)
                )
                setattr(place, name, held)
            place.keys, place.values = address(cache[0]), address(cache[1])
        self._struct = _Decoder(
            dtype=DTYPES[weights.dtype],
            layers=count,
            hidden=weights.embedding.layout.in_features,
            intermediate=weights.layers[0].gate.weight.layout.out_features,
            heads=weights.heads,
            key_value_heads=weights.key_value_heads,
            head_dim=weights.head_dim,
            capacity=capacity,
            rounds_inputs=weights.rounding,
            folds_inputs=sequences == 1,
            epsilon=weights.epsilon,
            attention_scaling=weights.attention_scaling,
            layer=self._layers,
            embedding=self._weight(weights.embedding),
            norm=self._floats(weights.norm),
            head=self._projection(weights.head),
            cosines=self._floats(weights.cosines),
            sines=self._floats(weights.sines),
        )
        self.capacity, self.sequences, self.head_dim = capacity, sequences, weights.head_dim
        self.vocabulary = weights.head.weight.layout.out_features

    @torch.no_grad()
    def read(self, prompts: Mapping[int, Tensor]) -> None:
        """Fill the caches of sequences, by number, with prompts, int64 [length] each.

        What is computed of one does not depend on those beside it.
        """
        given = {number: prompt for number, prompt in prompts.items() if len(prompt)}
        if not given:
            return
        caches = prompt_caches(self._weights, [*given.values()])
        for cache, made in zip(self._cache, caches, strict=True):
            for kind, parts in zip(cache, made, strict=True):
                for number, part in zip(given, parts, strict=True):
                    kind[number, :, : part.shape[1], : self.head_dim] = part

    def next_logits(self, tokens: Sequence[Next]) -> Tensor:
        """Return the logits float32 [tokens, vocabulary] after each, and cache keys and values.

        A sequence's logits are the same bits whichever others go on beside it. Raises IndexError
        when a token is not in the vocabulary, a position or a sequence is not in the cache, or two
        tokens are of the same sequence.
        """
        for token, position, sequence in tokens:
            known = 0 <= token < self._struct.embedding.rows and 0 <= sequence < self.sequences
            if not (known and 0 <= position < self.capacity):
                raise IndexError(
                    f"token {token} at position {position} of {self.capacity} in sequence "
                    f"{sequence} of {self.sequences}"
                )
        if not 0 < len({one.sequence for one in tokens}) == len(tokens) <= MOST_SEQUENCES:
            raise IndexError(
                f"{len(tokens)} tokens; expected 1 to {MOST_SEQUENCES}, one of each sequence"
            )
        logits = torch.empty(len(tokens), self.vocabulary)
        next_tokens = (_Next * len(tokens))(*(_Next(*one) for one in tokens))
        call("next_logits", ctypes.byref(self._struct), next_tokens, len(tokens), address(logits))
        return logits

    def _weight(self, weight: Weight) -> PackedWeight:
        made = prepared(weight)
        self._alive.append(made.alive)
        return made.struct

    def _projection(self, projection: Projection) -> _Projection:
        bias = None if projection.bias is None else self._floats(projection.bias)
        return _Projection(self._weight(projection.weight), bias)

    def _floats(self, tensor: Tensor) -> int:
        floats = tensor.detach().float().contiguous()
        self._alive.append(floats)
        return floats.data_ptr()
