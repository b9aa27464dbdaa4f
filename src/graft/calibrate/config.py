"""How the codes of the quantised weights are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from graft.calibrate.registry import SOLVERS


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """The solver that rounds the base model's weights, and what it may look at."""

    GROUP: ClassVar[str] = "quantisation"
    RARE: ClassVar[frozenset[str]] = frozenset({"calibration_rows", "damping"})

    solver: Annotated[str, SOLVERS] | None = None
    """What chooses the codes. The default is the method's."""
    calibration_rows: int = 128
    """Rows of the data that gptq and qep calibrate on, and that --bits auto measures layers on."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean (gptq, qep)."""
