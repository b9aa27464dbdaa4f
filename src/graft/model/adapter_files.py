"""Adapters on disk: PEFT's format for what PEFT has, one of our own for the rest.

A folder holds adapter_model.safetensors and adapter_config.json as PEFT writes them, and beside
them graft_adapter.json, which keeps what PEFT's configuration cannot say exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.affine import AffineAdapter
from graft.adapters.attach import adapted_layer, adapted_layers, adapter_names, frozen_layers
from graft.adapters.base import Adapter
from graft.adapters.config import GRID_METHODS, Init
from graft.adapters.dora import DoraAdapter
from graft.adapters.lora import LoraAdapter
from graft.adapters.merge_aware import GRID_PARAMETERS, MergeAwareAdapter
from graft.adapters.qalora import QALoraAdapter
from graft.errors import GraftError, raise_problems
from graft.files import new_folder, read_json, write_json
from graft.formats.dense import DenseFormat
from graft.formats.int_group import IntGroupFormat
from graft.formats.latent import LatentFormat
from graft.layers.frozen import FrozenLinear
from graft.model.peft_files import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    foreign_tensor,
    peft_config,
    peft_key,
    peft_pool_factor,
    peft_problems,
    peft_scaling,
    split_peft_key,
)
from graft.model.save import save_tensors
from graft.model.weight_files import WeightFiles

OWN_CONFIG = "graft_adapter.json"
OWN_VERSION = 1
_OWN_PARAMETERS = {
    "affine": ("u", "v"),
    "merge_aware": ("A", "B", *GRID_PARAMETERS),
    "qalora": ("A", "B", "u_A", "u_B"),
}


def save_adapter(
    model: nn.Module,
    folder: Path,
    name: str = "default",
    base: str = "",
    as_lora: bool = False,
    init: Init = "default",
) -> None:
    """Write one adapter to a new folder, float32.

    lora, DoRA and qalora are written so that PEFT reads them; affine, merge_aware and a qalora that
    moves the scales too or has groups of several sizes, which PEFT has not, by our own names. With
    `as_lora` a qalora adapter is written as an ordinary LoRA whose A is repeated group-wise, which
    every LoRA runtime can serve. `init` is kept beside it: an adapter that started as loftq belongs
    on its quantised base and on no other. Raises GraftError when there is no such adapter, or when
    `as_lora` is asked of one that is no LoRA.
    """
    layers = {
        layer_name: (layer.base, layer.adapter(name))
        for layer_name, layer in adapted_layers(model)
        if name in layer.adapters
    }
    if not layers:
        raise GraftError(f"the model has no adapter named {name!r}")
    adapters = [adapter for _, adapter in layers.values()]
    method = adapters[0].method
    sizes = {adapter.group_size for adapter in adapters if isinstance(adapter, QALoraAdapter)}
    lora = all(map(_is_lora, adapters))
    # PEFT has one group size for all layers.
    if not lora or (len(sizes) > 1 and not as_lora):
        if not lora and as_lora:
            offsets_alone = ", or train it with --grid-rank 0" if method == "qalora" else ""
            raise GraftError(
                f"this {method} adapter is no LoRA: what it trains is inside the integer weights. "
                f"Export the merged model{offsets_alone}"
            )
        tensors: dict[str, Tensor] = {
            f"{layer_name}.{key}": parameter
            for layer_name, (_, adapter) in layers.items()
            for key, parameter in adapter.named_parameters()
        }
        config: dict[str, Any] | None = None
    else:
        tensors = {
            peft_key(layer_name, key): tensor
            for layer_name, (base_layer, adapter) in layers.items()
            for key, tensor in _lora_tensors(adapter, base_layer, as_lora).items()
        }
        config = peft_config(layers, base, as_lora)
    scalings = {layer: getattr(adapter, "scaling", None) for layer, (_, adapter) in layers.items()}
    with new_folder(folder) as part:
        save_tensors(tensors, part / PEFT_WEIGHTS)
        if config is not None:
            write_json(part / PEFT_CONFIG, config)
        own = {
            "format_version": OWN_VERSION,
            "method": "lora" if as_lora else method,
            "base": base,
            "scaling": scalings,
            "init": init,
        }
        write_json(part / OWN_CONFIG, own)


def _is_lora(adapter: Adapter) -> bool:
    """Return whether the update is a low-rank matrix, whatever the weight that it is added to."""
    grouped = isinstance(adapter, QALoraAdapter) and not adapter.grid_rank
    return grouped or isinstance(adapter, LoraAdapter)


def _lora_tensors(adapter: Adapter, base: FrozenLinear, as_lora: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(adapter.named_parameters())
    if as_lora and isinstance(adapter, QALoraAdapter):
        tensors["A"] = adapter.expanded_a(base.in_features)
    return tensors


def load_adapter(
    model: nn.Module, folder: Path, name: str = "default", trainable: bool = False
) -> str:
    """Attach an adapter from a folder that graft or PEFT wrote, activate it, return its method.

    Every tensor must find its layer and fit it. Raises GraftError with all that do not, before
    the model is changed.
    """
    own = read_json(folder / OWN_CONFIG) if (folder / OWN_CONFIG).is_file() else {}
    if own and own.get("format_version") != OWN_VERSION:
        raise GraftError(
            f"{folder / OWN_CONFIG} has format_version {own.get('format_version')!r}; this version "
            f"of graft reads {OWN_VERSION}"
        )
    if not own and not (folder / PEFT_CONFIG).is_file():
        raise GraftError(f"{folder} is no adapter folder: it has no {PEFT_CONFIG}")
    config = read_json(folder / PEFT_CONFIG) if (folder / PEFT_CONFIG).is_file() else {}
    tensors = _read_tensors(folder)
    layers = dict(frozen_layers(model))
    method = str(own.get("method") or ("qalora" if config.get("use_qalora") else "lora"))
    problems = peft_problems(config)
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer_name, parameter = _split_key(key, config, method)
        if parameter is None or layer_name not in layers:
            problems.append(foreign_tensor(key))
        else:
            by_layer.setdefault(layer_name, {})[parameter] = tensor
    if own.get("init") == "loftq":
        problems += [
            f"{layer_name} is dense, and this adapter makes up for the rounding of the weights in "
            f"{own.get('base')!r}: load it on those"
            for layer_name in by_layer
            if isinstance(layers[layer_name].weight_format, DenseFormat)
        ]
    made = {}
    for layer_name, parts in by_layer.items():
        try:
            made[layer_name] = _build(method, layers[layer_name], parts, layer_name, config, own)
        except GraftError as error:
            problems.append(f"{layer_name}: {error}")
    missing = [layer_name for layer_name in own.get("scaling", {}) if layer_name not in by_layer]
    problems += [f"the tensors of {layer_name} are missing" for layer_name in missing]
    if not by_layer and not problems:
        problems.append("it holds no tensors")
    if name in adapter_names(model):
        problems.append(f"the model already has an adapter named {name!r}; remove it first")
    raise_problems(problems[:20], f"adapter {folder}")
    for layer_name, adapter in made.items():
        adapter.requires_grad_(trainable).to(next(layers[layer_name].parameters()).device)
        adapter.train(layers[layer_name].training)
        adapted_layer(model, layer_name).add(name, adapter)
    return method


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if not (folder / PEFT_WEIGHTS).is_file():
        raise GraftError(
            f"{folder} has no {PEFT_WEIGHTS}; a pickled adapter_model.bin is not read: save it "
            "with safetensors"
        )
    with WeightFiles(folder, single_file=PEFT_WEIGHTS) as files:
        return {key: files.read(key).float().clone() for key in files}


def _split_key(key: str, config: Mapping[str, Any], method: str) -> tuple[str, str | None]:
    """Return the layer that a tensor belongs to, and the adapter's parameter that it is."""
    own_names = _OWN_PARAMETERS.get(method)
    if config or own_names is None:
        return split_peft_key(key, bool(config.get("use_dora")))
    layer_name, _, parameter = key.rpartition(".")
    return layer_name, parameter if parameter in own_names else None


