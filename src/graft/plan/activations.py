"""What the backward pass keeps of the forward pass, by a formula over the layers' shapes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from graft.adapters.base import AdaptedLinear
from graft.adapters.config import AdapterConfig
from graft.formats.codebook import BLOCK_SIZE
from graft.formats.linear import FrozenLinear
from graft.model.targets import linear_layers, linear_shape

_COMPOSED_ACTIVATIONS = {"gelu_new": 3, "gelu_fast": 3, "quick_gelu": 2}
"""Intermediate values that activations written out in Python keep; fused ones keep none."""


@dataclass(frozen=True)
class Activations:
    """What a model keeps for the backward pass, and what its largest layer needs meanwhile."""

    kept_bytes: int
    """From the end of the forward pass on, without the logits."""
    widest: int
    """Features of the widest linear layer's larger side."""


@dataclass(frozen=True)
class _Linear:
    """A linear layer as the formula sees it."""

    parent: str
    in_features: int
    out_features: int
    keeps_input: bool
    """For the gradient of what trains; adapters with dropout keep a copy of their own instead."""
    kept_per_token: int
    """Values that its adapter keeps for each token."""
    kept_bytes: int
    """Bytes that its adapter and its format keep, whatever the batch."""


@dataclass(frozen=True)
class _Setting:
    """What enters the formula beside the shapes."""

    itemsize: int
    sequence_length: int
    heads: int
    attention_width: int
    rms_norm: bool
    norms_train: bool
    activation: str
    attention_dropout: bool
    residual_dropout: bool
    on_cpu: bool


def plan_activations(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch_size: int,
    sequence_length: int,
    gradient_checkpointing: bool,
) -> Activations:
    """Return what the backward pass of a decoder with adapters (on the meta device) keeps.

    Per token and decoder layer, in values of the compute dtype: the output of every linear layer
    (the two that write to the residual stream stand for the inputs of the next norms, float32 in
    an RMSNorm), each distinct input of a layer that trains, the attention's output, and what the
    activation function keeps; attention is PyTorch's fused one, which keeps one float32 a head and
    no scores. Models that drop out attention weights keep three matrices of scores on the CPU.
    To this come the adapters' own copies. Gradient checkpointing keeps every layer's input and
    one layer's activations, those which are being recomputed.
    """
    setting = _setting(model, adapter, dtype, device, sequence_length)
    tokens = batch_size * sequence_length
    layers = _decoder_layers(model, adapter, dtype)
    kept = [_layer_bytes(linears, setting, tokens) for linears in layers]
    hidden = _hidden_size(model)
    norm_itemsize = 4 if setting.rms_norm else setting.itemsize
    last = tokens * hidden * (norm_itemsize + (2 * setting.itemsize if setting.norms_train else 0))
    if gradient_checkpointing:
        inside = len(layers) * tokens * hidden * setting.itemsize + max(kept, default=0)
    else:
        inside = sum(kept)
    shapes = [linear_shape(_bare(module)) for module in linear_layers(model).values()]
    return Activations(inside + last, max(max(shape[:2]) for shape in shapes))


def _setting(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    dtype: torch.dtype,
    device: torch.device,
    sequence_length: int,
) -> _Setting:
    config = model.config
    heads = int(getattr(config, "num_attention_heads", 1))
    head_dim = getattr(config, "head_dim", None) or _hidden_size(model) // heads
    return _Setting(
        itemsize=dtype.itemsize,
        sequence_length=sequence_length,
        heads=heads,
        attention_width=heads * head_dim,
        rms_norm=not any(isinstance(module, nn.LayerNorm) for module in model.modules()),
        norms_train=adapter.method == "full" and not adapter.targets,
        activation=str(_first(config, "hidden_act", "activation_function", "hidden_activation")),
        attention_dropout=bool(_first(config, "attention_dropout", "attn_pdrop")),
        residual_dropout=bool(_first(config, "resid_pdrop", "hidden_dropout", "dropout")),
        on_cpu=device.type == "cpu",
    )


