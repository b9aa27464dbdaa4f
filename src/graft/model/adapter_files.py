"""Adapters on disk: PEFT's format for what PEFT has, one of our own for the rest.

A folder holds adapter_model.safetensors and adapter_config.json as PEFT writes them, and beside
them graft_adapter.json, which keeps what PEFT's configuration cannot say exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.attach import adapted_layer, adapted_layers, adapter_names, frozen_layers
from graft.adapters.base import Adapter, StoredAdapter
from graft.adapters.method import Method
from graft.adapters.registry import method_of_files
from graft.adapters.starts.registry import STARTS
from graft.errors import GraftError, raise_problems
from graft.files.bounds import bound, raise_beyond
from graft.files.digest import check_digest
from graft.files.read import read_json, typed
from graft.files.write import new_folder, write_json
from graft.layers.frozen import FrozenLinear
from graft.model.peft_files import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    Finite,
    foreign_tensor,
    peft_alphas,
    peft_config,
    peft_key,
    peft_problems,
    peft_scaling,
    rank_problems,
    read_peft_config,
    split_peft_key,
)
from graft.model.save import save_tensors
from graft.model.weight_files import WeightFiles
from graft.text import quoted

OWN_CONFIG = "graft_adapter.json"
OWN_VERSION = 1
_FACTORS = {"A": "lora_A.weight", "B": "lora_B.weight"}


@dataclass(frozen=True, kw_only=True)
class OwnConfig:
    """What graft_adapter.json says."""

    format_version: int
    method: str | None = None
    base: str | None = None
    scaling: Mapping[str, Finite | None] = field(default_factory=dict)
    """Of each layer, exactly as it was trained; None where the method has none."""
    init: str = "default"
    sha256: str | None = None
    """Of the tensors; adapters of earlier versions do not say it."""


def read_own_config(folder: Path) -> OwnConfig | None:
    """Return what graft_adapter.json says, None where there is none, as beside PEFT's own.

    Raises GraftError when it is damaged or of another version.
    """
    file = folder / OWN_CONFIG
    if not file.is_file():
        return None
    found = read_json(file)
    if found.get("format_version") != OWN_VERSION:
        raise GraftError(
            f"{file} has format_version {quoted(found.get('format_version'))}; this version of "
            f"graft reads {OWN_VERSION}"
        )
    return typed(found, OwnConfig, file)


def read_configs(folder: Path) -> tuple[OwnConfig | None, dict[str, Any]]:
    """Return what graft's and PEFT's configuration say; raises GraftError for no adapter."""
    own = read_own_config(folder)
    if (folder / PEFT_CONFIG).is_file():
        return own, read_peft_config(folder)
    if own is None:
        raise GraftError(f"{folder} is no adapter folder: it has no {PEFT_CONFIG}")
    return own, {}


def save_adapter(
    model: nn.Module,
    folder: Path,
    name: str = "default",
    base: str = "",
    as_lora: bool = False,
    init: str = "default",
    began: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Write one adapter to a new folder, float32.

    lora, DoRA and qalora are written so that PEFT reads them; affine, merge_aware and a qalora that
    moves the scales too or has groups of several sizes, which PEFT has not, by our own names. With
    `as_lora` a qalora adapter is written as an ordinary LoRA whose A is repeated group-wise, which
    every LoRA runtime can serve. `init` is kept beside it: one that began as a part of quantised
    weights belongs on those and on no others. began: A and B that each layer's adapter began with,
    as a part of its weight, which are taken out: s [B, -B0] [A; A0], of twice the rank, is what was
    trained. Raises GraftError when there is no such adapter, or when `as_lora` is asked of one that
    is no LoRA.
    """
    layers = {
        layer_name: (layer.base, layer.adapter(name))
        for layer_name, layer in adapted_layers(model)
        if name in layer.adapters
    }
    if not layers:
        raise GraftError(f"the model has no adapter named {name!r}")
    method = next(iter(layers.values()))[1].method
    parts = {
        layer_name: adapter.lora_tensors(base_layer, as_lora)
        for layer_name, (base_layer, adapter) in layers.items()
    }
    for layer_name, start in (began or {}).items():
        parts[layer_name] = _without(parts[layer_name], start)
    ranks = {name: len(part["A"]) for name, part in parts.items() if part is not None}
    config = peft_config(layers, ranks, base, as_lora) if len(ranks) == len(parts) else None
    if config is None:
        if as_lora:
            raise GraftError(
                f"this {method} adapter is no LoRA: what it trains is inside the quantised "
                f"weights. {next(iter(layers.values()))[1].why_no_lora()}"
            )
        tensors: dict[str, Tensor] = {
            f"{layer_name}.{key}": parameter
            for layer_name, (_, adapter) in layers.items()
            for key, parameter in adapter.named_parameters()
        }
    else:
        tensors = {
            peft_key(layer_name, layers[layer_name][1].peft_names[key]): tensor
            for layer_name, part in parts.items()
            for key, tensor in (part or {}).items()
        }
    scalings = {layer: adapter.scaling for layer, (_, adapter) in layers.items()}
    with new_folder(folder) as part:
        digest = save_tensors(tensors, part / PEFT_WEIGHTS)
        if config is not None:
            write_json(part / PEFT_CONFIG, config)
        own = {
            "format_version": OWN_VERSION,
            "method": "lora" if as_lora else method,
            "base": base,
            "scaling": scalings,
            "init": init,
            "sha256": digest,
        }
        write_json(part / OWN_CONFIG, own)


