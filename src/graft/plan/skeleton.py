"""The modules that a run trains, on the meta device: every shape and dtype, no data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from graft.adapters.attach import adapted_layers, frozen_layers, replace_module
from graft.adapters.config import AdapterConfig
from graft.adapters.registry import method_of
from graft.errors import GraftError
from graft.formats.base import WeightFormat
from graft.formats.dense import DenseFormat
from graft.layers.narrow import NARROW_CLASSES
from graft.layers.registry import kind_of
from graft.model.devices import resolve_device, resolve_dtype
from graft.model.left_out import left_out
from graft.model.narrow import keep_narrow
from graft.model.save import named_tensors
from graft.model.subject import Subject, open_subject
from graft.model.targets import linear_shape, select_targets
from graft.model.trained import what_trains


@dataclass(frozen=True)
class PlannedModel:
    """A model as it will train, on the meta device."""

    model: PreTrainedModel
    """With quantised layers and adapter; only what trains requires a gradient."""
    dtype: torch.dtype
    """The dtype that it computes in."""
    source_dtype: torch.dtype
    device: torch.device
    """Where it will train."""
    file_bytes: int
    """Tensors in the file that `save_model` writes of the base, without the header."""
    left_out: str | None = None
    """See `graft.model.left_out`; None too for a method that trains the whole model."""

    @cached_property
    def counts(self) -> WeightCounts:
        """How many weights it has, and their bytes."""
        return count_weights(self)


def plan_model(
    model: str | Path | Subject,
    *,
    weight_format: WeightFormat | None,
    adapter: AdapterConfig,
    dtype: str,
    device: str,
    trust_remote_code: bool = False,
) -> PlannedModel:
    """Build what a run trains from config.json; see `plan_memory` for the arguments.

    Raises GraftError when model, targets, format and method do not fit together.
    """
    subject = open_subject(model, trust_remote_code, config_alone=True)
    stored, source_dtype = subject.formats, subject.source_dtype
    if stored and weight_format is not None:
        raise GraftError(
            f"{subject.folder} is quantised already; load it as it is or start from its base"
        )
    method = method_of(adapter)
    if not method.trains_adapter and (stored or weight_format is not None):
        found = "quantised" if weight_format is None else weight_format.name
        raise GraftError(str(method.format_problem(found)))
    place = _device(device)
    compute = _compute_dtype(method.compute_dtype(dtype), source_dtype, place)
    skeleton = subject.new_model().requires_grad_(False)
    targets = what_trains(skeleton, adapter)
    rest = left_out(skeleton, targets, "adapts") if method.trains_adapter else None
    formats = dict(stored)
    if weight_format is not None:
        formats |= dict.fromkeys(targets, weight_format)
    freeze_on_meta(skeleton, formats)
    if method.trains_adapter:
        keep_narrow(skeleton, compute, place, lambda _: source_dtype)
    file_bytes = _file_bytes(skeleton, compute, source_dtype)
    if method.trains_adapter:
        dense = DenseFormat(str(compute).removeprefix("torch."))
        freeze_on_meta(skeleton, {name: dense for name in targets if name not in formats})
    method.make_trainable(skeleton, targets, adapter)
    return PlannedModel(skeleton, compute, source_dtype, place, file_bytes, rest)


def plan_frozen(
    subject: Subject, weight_format: WeightFormat | None, dtype: str, device: str
) -> PlannedModel:
    """Build a model of which nothing trains, as `plan_model` builds one of which something does."""
    place = _device(device)
    compute = _compute_dtype(dtype, subject.source_dtype, place)
    skeleton = subject.new_model().requires_grad_(False)
    formats = dict(subject.formats)
    if weight_format is not None:
        formats |= dict.fromkeys(select_targets(skeleton, ()), weight_format)
    freeze_on_meta(skeleton, formats)
    keep_narrow(skeleton, compute, place, lambda _: subject.source_dtype)
    file_bytes = _file_bytes(skeleton, compute, subject.source_dtype)
    return PlannedModel(skeleton, compute, subject.source_dtype, place, file_bytes)


def keeps_float32(config: PreTrainedConfig, dtype: str) -> bool:
    """Return whether a run with --dtype computes with float32 weights of the checkpoint as such."""
    return config.dtype in (None, torch.float32) and dtype != "bfloat16"


def _device(name: str) -> torch.device:
    """Return the device; one that is named may be another machine's, so it need not be here."""
    return resolve_device(name) if name == "auto" else torch.device(name)


