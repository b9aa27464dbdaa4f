"""Which model, and where and in what precision it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class TrustConfig:
    """What only the caller may allow: no file that is read can turn it on."""

    GROUP: ClassVar[str] = "model and machine"
    RARE: ClassVar[frozenset[str]] = frozenset({"trust_remote_code"})

    trust_remote_code: bool = False
    """Run Python code that the model's folder brings along. Off unless you trust its author; a flag
    alone turns it on, never a file."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(TrustConfig):
    """The base model and how it computes."""

    GROUP: ClassVar[str] = "model and machine"

    model: str
    """Folder of a Hugging Face model (safetensors), or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision; auto is float32 for a float32 checkpoint, and for a 16-bit one bfloat16
    where the machine computes in it, else float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes CUDA, then MPS, then the CPU."""
