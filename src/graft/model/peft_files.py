"""PEFT's files of a LoRA: its names of tensors, its configuration, and what of it is not read.

What is read goes by the tensors that there are. Options that only say which layers PEFT adapted
(target_modules, exclude_modules, layers_to_transform) or how a training began need nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from graft.adapters.base import Adapter
from graft.errors import GraftError, raise_problems
from graft.files.read import read_json, typed
from graft.layers.frozen import FrozenLinear
from graft.patterns import match_names
from graft.text import quoted

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNREAD_OPTIONS = (
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
)
_VARIANTS = ("use_dora", "use_qalora")
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
    layers: Mapping[str, tuple[FrozenLinear, Adapter]], base: str, as_lora: bool
) -> dict[str, Any] | None:
    """Return adapter_config.json of low-rank adapters by layer; None where PEFT cannot hold them.

    It has one group size for all layers. as_lora: their tensors are written as those of an ordinary
    LoRA. Raises GraftError for kinds of adapters that neither PEFT nor our own form can mix.
    """
    first_base, first = next(iter(layers.values()))
    settings = first.peft_settings(as_lora)
    others = [adapter.peft_settings(as_lora) for _, adapter in layers.values()]
    kinds = {type(adapter).__name__ for _, adapter in layers.values()}
    if len(kinds) > 1:
        raise GraftError(f"its layers carry {' and '.join(sorted(kinds))}; PEFT holds one kind")
    if len({one.get("qalora_group_size") for one in others}) > 1 and not as_lora:
        return None
    ranks = {name: adapter.get_parameter("A").shape[0] for name, (_, adapter) in layers.items()}
    alphas: dict[str, float] = {
        name: (adapter.scaling or 0.0) * ranks[name] / adapter.peft_factor(base_layer, as_lora)
        for name, (base_layer, adapter) in layers.items()
    }
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
        "fan_in_fan_out": first_base.transposed,
        "target_modules": list(layers),
        "init_lora_weights": True,
        "use_qalora": False,
        "qalora_group_size": 16,
    } | settings


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
    for option in _UNREAD_OPTIONS:
        if config.get(option):
            problems.append(f"{option} is set, which is not read")
    initialisation = str(config.get("init_lora_weights"))
    if initialisation.lower().startswith(_BASE_CHANGING):
        problems.append(
            f"init_lora_weights is {quoted(initialisation)}, which changed the base it was trained "
            "on; save it again with PEFT's path_initial_model_for_weight_conversion"
        )
    if (config.get("bias") or "none") != "none":
        problems.append(f"bias is {quoted(config['bias'])}; only 'none' (and lora_bias) is read")
    if not 0 <= (config.get("lora_dropout") or 0.0) < 1:
        problems.append(
            f"lora_dropout is {config['lora_dropout']!r}; expected 0 up to, but not including, 1"
        )
    variants = [one for one in _VARIANTS if config.get(one)]
    if len(variants) > 1:
        problems.append(f"{' and '.join(variants)} are both set, which PEFT itself has not")
    return problems


def peft_alphas(
    config: Mapping[str, Any], layers: Collection[str]
) -> tuple[dict[str, float], list[str]]:
    """Return alpha of each layer by the first of PEFT's patterns that fits it, and problems."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alphas = dict.fromkeys(layers, float(config.get("lora_alpha") or 0.0))
    matched = match_names(list(patterns), list(layers), suffixes=True)
    problems = [
        f"alpha_pattern has {quoted(pattern)}, which {found.problem}"
        for pattern, found in zip(patterns, matched, strict=True)
        if found.problem
    ]
    for alpha, found in reversed(list(zip(patterns.values(), matched, strict=True))):
        alphas.update(dict.fromkeys(found.names, float(alpha)))
    return alphas, problems


def peft_scaling(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    """Return alpha/rank (or alpha/sqrt(rank)) of a layer."""
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
