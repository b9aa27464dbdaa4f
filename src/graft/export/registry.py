"""The table of export targets, which imports none of them, and finding the one of a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graft.entries import Entries, Listed
from graft.errors import GraftError

if TYPE_CHECKING:
    from graft.export.base import Target

TARGETS: Entries[Target] = Entries(
    "export target",
    {
        "gguf": Listed("graft.export.gguf.target:GGUF", "llama.cpp"),
        "ollama": Listed("graft.export.ollama.target:OLLAMA", "the same file and a Modelfile"),
        "mlx": Listed("graft.export.mlx.target:MLX", "mlx-lm"),
        "onnx": Listed("graft.export.onnx.target:ONNX", "ONNX Runtime"),
        "openvino": Listed("graft.export.openvino.target:OPENVINO", "OpenVINO"),
        "hf": Listed("graft.export.hf.target:HF", "Transformers, dequantised"),
        "peft": Listed(
            "graft.export.peft.target:PEFT",
            "the adapter alone (of lora, qlora, and qalora with --grid-rank 0)",
        ),
    },
)
"""In the order in which they are listed, and in which `target_of` asks them."""


def target_of(path: Path) -> Target:
    """Return the target that a file or folder was exported to, the first that matches it.

    Raises GraftError where none does.
    """
    runnable = [target for target in TARGETS.values() if target.runtime is not None]
    for target in runnable:
        if target.matches(path):
            return target
    files = [f"a {target.suffix} file" for target in runnable if target.suffix]
    *folders, last = [target.name for target in runnable if not target.suffix]
    raise GraftError(
        f"{path}: not a file that graft exports to a runtime; expected {', '.join(files)} or the "
        f"folder of --to {', '.join(folders)} or {last}"
    )
