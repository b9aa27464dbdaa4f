"""How another tool's model is brought in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What a reader is told beyond what the files say."""

    RARE: ClassVar[frozenset[str]] = frozenset({"gptq_zeros", "dequantised_dtype"})

    dequantise: bool = False
    """Write every quantised weight as the float that it stands for: a plain folder, and the way in
    for what no format here holds, such as K-quants, FP8 or groups in activation order."""
    dequantised_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What --dequantise writes; float32 holds every quantised weight exactly, the others halve the
    size and round."""
    text_part: bool = False
    """Take the text part of a model that takes pictures or sound too, as a model by itself: graft
    trains and exports text."""
    gptq_zeros: Literal["v1", "v2"] | None = None
    """How GPTQ's zero points are stored, whatever the folder says: minus one (v1) or as they are
    (v2)."""
