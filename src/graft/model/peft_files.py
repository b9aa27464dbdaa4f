"""PEFT's files of a LoRA: its names of tensors, its configuration, and what of it is not read.

What is read goes by the tensors that there are. Options that only say which layers PEFT adapted
(target_modules, exclude_modules, layers_to_transform) or how a training began need nothing here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from graft.adapters.base import Adapter
from graft.errors import GraftError
from graft.layers.frozen import FrozenLinear

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
    problem = f"tensor {key} belongs to no linear layer of this model"
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


def peft_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what a PEFT configuration asks for that is not read here."""
    problems = []
    if config and config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}; only LORA is read")
    for option in _UNREAD_OPTIONS:
        if config.get(option):
            problems.append(f"{option} is set, which is not read")
    initialisation = str(config.get("init_lora_weights"))
    if initialisation.lower().startswith(_BASE_CHANGING):
        problems.append(
            f"init_lora_weights is {initialisation!r}, which changed the base it was trained on; "
            "save it again with PEFT's path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}; only 'none' (and lora_bias) is read")
    patterns = (config.get("alpha_pattern") or {}).items()
    problems += [found for one in patterns if (found := _pattern_problem(*one))]
    dropout = config.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout is {dropout!r}; expected 0 up to, but not including, 1")
    variants = [one for one in _VARIANTS if config.get(one)]
    if len(variants) > 1:
        problems.append(f"{' and '.join(variants)} are both set, which PEFT itself has not")
    return problems


def _pattern_problem(pattern: str, alpha: object) -> str | None:
    """Return what hinders in an entry of alpha_pattern."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"alpha_pattern has {pattern!r}, which is no pattern: {error}"
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        return f"alpha_pattern has {alpha!r} for {pattern!r}; expected a number"
    return None


def peft_scaling(config: Mapping[str, Any], layer_name: str, rank: int) -> float:
    """Return alpha/rank (or alpha/sqrt(rank)) of a layer, with PEFT's per-layer patterns."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        fits = not _pattern_problem(pattern, value)  # else it is told
        if fits and re.match(rf"(.*\.)?({pattern})$", layer_name):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
