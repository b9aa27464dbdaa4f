"""The methods by name, and how a configuration or a file says which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graft.entries import Entries, Listed
from graft.errors import GraftError

if TYPE_CHECKING:
    from graft.adapters.config import AdapterConfig
    from graft.adapters.method import Method

METHODS: Entries[Method] = Entries(
    "method",
    {
        "lora": Listed("graft.adapters.lora:LORA", "LoRA on the weights as they are"),
        "qlora": Listed("graft.adapters.lora:QLORA", "LoRA on 4-bit NormalFloat"),
        "qalora": Listed(
            "graft.adapters.qalora:QALORA",
            "group-pooled LoRA and moves of the scales, which merge exactly into INT4",
        ),
        "affine": Listed("graft.adapters.affine:AFFINE", "scales and offsets of INT4"),
        "merge_aware": Listed(
            "graft.adapters.merge_aware:MERGE_AWARE",
            "LoRA inside the rounding of the deployed grid (INT4, or --format nf4)",
        ),
        "full": Listed("graft.adapters.full:FULL", "all weights"),
        "dora": Listed("graft.adapters.dora:DORA", "lora with --dora"),
        "qdora": Listed("graft.adapters.dora:QDORA", "qlora with --dora"),
    },
)

_BY_FLAG = {("lora", "dora"): "dora", ("qlora", "dora"): "qdora"}
"""What a flag makes of a method."""

VARIANTS = frozenset(_BY_FLAG.values())
"""Methods that are another one with a flag."""


def method_of(config: AdapterConfig) -> Method:
    """Return the method that a configuration names; raises GraftError when there is none."""
    for (name, flag), variant in _BY_FLAG.items():
        if config.method == name and getattr(config, flag):
            return METHODS[variant]
    return METHODS[config.method]


def method_of_files(own: str | None, peft: Mapping[str, Any]) -> Method:
    """Return the method whose adapter some files hold; see `Method.reads`."""
    for method in METHODS.values():
        if method.reads(own, peft):
            return method
    raise GraftError(METHODS.problem(str(own)) or f"no method reads an adapter of {own!r}")
