"""Decoding one token at a time at the speed at which the memory delivers the weights.

Models of the Llama family whose layers the native kernels read go through one native call for the
next tokens of all texts that go on together; prompts go through the same layers before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft.adapters.adapted import AdaptedLinear
from graft.kernels.backend.native_library import COMPUTE, why_unavailable
from graft.kernels.decoding.native import MOST_SEQUENCES, STRIDE, NativeDecoder, Next
from graft.kernels.decoding.weights import (
    DecoderLayer,
    DecoderWeights,
    Projection,
    decodes_rounded,
)
from graft.kernels.packed.weight import dense_weight
from graft.layers.activations import computes_with
from graft.layers.frozen import FrozenLinear
from graft.layers.narrow import NarrowLinear
from graft.model.families import FAMILIES, is_class

_EMBEDDING = "model.embed_tokens.weight"
_LINEARS = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
"""Of a layer, in the order of DecoderLayer."""
_ROW = 512
"""Tokens of short prompts that are computed together, at most."""
_CACHE_BYTES = 1 << 30
"""What the caches of texts that go on together may take."""
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles do not depend on the length of the text."""


_ROUNDING = {"float": 0, "q8": 1, "q8_token": 2}
"""`DecoderWeights.rounding` by what a model computes with."""


def why_not_native(model: PreTrainedModel, positions: int) -> str | None:
    """Return why a text of that many positions is not decoded natively, or None when it is."""
    if not is_class(model, {family.decoder for family in FAMILIES.values()}):
        return f"{type(model).__name__} is not of the Llama family"
    reason = why_unavailable()
    if reason is not None:
        return f"the native kernels are unavailable: {reason}"
    return _config_reason(model, positions) or _weights_reason(model)


def _config_reason(model: PreTrainedModel, positions: int) -> str | None:
    config = model.config
    if model.training:
        return "the model is in training mode"
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act!r}"
    rope = config.rope_parameters
    if rope["rope_type"] not in _STATIC_ROPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"rope_parameters are {rope}"
    window = getattr(config, "sliding_window", None)  # Llama's configuration has none
    if window is not None and positions > window:
        return f"the text is longer than the attention's window of {window} positions"
    return None


def _weights_reason(model: PreTrainedModel) -> str | None:
    dtype = _dtype(model)
    if dtype not in COMPUTE:
        return f"the model computes in {dtype}"
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            return f"{name} lies on {parameter.device}"
        if name.endswith("norm.weight") and parameter.dtype != dtype:
            return f"{name} is {parameter.dtype}, while the model computes in {dtype}"
    for name in _linears(model):
        module = model.get_submodule(name)
        if isinstance(module, AdaptedLinear):
            if module.merged is None and not module.moves_grid_only():
                return f"{name} has an adapter that adds to its output"
            module = module.merged or module.base
        if type(module) not in (nn.Linear, NarrowLinear, FrozenLinear):
            return f"{name} is a {type(module).__name__}"
        if isinstance(module, FrozenLinear) and not _decodes(module):
            return f"{name} has {module.weight_format.name} weights that meet rounded inputs"
        stored = dict(module.named_parameters()).get("weight")  # of a layer that is not packed
        if stored is not None and stored.dtype not in COMPUTE:
            return f"{name} is stored in {stored.dtype}"
    return None


def _decodes(layer: FrozenLinear) -> bool:
    return not layer.rounds or decodes_rounded(layer.kernel_weight())


