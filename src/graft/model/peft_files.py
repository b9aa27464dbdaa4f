"""PEFT's files of a LoRA: its names of tensors, its configuration, and what of it is not read.

What is read goes by the tensors that there are; `peft_targets` says which there should be. Options
that only say how a training began need nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from graft.adapters.base import Adapter
from graft.errors import GraftError, raise_problems
from graft.files.read import read_json, typed
from graft.layers.frozen import FrozenLinear
from graft.model.adapter_names import PEFT_PREFIX
from graft.patterns import match_names
from graft.text import quoted

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
_PREFIX = PEFT_PREFIX
_READ = frozenset(
    {
        *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "lora_bias"),
        *("bias", "use_rslora", "use_dora", "use_qalora", "qalora_group_size", "rank_pattern"),
        *("alpha_pattern", "init_lora_weights", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "modules_to_save", "task_type"),
        *("trainable_token_indices", "ensure_weight_tying", "fan_in_fan_out"),
    }
)
_WITHOUT_EFFECT = frozenset(
    {
        *("peft_version", "auto_mapping", "revision", "inference_mode", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
        *("megatron_core", "merge_weights", "qalora_group_size", "mica_config"),
    }
)
"""Options of PEFT, some of them of earlier versions, that change nothing of what a trained adapter
computes: where it came from, how it began, how its gradients were formed."""
_UNREAD = frozenset(
    {
        *("alora_invocation_tokens", "target_parameters", "layer_replication", "enable_lora"),
        "model_key_mapping",
    }
)
"""Options that change what an adapter computes; so do all that begin with `use_` or end in
`_config` and are not read."""
BESIDE = ("modules_to_save", "trainable_token_indices", "bias")
"""Options that train what is no low-rank update of a linear layer."""
_OTHER_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM")
VARIANTS = ("use_dora", "use_qalora")
"""Options that make another adapter of a LoRA."""
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def peft_key(layer_name: str, peft_name: str) -> str:
    """Return PEFT's name for a tensor of a layer's adapter; see `Adapter.peft_names`."""
    return f"{_PREFIX}{layer_name}.{peft_name}"


def split_peft_key(key: str, names: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the layer and its parameter by PEFT's name of a tensor; None for one not known.

    names: those that the adapter's parameters have in PEFT's files, `Adapter.peft_names`.
    """
    for parameter, peft_name in names.items():
        if key.startswith(_PREFIX) and key.endswith("." + peft_name):
            return key[len(_PREFIX) : -len(peft_name) - 1], parameter
    return key, None


def foreign_tensor(key: str) -> str:
    """Return what is wrong with a tensor that is no parameter of an adapted linear layer."""
    problem = f"tensor {quoted(key)} belongs to no linear layer of this model"
    if "lora_embedding_" in key:
        return f"{problem}: it adapts an embedding, and only linear layers are adapted here"
    if key.startswith(f"{_PREFIX}lm_head."):
        return f"{problem}: it adapts the output head, which stays as it is here"
    return problem


def peft_config(
    layers: Mapping[str, tuple[FrozenLinear, Adapter]],
    ranks: Mapping[str, int],
    base: str,
    as_lora: bool,
) -> dict[str, Any] | None:
    """Return adapter_config.json of low-rank adapters by layer; None where PEFT cannot hold them.

    It has one group size for all layers. ranks: by layer, of the tensors that are written. as_lora:
    these are those of an ordinary LoRA. Raises GraftError for kinds of adapters that neither PEFT
    nor our own form can mix.
    """
    first_base, first = next(iter(layers.values()))
    settings = first.peft_settings(as_lora)
    others = [adapter.peft_settings(as_lora) for _, adapter in layers.values()]
    kinds = {type(adapter).__name__ for _, adapter in layers.values()}
    if len(kinds) > 1:
        raise GraftError(f"its layers carry {' and '.join(sorted(kinds))}; PEFT holds one kind")
    if len({one.get("qalora_group_size") for one in others}) > 1 and not as_lora:
        return None
    alphas: dict[str, float] = {
        name: (adapter.scaling or 0.0) * ranks[name] / adapter.peft_factor(base_layer, as_lora)
        for name, (base_layer, adapter) in layers.items()
    }
    return lora_config(ranks, alphas, base, first_base.transposed) | settings


