"""What the backward pass keeps of the forward pass, by a formula over the layers' shapes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.config import AdapterConfig
from graft.adapters.method import Kept
from graft.adapters.registry import method_of
from graft.layers.factored import DOWN, UP, factored_layers
from graft.model.decoder_layers import by_decoder_layer, decoder_layer_of
from graft.model.running.checkpointing import (
    Checkpointing,
    is_wide,
    keeps_attention,
    keeps_product,
)
from graft.model.running.pointwise import has_own_pointwise, own_gates, own_norms
from graft.model.targets import linear_layers, linear_shape

_COMPOSED_ACTIVATIONS = {"gelu_new": 3, "gelu_fast": 3, "quick_gelu": 2}
"""Intermediate values that activations written out in Python keep; fused ones keep none."""


@dataclass(frozen=True)
class Activations:
    """What a model keeps for the backward pass, and what its largest layer needs meanwhile."""

    kept_bytes: int
    """From the end of the forward pass on, without what the loss needs."""
    recomputed_bytes: int
    """What checkpointing computes again of one layer, while that layer's gradients are computed."""
    widest: int
    """Features of the widest linear layer's larger side."""


@dataclass(frozen=True)
class _Linear:
    """A linear layer as the formula sees it."""

    parent: str
    in_features: int
    out_features: int
    kept: Kept


@dataclass(frozen=True)
class _Setting:
    """What enters the formula beside the shapes."""

    itemsize: int
    sequence_length: int
    hidden: int
    heads: int
    attention_width: int
    rms_norm: bool
    norms_train: bool
    own_norms: bool
    """One operation each (`graft.model.running.pointwise`), which keeps its input alone."""
    own_gates: bool
    activation: str
    unfused_attention: bool
    """Computed in float32, as it is on a CPU when it drops out weights."""
    residual_dropout: bool
    adds_last: bool
    """A layer's last output is only added: no norm, dropout or DoRA reads it before."""
    on_cpu: bool


def plan_activations(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tokens: int,
    sequence_length: int,
    checkpointing: Checkpointing,
) -> Activations:
    """Return what the backward pass of a decoder with adapters (on the meta device) keeps.

    tokens: that are computed at once, in rows of at most sequence_length.

    Per token and decoder layer, in values of the compute dtype: the output of every linear layer
    (the two that write to the residual stream stand for the inputs of the next norms, float32 in an
    RMSNorm that is not graft's own), each distinct input of a layer that trains, the attention's
    output, and what the activation function keeps; attention is PyTorch's fused one, which keeps
    one float32 a head and no scores. Models that drop out attention weights keep three matrices of
    scores on the CPU. To this come the adapters' own copies. With checkpointing, all this is there
    for one layer at a time, the one that is being recomputed; every layer keeps its input and, of
    its products and its attention, the outputs that `graft.model.running.checkpointing` names.
    """
    setting = _setting(model, adapter, dtype, device, sequence_length)
    layers = _decoder_layers(model, adapter, dtype)
    layers = layers[_first_trained(model, len(layers)) :]
    whole = [_layer_bytes(linears, setting, tokens) for linears in layers]
    last_norm = _norm_itemsize(setting) + setting.itemsize * _trained_at_the_end(model)
    kept, recomputed = tokens * setting.hidden * last_norm, 0
    if checkpointing == "none":
        kept += sum(whole)
    else:
        kept += sum(_checkpointed_bytes(layer, setting, tokens, checkpointing) for layer in layers)
        recomputed = max(whole, default=0)
    shapes = [linear_shape(_bare(module)) for module in linear_layers(model).values()]
    return Activations(kept, recomputed, max(map(max, shapes)))