def _build(
    method: str,
    layer: FrozenLinear,
    parts: Mapping[str, Tensor],
    layer_name: str,
    config: Mapping[str, Any],
    own: Mapping[str, Any],
) -> Adapter:
    """Return the adapter of one layer; raises GraftError when the tensors do not fit it."""
    adapter: AffineAdapter | QALoraAdapter | LoraAdapter | MergeAwareAdapter
    weight_format = layer.weight_format
    needed = GRID_METHODS.get(method)
    if needed is not None and weight_format.name != needed:
        raise GraftError(f"{method} needs the {needed} format, found {weight_format.name!r}")
    if method == "affine":
        assert isinstance(weight_format, IntGroupFormat)
        adapter = AffineAdapter(layer.out_features, weight_format.groups(layer.in_features))
        _fill(adapter, parts)
        return adapter
    if "A" not in parts or "B" not in parts:
        raise GraftError("lora_A or lora_B is missing")
    rank = parts["A"].shape[0]
    if needed is not None and not config:
        grid_rank = parts["u_A"].shape[0] if "u_A" in parts else 0
        sizes = layer.in_features, layer.out_features
        if method == "merge_aware":
            assert isinstance(weight_format, LatentFormat)
            groups = weight_format.groups(layer.in_features)
            adapter = MergeAwareAdapter(*sizes, groups, rank, grid_rank=grid_rank)
        else:
            assert isinstance(weight_format, IntGroupFormat)
            adapter = QALoraAdapter(*sizes, weight_format.group_size, rank, grid_rank=grid_rank)
        adapter.scaling = own["scaling"][layer_name]
        _fill(adapter, parts)
        return adapter
    scaling = peft_scaling(config, layer_name, rank)
    if method == "qalora":
        assert isinstance(weight_format, IntGroupFormat)
        group_size = int(config["qalora_group_size"])
        if group_size != weight_format.group_size:
            raise GraftError(
                f"its group size is {group_size}, the base's is {weight_format.group_size}"
            )
        adapter = QALoraAdapter(layer.in_features, layer.out_features, group_size, rank)
        # PEFT knows no bound: B A of a larger rank is kept as the file has it.
        adapter.rank = rank
        adapter.A = nn.Parameter(torch.empty(rank, weight_format.groups(layer.in_features)))
        adapter.B = nn.Parameter(torch.empty(layer.out_features, rank))
        scaling *= peft_pool_factor(layer.in_features, group_size)
    else:
        dropout = float(config.get("lora_dropout") or 0.0)
        sizes = layer.in_features, layer.out_features
        if config.get("use_dora"):
            if "magnitude" not in parts:
                raise GraftError("lora_magnitude_vector is missing")
            adapter = DoraAdapter(layer, rank, dropout=dropout)
        else:
            adapter = LoraAdapter(*sizes, rank, dropout=dropout, bias="bias" in parts)
    exact = own.get("scaling")
    if isinstance(exact, dict):
        if not isinstance(exact.get(layer_name), (int, float)):
            raise GraftError(f"{OWN_CONFIG} has no scaling for it; save the adapter again")
        scaling = exact[layer_name]
    adapter.scaling = scaling
    _fill(adapter, parts)
    return adapter


def _fill(adapter: Adapter, parts: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    if expected != found:
        raise GraftError(f"its tensors are {found}; the layer takes {expected}")
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(parts[name])