def _compute_dtype(name: str, source: torch.dtype, device: torch.device) -> torch.dtype:
    if device.type == "cuda" and not torch.cuda.is_available() and name == "auto":
        # Another machine's GPU: those of the last years all compute in bfloat16.
        return torch.bfloat16 if source.itemsize == 2 else torch.float32
    return resolve_dtype(name, source, device)


def freeze_on_meta(model: PreTrainedModel, formats: dict[str, WeightFormat]) -> None:
    """Put frozen layers with empty packed tensors in the place of the named linear layers."""
    for name, weight_format in formats.items():
        module = model.get_submodule(name)
        in_features, out_features = linear_shape(module)
        specs = weight_format.storage(out_features, in_features)
        packed = {key: spec.empty("meta") for key, spec in specs.items()}
        kind = kind_of(module)
        bias = kind.bias(module)
        replace_module(model, name, kind.frozen(module, weight_format, packed, bias))


def _file_bytes(model: PreTrainedModel, compute: torch.dtype, source: torch.dtype) -> int:
    """Return the bytes of the tensors that `save_model` writes.

    A quantised folder keeps the packed tensors as they are and the others in the narrower of
    compute and source dtype; a plain one holds everything in the compute dtype.
    """
    layers = dict(frozen_layers(model))
    packed = {f"{name}.{key}" for name, layer in layers.items() for key in layer.packed}
    itemsize = min(compute.itemsize, source.itemsize) if layers else compute.itemsize
    return sum(
        tensor.numel()
        * (itemsize if tensor.is_floating_point() and name not in packed else tensor.itemsize)
        for name, tensor in named_tensors(model)
    )


@dataclass(frozen=True)
class WeightCounts:
    """How many weights there are, and their bytes as they train."""

    frozen_bytes: int
    """Packed tensors of the frozen linear layers, without biases."""
    frozen_weights: int
    quantised_layers: int
    bits_per_weight: float | None
    """Of the quantised layers, constants included; None when there are none."""
    other_bytes: int
    """All else that does not train: embeddings, norms, head, biases, buffers."""
    trained_bytes: int
    trained: int
    total: int
    """Parameters of the model (tied ones once, a quantised weight as one) and of the adapter."""
    largest_layer: int
    """Weights of the largest frozen layer."""
    largest_quantised: int


def count_weights(planned: PlannedModel) -> WeightCounts:
    """Count the planned model's tensors, each once: a float32 adapter, all else as it computes."""
    model = planned.model
    layers = [layer for _, layer in frozen_layers(model)]
    quantised = [layer for layer in layers if layer.weight_format.quantised]
    sizes = {id(layer): layer.in_features * layer.out_features for layer in layers}
    packed = {id(tensor) for layer in layers for tensor in layer.packed.values()}
    adapted = [layer for _, layer in adapted_layers(model)]
    adapters = {id(p) for layer in adapted for p in layer.adapters.parameters()}
    narrow = {id(m.weight) for m in model.modules() if isinstance(m, NARROW_CLASSES)}
    kept_ids = adapters | narrow
    other = sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
    trained_bytes = trained = 0
    total = sum(sizes.values())
    for parameter in model.parameters():
        if id(parameter) in packed:
            continue
        kept = id(parameter) in kept_ids or not parameter.is_floating_point()
        itemsize = parameter.itemsize if kept else planned.dtype.itemsize
        total += parameter.numel()
        if parameter.requires_grad:
            trained += parameter.numel()
            trained_bytes += parameter.numel() * itemsize
        else:
            other += parameter.numel() * itemsize
    bits = sum(8 * layer.storage_bytes for layer in quantised)
    return WeightCounts(
        frozen_bytes=sum(layer.storage_bytes for layer in layers),
        frozen_weights=sum(sizes.values()),
        quantised_layers=len(quantised),
        bits_per_weight=bits / sum(sizes[id(q)] for q in quantised) if quantised else None,
        other_bytes=other,
        trained_bytes=trained_bytes,
        trained=trained,
        total=total,
        largest_layer=max(sizes.values(), default=0),
        largest_quantised=max((sizes[id(layer)] for layer in quantised), default=0),
    )