def _first_trained(model: PreTrainedModel, layers: int) -> int:
    """Return the first decoder layer that something trains in or before; those below keep nothing,
    as no gradient goes there."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    numbers = {layer: index for index, layer in enumerate(by_decoder_layer(linear_layers(model)))}
    tables = [name for name, one in model.named_modules() if isinstance(one, nn.Embedding)]
    if any(name.rpartition(".")[0] in tables for name in trained):
        return 0
    found = [numbers.get(decoder_layer_of(name) or "", layers) for name in trained]
    return min(found, default=0)


def _trained_at_the_end(model: PreTrainedModel) -> int:
    """Return how many of the last norm and the head train: each keeps its input for its weight."""
    norms = [
        module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and decoder_layer_of(name) is None
    ]
    ends = [*norms[-1:], model.get_output_embeddings()]
    return sum(
        module is not None and any(one.requires_grad for one in module.parameters())
        for module in ends
    )


def _setting(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    dtype: torch.dtype,
    device: torch.device,
    sequence_length: int,
) -> _Setting:
    config = model.config
    on_cpu = device.type == "cpu"
    has_kernels = has_own_pointwise(device)
    norms_train = any(
        parameter.requires_grad
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters()
    )
    heads = int(getattr(config, "num_attention_heads", 1))
    hidden = model.get_input_embeddings().get_parameter("weight").shape[1]
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    residual_dropout = bool(_first(config, "resid_pdrop", "hidden_dropout", "dropout"))
    return _Setting(
        itemsize=dtype.itemsize,
        sequence_length=sequence_length,
        hidden=hidden,
        heads=heads,
        attention_width=heads * head_dim,
        rms_norm=not any(isinstance(module, nn.LayerNorm) for module in model.modules()),
        norms_train=norms_train,
        own_norms=has_kernels and not norms_train and bool(own_norms(model)),
        own_gates=has_kernels and bool(own_gates(model)),
        activation=str(_first(config, "hidden_act", "activation_function", "hidden_activation")),
        unfused_attention=on_cpu and bool(_first(config, "attention_dropout", "attn_pdrop")),
        residual_dropout=residual_dropout,
        adds_last=not residual_dropout
        and not adapter.dora
        and not any("post_feedforward" in name for name, _ in model.named_modules()),
        on_cpu=on_cpu,
    )


def _norm_itemsize(setting: _Setting) -> int:
    """Return the bytes per value of what a norm keeps of its input."""
    return 4 if setting.rms_norm and not setting.own_norms else setting.itemsize


def _first(config: PreTrainedConfig, *names: str) -> object:
    """Return the first of the entries that a configuration has: families name them differently."""
    values = config.to_dict()
    return next((values[name] for name in names if values.get(name) is not None), None)


def _bare(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, AdaptedLinear) else module


def _decoder_layers(
    model: PreTrainedModel, adapter: AdapterConfig, dtype: torch.dtype
) -> list[list[_Linear]]:
    """Return the linear layers of each decoder layer."""
    modules, factors = linear_layers(model), dict(factored_layers(model))

    def seen(name: str) -> list[_Linear]:
        parent, _, last = name.rpartition(".")
        if parent not in factors:
            return [_linear(parent, modules[name], adapter, dtype)]
        if last == UP:  # it stands in its pair
            return []
        pair = (_linear("", modules[f"{parent}.{part}"], adapter, dtype) for part in (DOWN, UP))
        return [_paired(parent.rpartition(".")[0], *pair)]

    return [
        [one for name in names for one in seen(name)]
        for names in by_decoder_layer(modules).values()
    ]


def _paired(parent: str, down: _Linear, up: _Linear) -> _Linear:
    """Return two factors as the layer that they are together."""
    kept = Kept(
        (*down.kept.products, *up.kept.products),
        keeps_input=down.kept.keeps_input,
        per_token=down.kept.per_token + up.kept.per_token + down.out_features,
        constant_bytes=down.kept.constant_bytes + up.kept.constant_bytes,
    )
    return _Linear(parent, down.in_features, up.out_features, kept)


def _linear(parent: str, module: nn.Module, adapter: AdapterConfig, dtype: torch.dtype) -> _Linear:
    in_features, out_features = linear_shape(_bare(module))
    trains = any(parameter.requires_grad for parameter in module.parameters())
    kept = Kept((out_features,), keeps_input=trains)
    if isinstance(module, AdaptedLinear):
        kept = method_of(adapter).kept(module, adapter, dtype)
    return _Linear(parent, in_features, out_features, kept)


def _layer_bytes(linears: list[_Linear], setting: _Setting, tokens: int) -> int:
    per_token = sum(
        _block_bytes(list(block), setting)
        for _, block in groupby(linears, key=lambda linear: linear.parent)
    )
    adapters = sum(linear.kept.per_token for linear in linears) * setting.itemsize
    constant = sum(linear.kept.constant_bytes for linear in linears)
    return tokens * (per_token + adapters) + constant


def _checkpointed_bytes(
    linears: list[_Linear], setting: _Setting, tokens: int, checkpointing: Checkpointing
) -> int:
    """Return what a layer keeps that is recomputed: its input, some products, its attention."""
    values, kept, wide = setting.hidden, 0, 0
    for linear in linears:
        # Of several products (LoRA that drops out) none is only added to the residual stream.
        only_added = linear is linears[-1] and setting.adds_last and len(linear.kept.products) == 1
        for width in linear.kept.products:
            shape = setting.hidden, linear.in_features, width
            if keeps_product(checkpointing, *shape, wide):
                values += width - linear.out_features * only_added
            wide += is_wide(*shape)
    for _, block in groupby(linears, key=lambda linear: linear.parent):
        *_, last = block
        if last.in_features == setting.attention_width:
            kept += _kept_attention_bytes(setting, checkpointing)
    return tokens * (values * setting.itemsize + kept)


def _kept_attention_bytes(setting: _Setting, checkpointing: Checkpointing) -> int:
    """Return what checkpointing keeps of attention per token: its output and one float32 a head."""
    width, length = setting.attention_width, setting.sequence_length
    if not setting.unfused_attention:
        kept = keeps_attention(checkpointing, width, length)
        return width * setting.itemsize + 4 * setting.heads if kept else 0
    head_dim = width // setting.heads
    scores = keeps_product(checkpointing, setting.hidden, head_dim, length)
    output = keeps_product(checkpointing, setting.hidden, length, head_dim)
    return 4 * (setting.heads * length * scores + width * output)


def _block_bytes(block: list[_Linear], setting: _Setting) -> int:
    """Return what an attention or MLP block keeps per token, with the norm before the next one.

    The last linear layer of a block writes to the residual stream; those before share their input.
    """
    *first, last = block
    attention = last.in_features == setting.attention_width
    outputs = sum(linear.out_features for linear in first)
    values = outputs
    if any(linear.kept.keeps_input for linear in first):
        values += first[0].in_features
    if attention or last.kept.keeps_input:
        values += last.in_features
    if not attention:
        gated = outputs == 2 * last.in_features
        composed = _COMPOSED_ACTIVATIONS.get(setting.activation, 0)
        intermediates = int(not setting.own_gates) if gated else composed
        values += intermediates * last.in_features
    if setting.norms_train and setting.rms_norm:
        values += last.out_features  # the normalised input, for the norm's weight
    kept = values * setting.itemsize
    kept += last.out_features * _norm_itemsize(setting)
    if setting.residual_dropout:
        kept += last.out_features * (setting.itemsize if setting.on_cpu else 1)
    if attention:
        kept += 4 * setting.heads
        if setting.unfused_attention:
            kept += 4 * 3 * setting.heads * setting.sequence_length
            kept += last.in_features * setting.itemsize
    return kept
