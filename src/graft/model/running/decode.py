"""Decoding one token at a time at the speed at which the memory delivers the weights.

Models of the Llama family whose layers the native kernels read go through one native call a token;
the prompt goes through the model's own forward, which fills the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from graft.adapters.adapted import AdaptedLinear
from graft.kernels.backend.native_library import COMPUTE, why_unavailable
from graft.kernels.decoding.native import (
    DecoderLayer,
    DecoderWeights,
    NativeDecoder,
    Next,
    Projection,
)
from graft.kernels.packed.weight import dense_weight
from graft.layers.frozen import FrozenLinear
from graft.model.families import FAMILIES, is_class

_EMBEDDING = "model.embed_tokens.weight"
_LINEARS = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
"""Of a layer, in the order of DecoderLayer."""
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles do not depend on the length of the text."""


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
    dtype = model.get_parameter(_EMBEDDING).dtype
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
            if not module.moves_grid_only():
                return f"{name} has an adapter that adds to its output"
            module = module.base
        if type(module) not in (nn.Linear, FrozenLinear):
            return f"{name} is a {type(module).__name__}"
        stored = dict(module.named_parameters()).get("weight")  # of a layer that is not packed
        if stored is not None and stored.dtype not in COMPUTE:
            return f"{name} is stored in {stored.dtype}"
    return None


def _linears(model: PreTrainedModel) -> list[str]:
    layers = range(model.config.num_hidden_layers)
    return [f"model.layers.{index}.{name}" for index in layers for name in _LINEARS] + ["lm_head"]


def _projection(model: PreTrainedModel, name: str) -> Projection:
    """Return a linear layer as the kernels see it.

    Adapters that move the grid are part of the weight, just as a merge makes them.
    """
    module = model.get_submodule(name)
    base = module.base if isinstance(module, AdaptedLinear) else module
    if isinstance(module, AdaptedLinear):
        shape = module.base.out_features, module.base.in_features
        weight = module.base.weight_format.kernel_weight(module.effective_packed(), *shape)
    elif isinstance(module, FrozenLinear):
        weight = module.kernel_weight()
    else:
        weight = dense_weight(module.get_parameter("weight").detach())
    bias = dict(base.named_parameters()).get("bias")
    dtype = model.get_parameter(_EMBEDDING).dtype
    return Projection(weight, None if bias is None else bias.detach().to(dtype))


class Decoder:
    """Continues one text with a model for which `why_not_native` finds no reason.

    `positions` is the length of the whole text, and bounds the cache's size.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, positions: int) -> None:
        self.model, self.positions = model, positions
        self.length = 0
        self._native = NativeDecoder(_describe(model, positions))

    @torch.no_grad()
    def start(self, prompt: Tensor) -> Tensor:
        """Return the logits float32 [vocabulary] after a prompt [tokens], which fills the cache."""
        cache = DynamicCache()
        out = self.model(
            input_ids=prompt[None], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        layers: list[Any] = cache.layers
        for index, layer in enumerate(layers):
            self._native.remember(index, layer.keys[0], layer.values[0])
        self.length = len(prompt)
        logits: Tensor = out.logits[0, -1].float()
        return logits

    def step(self, token: int) -> Tensor:
        """Return the logits float32 [vocabulary] after one more token."""
        logits = self._native.next_logits([Next(token, self.length)])[0]
        self.length += 1
        return logits


def _describe(model: PreTrainedModel, positions: int) -> DecoderWeights:
    body: Any = model.get_submodule("model")
    embedding = model.get_parameter(_EMBEDDING).detach()
    cosines, sines = body.rotary_emb(embedding[:1, None], torch.arange(positions)[None])
    attention = body.layers[0].self_attn
    layers = []
    for index, layer in enumerate(body.layers):
        norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        linears = (_projection(model, f"model.layers.{index}.{name}") for name in _LINEARS)
        layers.append(DecoderLayer(*norms, *linears))
    return DecoderWeights(
        dtype=embedding.dtype,
        layers=tuple(layers),
        heads=model.config.num_attention_heads,
        key_value_heads=model.config.num_key_value_heads,
        head_dim=attention.head_dim,
        epsilon=model.config.rms_norm_eps,
        attention_scaling=attention.scaling,
        embedding=dense_weight(embedding),
        norm=body.norm.weight,
        head=_projection(model, "lm_head"),
        cosines=cosines[0],
        sines=sines[0],
    )
