"""Which tensors a GGUF file holds: each layer's name, type and bytes, or why it cannot be held."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from gguf import GGMLQuantizationType, quant_shape_to_byte_shape
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from graft.adapters.adapted import AdaptedLinear
from graft.errors import GraftError
from graft.export.layers import int_format, require_finite, rotary
from graft.formats.base import WeightFormat
from graft.layers.frozen import FrozenLinear
from graft.layers.registry import find_kind
from graft.model.families import family_of
from graft.model.gguf.file import FLOATS
from graft.model.gguf.layout import (
    Q4_1_BLOCK,
    encode_q4_1,
    gguf_layout,
    gguf_names,
    rope_factors,
    row_order,
)

Unquantised = Literal["F32", "F16", "BF16"]
BITS = (2, 3, 4)
"""Widths of the int format that Q4_1 holds; the narrower ones take four bits there too."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file; `make` computes its bytes (uint8) and the largest rounding in it."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    make: Callable[[], tuple[Tensor, float]]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape of the data as bytes: rows stay, columns become bytes."""
        return quant_shape_to_byte_shape(self.shape, self.type)

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.byte_shape)


@dataclass
class TensorPlan:
    """All tensors of the file and what is worth telling about them."""

    tensors: list[PlannedTensor] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    float32_layers: list[str] = field(default_factory=list)
    """Layers in the int format whose rows are no multiple of 32: their exact weights go to F32."""
    dense_layers: list[str] = field(default_factory=list)
    """Quantised layers that GGUF cannot hold as they are, written unquantised as was asked."""


def unquantised_type(source: torch.dtype) -> Unquantised:
    """Return the type of tensors that are not quantised: that of the checkpoint they come from."""
    narrow: dict[torch.dtype, Unquantised] = {torch.float16: "F16", torch.bfloat16: "BF16"}
    return narrow.get(source, "F32")


def format_problems(weight_format: WeightFormat, dense: bool = False) -> list[str]:
    """Return every reason why a weight format cannot be written exactly.

    `dense` allows formats other than dense and int to be written unquantised.
    """
    if not weight_format.quantised:
        return []
    integers = weight_format.integers
    if integers is None:
        if dense:
            return []
        return [
            f"format {weight_format.name!r} has no counterpart in GGUF; write dense weights with "
            "--to hf, or quantise the base with --format int"
        ]
    problems = []
    if integers.bits not in BITS:
        problems.append(f"bits is {integers.bits}; GGUF's Q4_1 holds 2, 3 or 4 (--bits 4)")
    if integers.group_size % Q4_1_BLOCK:
        problems.append(
            f"group_size is {integers.group_size}; GGUF's Q4_1 holds multiples of 32 "
            "(--group-size 32)"
        )
    if integers.statistics != "float16":
        problems.append(
            f"statistics is {integers.statistics!r}; GGUF's Q4_1 holds scales and offsets in "
            "float16 only; quantise with the default statistics"
        )
    return problems


def plan_tensors(model: PreTrainedModel, unquantised: Unquantised, dense: bool) -> TensorPlan:
    """Return the tensors of the whole model, and every reason why some cannot be written."""
    plan = TensorPlan()
    gguf_name = gguf_names(model.config)
    kind = GGMLQuantizationType[unquantised]
    adapted = [name for name, part in model.named_modules() if isinstance(part, AdaptedLinear)]
    if adapted:
        plan.problems.append(
            f"adapters are still attached to {len(adapted)} layers ({adapted[0]} ...); merge first"
        )
    inside = tuple(f"{name}." for name in adapted)
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters or name.startswith(inside) or _is_tied_head(model, module):
            continue
        target = gguf_name(name)
        known = isinstance(module, FrozenLinear) or set(parameters) <= {"weight", "bias"}
        if target is None or not known:
            plan.problems.append(
                f"{name}: {type(module).__name__} with {', '.join(parameters)} has no place in a "
                f"GGUF of {model.config.model_type}; export as a folder instead (--to hf)"
            )
            continue
        order = row_order(name, model.config)
        if family_of(model.config).norms_add_one and target.endswith("norm"):
            # Such a norm multiplies by 1 + weight, llama.cpp's by what is in the file.
            norm = parameters["weight"].detach().float() + 1.0
            _plan_float(plan, f"{target}.weight", norm, None, GGMLQuantizationType.F32)
            continue
        _plan_weight(plan, name, f"{target}.weight", module, order, kind, dense)
        if parameters.get("bias") is not None:
            if without_bias(model.config, [name]):
                plan.problems.append(
                    f"{name} has a bias, which llama.cpp does not add to that layer of a "
                    f"{model.config.model_type}; export as a folder instead (--to hf)"
                )
                continue
            # llama.cpp adds biases in float32.
            _plan_float(plan, f"{target}.bias", parameters["bias"], order, GGMLQuantizationType.F32)
    for name, factors in _rotary_tensors(model.config).items():
        _plan_float(plan, f"{name}.weight", factors, None, GGMLQuantizationType.F32)
    return plan


def without_bias(config: PretrainedConfig, layers: Iterable[str]) -> list[str]:
    """Return those of the layers, by name, whose bias llama.cpp would not add."""
    if family_of(config).gguf is None:
        return []  # it is refused as a whole
    gguf_name, biases = gguf_names(config), gguf_layout(config).biases
    kinds = ((layer, (gguf_name(layer) or "").rpartition(".")[2]) for layer in layers)
    return [layer for layer, kind in kinds if "norm" not in kind and kind not in biases]


def _rotary_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """Return what llama.cpp divides the rotary frequencies by: LongRoPE has two sets."""
    rope = rotary(config)
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
            for kind in ("long", "short")
        }
    factors = rope_factors(config) if rope["rope_type"] == "llama3" else None
    return {} if factors is None else {"rope_freqs": factors}


def _is_tied_head(model: PreTrainedModel, module: nn.Module) -> bool:
    """Return whether llama.cpp takes the embeddings in its place; a bias it would not take."""
    embedding = model.get_input_embeddings()
    return (
        module is model.get_output_embeddings()
        and isinstance(module, nn.Linear)
        and module.bias is None
        and isinstance(embedding, nn.Embedding)
        and module.weight is embedding.weight
    )


def _plan_weight(
    plan: TensorPlan,
    name: str,
    target: str,
    module: nn.Module,
    order: Tensor | None,
    kind: GGMLQuantizationType,
    dense: bool,
) -> None:
    if not isinstance(module, FrozenLinear):
        held_by, stored = find_kind(module), module.get_parameter("weight")
        weight = stored if held_by is None else held_by.rows(module, stored)
        # llama.cpp wants vectors (the norms) in float32.
        _plan_float(
            plan, target, weight, order, kind if weight.dim() > 1 else GGMLQuantizationType.F32
        )
        return
    problems = format_problems(module.weight_format, dense)
    if problems:
        plan.problems += [f"{name}: {problem}" for problem in problems]
        return
    if module.weight_format.integers is not None:
        if module.in_features % Q4_1_BLOCK == 0:
            _plan_q4_1(plan, target, module, order)
            return
        plan.float32_layers.append(name)
        kind = GGMLQuantizationType.F32
    elif module.weight_format.quantised:
        plan.dense_layers.append(name)
    _plan_float(plan, target, module, order, kind)


def _plan_q4_1(plan: TensorPlan, target: str, layer: FrozenLinear, order: Tensor | None) -> None:
    weight_format = int_format(layer)

    def make() -> tuple[Tensor, float]:
        packed = {name: tensor.detach().cpu() for name, tensor in layer.packed.items()}
        for name in ("scales", "offsets"):
            require_finite(target, packed[name])
        blocks = encode_q4_1(weight_format, packed, layer.in_features)
        return (blocks if order is None else blocks[order]), 0.0

    shape = (layer.out_features, layer.in_features)
    plan.tensors.append(PlannedTensor(target, shape, GGMLQuantizationType.Q4_1, make))


def _plan_float(
    plan: TensorPlan,
    target: str,
    source: Tensor | FrozenLinear,
    order: Tensor | None,
    kind: GGMLQuantizationType,
) -> None:
    def make() -> tuple[Tensor, float]:
        weight = source.dense_weight() if isinstance(source, FrozenLinear) else source
        weight = weight.detach().cpu()
        require_finite(target, weight)
        written = weight.to(FLOATS[kind])
        rounding = 0.0
        if written.dtype not in (weight.dtype, torch.float32):
            rounding = float((written.float() - weight).abs().max())
        if not math.isfinite(rounding):
            raise GraftError(
                f"{target}: its largest weight, {float(weight.abs().max()):.4g}, does not fit "
                f"{kind.name}; write the unquantised tensors as BF16 or F32"
            )
        written = written if order is None else written[order]
        return written.contiguous().view(torch.uint8), rounding

    if isinstance(source, FrozenLinear):
        shape: tuple[int, ...] = (source.out_features, source.in_features)
    else:
        shape = tuple(source.shape)
    plan.tensors.append(PlannedTensor(target, shape, kind, make))