def _first(config: PreTrainedConfig, *names: str) -> object:
    """Return the first of the entries that a configuration has: families name them differently."""
    values = config.to_dict()
    return next((values[name] for name in names if values.get(name) is not None), None)


def _hidden_size(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().get_parameter("weight").shape[1]


def _bare(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, AdaptedLinear) else module


def _decoder_layers(
    model: PreTrainedModel, adapter: AdapterConfig, dtype: torch.dtype
) -> list[list[_Linear]]:
    """Return the linear layers of each decoder layer; its name ends with the first number."""
    layers: dict[str, list[_Linear]] = {}
    for name, module in linear_layers(model).items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        linear = _linear(name.rpartition(".")[0], module, adapter, dtype)
        layers.setdefault(".".join(parts[: number + 1]), []).append(linear)
    return list(layers.values())


def _linear(parent: str, module: nn.Module, adapter: AdapterConfig, dtype: torch.dtype) -> _Linear:
    bare = _bare(module)
    in_features, out_features, _ = linear_shape(bare)
    trained = any(parameter.requires_grad for parameter in module.parameters())
    keeps_input = trained and not adapter.dropout
    kept_per_token = kept_bytes = 0
    if isinstance(module, AdaptedLinear):
        numbers = sum(p.numel() for p in module.adapters.parameters())
        if adapter.method in ("lora", "qlora"):
            # Dropout gives each layer a copy of its input, and keeps its mask.
            kept_per_token = adapter.rank + (2 * in_features if adapter.dropout else 0)
            kept_bytes = numbers * dtype.itemsize if dtype != torch.float32 else 0
        elif adapter.method == "qalora":
            groups = module.base.packed["offsets"].numel()
            kept_bytes = 8 * numbers + 4 * groups  # A and B in float64, the moved offsets
        elif adapter.method == "affine":
            kept_bytes = 8 * numbers  # the scales in float64, both moved statistics in float32
    if isinstance(bare, FrozenLinear) and bare.weight_format.options().get("double_quant"):
        kept_bytes += 4 * -(-in_features * out_features // BLOCK_SIZE)  # absmax, dequantised
    return _Linear(parent, in_features, out_features, keeps_input, kept_per_token, kept_bytes)


def _layer_bytes(linears: list[_Linear], setting: _Setting, tokens: int) -> int:
    per_token = sum(
        _block_bytes(list(block), setting)
        for _, block in groupby(linears, key=lambda linear: linear.parent)
    )
    adapters = sum(linear.kept_per_token for linear in linears) * setting.itemsize
    constant = sum(linear.kept_bytes for linear in linears)
    return tokens * (per_token + adapters) + constant


def _block_bytes(block: list[_Linear], setting: _Setting) -> int:
    """Return what an attention or MLP block keeps per token, with the norm before the next one.

    The last linear layer of a block writes to the residual stream; those before share their input.
    """
    *first, last = block
    attention = last.in_features == setting.attention_width
    outputs = sum(linear.out_features for linear in first)
    values = outputs
    if any(linear.keeps_input for linear in first):
        values += first[0].in_features
    if attention or last.keeps_input:
        values += last.in_features
    if not attention:
        gated = outputs == 2 * last.in_features
        intermediates = 1 if gated else _COMPOSED_ACTIVATIONS.get(setting.activation, 0)
        values += intermediates * last.in_features
    if setting.norms_train and setting.rms_norm:
        values += last.out_features  # the normalised input, for the norm's weight
    kept = values * setting.itemsize
    kept += last.out_features * (4 if setting.rms_norm else setting.itemsize)
    if setting.residual_dropout:
        kept += last.out_features * (setting.itemsize if setting.on_cpu else 1)
    if attention:
        kept += 4 * setting.heads
        if setting.attention_dropout and setting.on_cpu:
            # Unfused attention, computed in float32.
            kept += 4 * 3 * setting.heads * setting.sequence_length
            kept += last.in_features * setting.itemsize
    return kept
