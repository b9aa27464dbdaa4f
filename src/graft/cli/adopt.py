"""`graft adopt`: its flags, and what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import tyro
from rich.console import Console

from graft.adapters.config import method_in_words
from graft.cli.flags import parse


@dataclass(frozen=True, kw_only=True)
class AdoptArguments:
    """Make a run of an adapter that PEFT trained; nothing is trained."""

    adapter: tyro.conf.Positional[str]
    """Folder with PEFT's adapter_config.json and adapter_model.safetensors."""
    out: str
    """Folder of the run, made new."""
    model: str | None = None
    """The base: a model folder, a folder that graft quantised, or a hub id; default: the one that
    the adapter names."""
    format: Literal["nf4", "fp4", "int8"] | None = None
    """Round the base's linear layers as bitsandbytes does (for an adapter that was trained so)."""
    double_quant: bool = False
    """Quantise the constants of nf4 and fp4 too, as bnb_4bit_use_double_quant does."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision of the run."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings along."""


def adopt(words: Sequence[str]) -> None:
    """Graft adopt ADAPTER --out RUN [--model BASE] [--format nf4 [--double-quant]]."""
    arguments = parse(AdoptArguments, words, "adopt", AdoptArguments.__doc__ or "")
    from graft.api.adopt import adopt as run
    from graft.cli.progress import TerminalEvents

    with TerminalEvents(Console(stderr=True)) as events:
        report = run(**asdict(arguments), events=events)
    kind = method_in_words(report.method, report.dora)
    print(
        f"{arguments.out}: {kind}, {report.parameters:,} parameters in {report.layers} layers, "
        f"on {report.model}"
    )
    print(f"next: graft export {arguments.out} --to gguf --out {arguments.out}.gguf")
