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


def method_of(config: AdapterConfig) -> Method:
    """Return the method that a configuration names; raises GraftError when there is none."""
    for (name, flag), variant in _BY_FLAG.items():
        if config.method == name and getattr(config, flag):
            return METHODS[variant]
    return METHODS[config.method]


def settings_of(method: Method) -> dict[str, Any]:
    """Return the fields of `AdapterConfig` that ask for a method."""
    for (name, flag), variant in _BY_FLAG.items():
        if method.name == variant:
            return {"method": name, flag: True}
    return {"method": method.name}


def refusal(method: Method, option: str) -> str | None:
    """Return why a method does not take an option of `AdapterConfig` that others take, or None."""
    takers = [one for one in METHODS.values() if option in one.takes]
    if not takers or option in method.takes:
        return None
    flag, names = option.replace("_", "-"), sorted({settings_of(one)["method"] for one in takers})
    why = next((f" ({one.whys[option]})" for one in takers if option in one.whys), "")
    return f"--{flag} belongs to {' and '.join(names)}, not to {method.name}; drop it" + why.format(
        method.name
    )


def method_of_files(own: str | None, peft: Mapping[str, Any]) -> Method:
    """Return the method whose adapter some files hold; see `Method.reads`.

    The later a method stands in the table, the more special it is, and the sooner it is asked.
    """
    methods = METHODS.values()
    on_quantised = {method.on_quantised for method in methods}  # their files do not tell the base
    for method in reversed(methods):
        if method.name not in on_quantised and method.reads(own, peft):
            return method
    raise GraftError(METHODS.problem(str(own)) or f"no method reads an adapter of {own!r}")
