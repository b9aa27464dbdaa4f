"""An adapter as another program saved it, sorted: what stays an adapter, what becomes the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graft.adapters.attach import frozen_layers
from graft.adapters.method import Method
from graft.errors import Problems, raise_problems
from graft.model.adapter_extras import Extra, head_name, sort_extras
from graft.model.adapter_files import AdapterFiles, OwnConfig, attach_stored
from graft.model.adapter_names import Placed, place_tensors
from graft.model.peft_files import (
    BESIDE,
    peft_alphas,
    peft_key,
    peft_problems,
    peft_ranks,
    peft_remarks,
)
from graft.model.peft_targets import Targets, lost_layers
from graft.text import quoted

_TOLD = 20


@dataclass(frozen=True)
class ForeignAdapter:
    """What an adapter's folder holds, in PEFT's terms whoever wrote it."""

    folder: Path
    file: Path
    """That of the tensors."""
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    targets: Targets
    """What its configuration says that it adapts."""
    written_by: str
    own: OwnConfig | None = None


@dataclass(frozen=True)
class FittedAdapter:
    """A foreign adapter whose every tensor has found its place in a model."""

    files: AdapterFiles | None
    """What stays an adapter; None where no linear layer is adapted."""
    extras: Mapping[str, Extra]
    """What becomes part of the base."""
    method: Method | None
    notes: tuple[str, ...]


def fit_adapter(adapter: ForeignAdapter, skeleton: PreTrainedModel) -> FittedAdapter:
    """Sort an adapter's tensors and attach it to a model without data, its layers frozen.

    Raises GraftError with all that does not fit, is missing, or is not understood.
    """
    where = f"adapter {adapter.folder}"
    hollow = _hollow(adapter.tensors)
    raise_problems(hollow, where)
    layers = {name for name, _ in frozen_layers(skeleton)}
    names = {name for name, _ in skeleton.named_modules() if name} | skeleton.state_dict().keys()
    names |= {f"{layer}.weight" for layer in layers}
    placed = place_tensors(
        adapter.tensors,
        names,
        skeleton.base_model_prefix,
        lambda first, second: torch.equal(adapter.tensors[first], adapter.tensors[second]),
    )
    raise_problems(placed.problems[:_TOLD], where)
    modules = {place.module for place in placed.keys.values()}
    config, problems = _renamed_patterns(adapter.config, placed, modules)
    alphas, _ = peft_alphas(config, modules)
    extras, beside = sort_extras(placed.keys, adapter.tensors, config, skeleton, alphas)
    held = {place.module for place in placed.keys.values() if place.part.startswith("lora_")}
    following = {head_name(skeleton)} if config.get("ensure_weight_tying") else set[str]()
    problems += [*lost_layers(adapter.targets, skeleton, placed, held, following), *beside]
    problems += _bias_problems(adapter.config, placed)
    # What they ask for is in the extras.
    config = {key: value for key, value in config.items() if key not in BESIDE}
    tensors = {
        peft_key(place.module, place.part): adapter.tensors[key]
        for key, place in placed.keys.items()
        if place.part.startswith("lora_") and place.module in layers
    }
    notes = (*placed.notes, *peft_remarks(config), *_idle(tensors))
    if not tensors and (extras or problems):
        raise_problems([*peft_problems(config), *problems][:_TOLD], where)
        return FittedAdapter(None, extras, None, notes)
    files = AdapterFiles(where, adapter.own, config, tensors)
    collected = Problems()
    with collected.collecting():
        raise_problems(problems[:_TOLD], where)
    with collected.collecting():
        method = attach_stored(skeleton, files)
    collected.raise_all(where)
    return FittedAdapter(files, extras, method, notes)


def _idle(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a line where no update changes anything, as when an adapter is saved untrained."""
    factors = [tensor for name, tensor in tensors.items() if name.endswith("lora_B.weight")]
    if not factors or any(tensor.any() for tensor in factors):
        return []
    return ["every lora_B is zero: its low-rank updates change nothing, as before training"]


def _bias_problems(config: Mapping[str, Any], placed: Placed) -> list[str]:
    """Return what is wrong where the tensors and `lora_bias` do not say the same."""
    held = {place.module for place in placed.keys.values() if place.part == "lora_B.weight"}
    biased = {place.module for place in placed.keys.values() if place.part == "lora_B.bias"}
    if biased and not config.get("lora_bias"):
        return [
            f"the file has a lora_B.bias for {len(biased)} layers, and adapter_config.json does "
            "not say lora_bias: PEFT leaves them out; mend it if they belong to it"
        ]
    lacking = sorted(held - biased) if config.get("lora_bias") else []
    if not lacking:
        return []
    return [
        f"adapter_config.json says lora_bias, and the file has no lora_B.bias for {len(lacking)} "
        f"layers, such as {quoted(lacking[0])}; it is not whole (was a part of it lost?)"
    ]


def _hollow(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what tells that a sharded training saved parts of tensors, or nothing of them."""
    low_rank = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    empty = [
        name
        for name, tensor in tensors.items()
        if not tensor.numel()
        or (tensor.ndim != 2 and name.endswith("weight") and set(low_rank) & set(name.split(".")))
    ]
    if not empty:
        return []
    shape = list(tensors[empty[0]].shape)
    return [
        f"{len(empty)} of its {len(tensors)} tensors are empty or flat, such as {quoted(empty[0])} "
        f"{shape}: saved by DeepSpeed ZeRO-3 or FSDP without gathering the parameters, so what was "
        "trained is not in the file; save it again (stage3_gather_16bit_weights_on_model_save, or "
        "zero_to_fp32.py on the checkpoint)"
    ]


def _renamed_patterns(
    config: Mapping[str, Any], placed: Placed, modules: set[str]
) -> tuple[Mapping[str, Any], list[str]]:
    """Return the configuration with its patterns of ranks and alphas by the model's names.

    They are written for the names that the file has, where a prefix is another one.
    """
    filed = {module: placed.renamed[module] for module in modules}
    if all(module == name for module, name in filed.items()):
        return config, []
    changes, problems = {}, []
    for key, read in (("alpha_pattern", peft_alphas), ("rank_pattern", peft_ranks)):
        if config.get(key):
            values, found = read(config, list(filed.values()))
            changes[key] = {module: values[name] for module, name in filed.items()}
            problems += found
    return dict(config) | changes, problems