def lora_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], base: str, transposed: bool
) -> dict[str, Any]:
    """Return adapter_config.json of an ordinary LoRA, from each layer's rank and alpha."""
    alpha, rank = next(iter(alphas.values())), next(iter(ranks.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": list(ranks),
        "init_lora_weights": True,
        "use_qalora": False,
        "qalora_group_size": 16,
    }


Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class _PeftFields:
    """The fields of PEFT's configuration that are read, of whatever kind of adapter."""

    peft_type: str | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    r: int | None = None
    lora_alpha: Finite | None = None
    lora_dropout: Finite | None = None
    lora_bias: bool | None = None
    bias: str | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    use_qalora: bool | None = None
    qalora_group_size: int | None = None
    alpha_pattern: Mapping[str, Finite] | None = None
    init_lora_weights: bool | str | None = None
    task_type: str | None = None
    rank_pattern: Mapping[str, int] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool | None = None


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json, each field that is read of the type that PEFT gives it.

    Raises GraftError when it is damaged, or is LoRA's without a rank and alpha.
    """
    file = folder / PEFT_CONFIG
    config = read_json(file)
    fields = typed(config, _PeftFields, file)
    if fields.peft_type == "LORA":
        problems = [
            f"{key} is {quoted(config.get(key))}, not a number above 0"
            for key in ("r", "lora_alpha")
            if not (config.get(key) or 0) > 0
        ]
        raise_problems(problems, str(file))
    return config


def peft_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what a PEFT configuration asks for that is not read here."""
    problems = []
    if config and config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {quoted(config.get('peft_type'))}; only LORA is read")
    for option in BESIDE:
        if (config.get(option) or "none") != "none":
            problems.append(
                f"{option} is {quoted(config[option])}: what it trained beside low-rank updates "
                "belongs into the base, as `graft adopt` does it"
            )
    for option in _set_but_unread(config):
        if option in _UNREAD or option.startswith("use_") or option.endswith("_config"):
            problems.append(f"{quoted(option)} is set, which is not read")
    if config.get("task_type") in _OTHER_TASKS:
        problems.append(
            f"task_type is {quoted(config['task_type'])}: such an adapter ends in another head; "
            "graft brings in those of causal language models"
        )
    initialisation = str(config.get("init_lora_weights"))
    if initialisation.lower().startswith(_BASE_CHANGING):
        problems.append(
            f"init_lora_weights is {quoted(initialisation)}, which changed the base it was trained "
            "on; save it again with PEFT's path_initial_model_for_weight_conversion"
        )
    if not 0 <= (config.get("lora_dropout") or 0.0) < 1:
        problems.append(
            f"lora_dropout is {config['lora_dropout']!r}; expected 0 up to, but not including, 1"
        )
    variants = [one for one in VARIANTS if config.get(one)]
    if len(variants) > 1:
        problems.append(f"{' and '.join(variants)} are both set, which PEFT itself has not")
    return problems


def peft_remarks(config: Mapping[str, Any]) -> list[str]:
    """Return what of a configuration PEFT itself has not, in one line."""
    others = [
        quoted(option)
        for option in _set_but_unread(config)
        if not (option in _UNREAD or option.startswith("use_") or option.endswith("_config"))
    ]
    if not others:
        return []
    return [f"{PEFT_CONFIG} has {', '.join(others[:5])}, which PEFT has not: not read"]


def _set_but_unread(config: Mapping[str, Any]) -> list[str]:
    return [
        option
        for option, value in config.items()
        if option not in _READ | _WITHOUT_EFFECT
        and (any(value) if isinstance(value, list) else value)
    ]


def peft_alphas(
    config: Mapping[str, Any], layers: Collection[str]
) -> tuple[dict[str, float], list[str]]:
    """Return alpha of each layer by the first of PEFT's patterns that fits it, and problems."""
    return _by_pattern(config, "alpha_pattern", float(config.get("lora_alpha") or 0.0), layers)


def peft_ranks(
    config: Mapping[str, Any], layers: Collection[str]
) -> tuple[dict[str, float], list[str]]:
    """Return the rank that the configuration gives each layer, and problems."""
    return _by_pattern(config, "rank_pattern", float(config.get("r") or 0), layers)


def rank_problems(config: Mapping[str, Any], downs: Mapping[str, Tensor]) -> list[str]:
    """Return where the configuration gives a layer another rank than its A [rank, ...] has."""
    if not config:
        return []
    ranks, problems = peft_ranks(config, downs)
    return problems + [
        f"{layer} has rank {len(down)}; {PEFT_CONFIG} gives it {ranks[layer]:g}"
        for layer, down in downs.items()
        if down.ndim and len(down) != ranks[layer]
    ]


def _by_pattern(
    config: Mapping[str, Any], key: str, usual: float, layers: Collection[str]
) -> tuple[dict[str, float], list[str]]:
    patterns: Mapping[str, float] = config.get(key) or {}
    values = dict.fromkeys(layers, usual)
    matched = match_names(list(patterns), list(layers), suffixes=True)
    problems = [
        f"{key} has {quoted(pattern)}, which {found.problem}"
        for pattern, found in zip(patterns, matched, strict=True)
        if found.problem
    ]
    for value, found in reversed(list(zip(patterns.values(), matched, strict=True))):
        values.update(dict.fromkeys(found.names, float(value)))
    return values, problems


def peft_scaling(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    """Return alpha/rank (or alpha/sqrt(rank)) of a layer."""
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