def texts_together(model: PreTrainedModel, positions: int) -> int:
    """Return how many texts of that many positions a decoder continues at once: 1 to 16."""
    config, dtype = model.config, _dtype(model)
    width = -(-_head_dim(model) // STRIDE) * STRIDE * config.num_key_value_heads
    one = 2 * config.num_hidden_layers * positions * width * dtype.itemsize
    return max(1, min(MOST_SEQUENCES, _CACHE_BYTES // one))


def _head_dim(model: PreTrainedModel) -> int:
    width: int = model.get_submodule("model.layers.0.self_attn").head_dim  # type: ignore[assignment]
    return width


def _dtype(model: PreTrainedModel) -> torch.dtype:
    """Return what the model computes in, which its norms have too; embedding and head may not."""
    return model.get_parameter("model.norm.weight").dtype


def _linears(model: PreTrainedModel) -> list[str]:
    layers = range(model.config.num_hidden_layers)
    return [f"model.layers.{index}.{name}" for index in layers for name in _LINEARS] + ["lm_head"]


def _projection(model: PreTrainedModel, name: str) -> Projection:
    """Return a linear layer as the kernels see it.

    Adapters that move the grid are part of the weight, just as a merge makes them.
    """
    module = model.get_submodule(name)
    if isinstance(module, AdaptedLinear) and module.merged is not None:
        module = module.merged
    base = module.base if isinstance(module, AdaptedLinear) else module
    if isinstance(module, AdaptedLinear):
        shape = module.base.out_features, module.base.in_features
        weight = module.base.weight_format.kernel_weight(module.effective_packed(), *shape)
    elif isinstance(module, FrozenLinear):
        weight = module.kernel_weight()
    else:
        weight = dense_weight(module.get_parameter("weight").detach())
    bias = dict(base.named_parameters()).get("bias")
    return Projection(weight, None if bias is None else bias.detach().to(_dtype(model)))


class Decoder:
    """Continues up to `sequences` texts with a model for which `why_not_native` finds no reason.

    `positions` is the length of the longest text, and bounds each cache's size. Texts are told
    apart by numbers from 0 on; one that has ended leaves its number to another. A text's logits do
    not depend on those beside it; a decoder of one text may round otherwise (`NativeDecoder`).
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        positions: int,
        sequences: int = 1,
    ) -> None:
        self._native = NativeDecoder(_describe(model, positions), sequences)
        self._lengths = [0] * sequences

    def start(self, prompts: Mapping[int, Tensor]) -> None:
        """Begin texts with prompts, int64 [length] each, all but their last tokens.

        Those follow as the first of `step`, together with those of the texts that go on.
        """
        rows: dict[int, Tensor] = {}
        for number, prompt in prompts.items():
            self._lengths[number] = len(prompt) - 1
            if rows and sum(map(len, rows.values())) + len(prompt) > _ROW:
                self._native.read(rows)
                rows = {}
            rows[number] = prompt[:-1]
        self._native.read(rows)

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Return the logits float32 [texts, vocabulary] after one more token of each text."""
        given = [Next(token, self._lengths[number], number) for number, token in tokens.items()]
        logits = self._native.next_logits(given)
        for number in tokens:
            self._lengths[number] += 1
        return logits


def _describe(model: PreTrainedModel, positions: int) -> DecoderWeights:
    body: Any = model.get_submodule("model")
    embedding = model.get_parameter(_EMBEDDING).detach()
    like, places = body.norm.weight.detach()[None, None], torch.arange(positions)[None]
    cosines, sines = body.rotary_emb(like, places)
    attention = body.layers[0].self_attn
    layers = []
    for index, layer in enumerate(body.layers):
        norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        linears = (_projection(model, f"model.layers.{index}.{name}") for name in _LINEARS)
        layers.append(DecoderLayer(*norms, *linears))
    return DecoderWeights(
        dtype=_dtype(model),
        layers=tuple(layers),
        heads=model.config.num_attention_heads,
        key_value_heads=model.config.num_key_value_heads,
        head_dim=_head_dim(model),
        epsilon=model.config.rms_norm_eps,
        attention_scaling=attention.scaling,
        embedding=dense_weight(embedding),
        norm=body.norm.weight,
        head=_projection(model, "lm_head"),
        cosines=cosines[0],
        sines=sines[0],
        rounding=_ROUNDING[computes_with(model)],
    )