def _without(part: Mapping[str, Tensor] | None, began: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a low-rank update with what it began with taken out."""
    assert part is not None, "it has the factors that PEFT's form holds"
    A, B = (tensor.to(part["A"]) for tensor in began)
    return {**part, "A": torch.cat([part["A"], A]), "B": torch.cat([part["B"], -B], 1)}


def read_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of each layer of a LoRA that graft saved; raises GraftError for damage."""
    check_adapter_file(folder)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_adapter_tensors(folder).items():
        layer_name, parameter = split_peft_key(key, _FACTORS)
        if parameter is not None:
            found.setdefault(layer_name, {})[parameter] = tensor
    return {name: (part["A"], part["B"]) for name, part in found.items()}


def check_adapter_file(folder: Path) -> None:
    """Raise GraftError when the tensors of an adapter that graft saved are not what it wrote.

    Adapters of PEFT and of earlier versions do not say what that was.
    """
    own = read_own_config(folder)
    if own is not None and own.sha256 is not None:
        check_digest(folder / PEFT_WEIGHTS, own.sha256)


@dataclass(frozen=True)
class AdapterFiles:
    """What the folder of an adapter holds."""

    where: str
    own: OwnConfig | None
    config: Mapping[str, Any]
    """PEFT's; empty in our own form."""
    tensors: Mapping[str, Tensor]
    """By the names that the file has for them, or PEFT's."""


def load_adapter(
    model: nn.Module, folder: Path, name: str = "default", trainable: bool = False
) -> Method:
    """Attach an adapter from a folder that graft or PEFT wrote, activate it, return its method.

    Every tensor must find its layer and fit it. Raises GraftError with all that do not, before
    the model is changed.
    """
    own, config = read_configs(folder)
    files = AdapterFiles(f"adapter {folder}", own, config, read_adapter_tensors(folder))
    return attach_stored(model, files, name, trainable)


def attach_stored(
    model: nn.Module, files: AdapterFiles, name: str = "default", trainable: bool = False
) -> Method:
    """Attach an adapter that was read and activate it; see `load_adapter`."""
    own, config = files.own, files.config
    layers = dict(frozen_layers(model))
    method = method_of_files(None if own is None else own.method, config)
    problems = peft_problems(config)
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in files.tensors.items():
        layer_name, parameter = _split_key(key, config, method)
        if parameter is None or layer_name not in layers:
            problems.append(foreign_tensor(key))
        else:
            by_layer.setdefault(layer_name, {})[parameter] = tensor
    if own is not None and STARTS[own.init].changes_base:
        problems += [
            f"{layer_name} is dense, and this adapter began as a part of the quantised weights in "
            f"{quoted(own.base)}: load it on those"
            for layer_name in by_layer
            if not layers[layer_name].weight_format.quantised
        ]
    alphas, found = peft_alphas(config, by_layer)
    problems += found
    if own is None:
        problems += rank_problems(
            config, {layer: part["A"] for layer, part in by_layer.items() if "A" in part}
        )
    made = {}
    for layer_name, parts in by_layer.items():
        try:
            stored = _stored(parts, layer_name, own, config, alphas[layer_name])
            made[layer_name] = _build(method, layers[layer_name], stored)
        except GraftError as error:
            problems.append(f"{layer_name}: {error}")
    scaled = {} if own is None else own.scaling
    missing = [layer_name for layer_name in scaled if layer_name not in by_layer]
    problems += [f"the tensors of {quoted(layer_name)} are missing" for layer_name in missing]
    if not by_layer and not problems:
        problems.append("it holds no tensors")
    if name in adapter_names(model):
        problems.append(f"the model already has an adapter named {name!r}; remove it first")
    raise_problems(problems[:20], files.where)
    for layer_name, adapter in made.items():
        adapter.requires_grad_(trainable).to(next(layers[layer_name].parameters()).device)
        adapter.train(layers[layer_name].training)
        adapted_layer(model, layer_name).add(name, adapter)
    return method


def check_adapter(
    model: nn.Module,
    folder: Path,
    name: str = "default",
    began: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Raise GraftError unless a saved adapter holds exactly the tensors that the model trained.

    began: as in `save_adapter`. Names and shapes are read from the header of the file, so it costs
    nothing.
    """
    own, config = read_configs(folder)
    method = method_of_files(None if own is None else own.method, config)
    with WeightFiles(folder, single_file=PEFT_WEIGHTS) as files:
        saved = {_split_key(key, config, method): files.shape(key) for key in files}
    trained: dict[tuple[str, str | None], tuple[int, ...]] = {
        (layer_name, key): tuple(parameter.shape)
        for layer_name, layer in adapted_layers(model)
        if name in layer.adapters
        for key, parameter in layer.adapter(name).named_parameters()
    }
    for layer_name, (A, B) in (began or {}).items():
        rank = len(A) + trained[layer_name, "A"][0]
        trained |= {(layer_name, "A"): (rank, A.shape[1]), (layer_name, "B"): (len(B), rank)}
    problems = [
        f"{layer_name}.{key}: the file has {_sizes(saved, layer_name, key)}, what was trained "
        f"{_sizes(trained, layer_name, key)}"
        for layer_name, key in trained.keys() | saved.keys()
        if trained.get((layer_name, key)) != saved.get((layer_name, key))
    ]
    raise_problems(sorted(problems)[:20], f"{folder} is not the adapter that was trained")


def _sizes(
    shapes: Mapping[tuple[str, str | None], tuple[int, ...]], layer: str, key: str | None
) -> list[int] | None:
    found = shapes.get((layer, key))
    return None if found is None else list(found)


def read_adapter_tensors(folder: Path, file: str = PEFT_WEIGHTS) -> dict[str, Tensor]:
    """Return the tensors of an adapter, float32; raises GraftError for no readable ones."""
    if not (folder / file).is_file():
        raise GraftError(f"{folder} has no {file} (an adapter_model.bin is read by `graft adopt`)")
    with WeightFiles(folder, single_file=file) as files:
        whole = [quoted(key) for key in files if not files.dtype(key).is_floating_point]
        if whole:
            raise GraftError(f"{folder / file}: {', '.join(whole[:5])} hold integers")
        return {key: files.read(key).float().clone() for key in files}


def _split_key(key: str, config: Mapping[str, Any], method: Method) -> tuple[str, str | None]:
    """Return the layer that a tensor belongs to, and the adapter's parameter that it is."""
    kind = method.adapter
    assert kind is not None, "it reads files of adapters"
    if config or not kind.own_names:
        return split_peft_key(key, kind.peft_names)
    layer_name, _, parameter = key.rpartition(".")
    return layer_name, parameter if parameter in kind.own_names else None


def _stored(
    parts: Mapping[str, Tensor],
    layer_name: str,
    own: OwnConfig | None,
    config: Mapping[str, Any],
    alpha: float,
) -> StoredAdapter:
    """Return one layer's adapter as the files hold it; raises GraftError for no sound tensors."""
    for name, tensor in parts.items():
        if not tensor.ndim or 0 in tensor.shape:
            raise GraftError(f"{name} is {list(tensor.shape)}, which holds nothing")
        if not bool(tensor.isfinite().all()):
            raise GraftError(f"{name} holds what is infinite or no number")
    scaling = None if own is None else own.scaling.get(layer_name)
    peft = None
    if config:
        if own is not None and scaling is None:
            raise GraftError(f"{OWN_CONFIG} has no scaling for it; save the adapter again")
        if "A" in parts:
            peft = peft_scaling(config, alpha, parts["A"].shape[0])
    return StoredAdapter(parts, scaling, peft, config)


def _build(method: Method, layer: FrozenLinear, stored: StoredAdapter) -> Adapter:
    """Return the adapter of one layer; raises GraftError when the tensors do not fit it."""
    kind = method.adapter
    assert kind is not None, "it reads files of adapters"
    found = layer.weight_format.name
    if kind.needed_format not in (None, found):
        raise GraftError(f"{kind.method} needs the {kind.needed_format} format, found {found!r}")
    rank = len(stored.tensors.get("A", ()))
    most = bound(max(layer.in_features, layer.out_features))
    if rank > most:  # room is taken by it, not by what the file holds
        raise_beyond("its A", f"rank {rank:,}", f"{most:,}")
    return kind.from_stored(layer, stored)
