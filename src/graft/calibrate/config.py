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
    """rtn: round each weight to the nearest value, data-free; gptq: round column by column and let
    the columns that follow make up for the error on calibration text (arXiv 2210.17323); qep: gptq,
    but each weight first makes up for half of what rounding the layers before has done to its
    inputs (2504.09629); hqq: fit the offsets of the int format to a sparse error, data-free. The
    default is qep for method merge_aware, gptq for qalora and affine at 2 and 3 bits, else rtn."""
    calibration_rows: int = 128
    """Rows of the data that gptq and qep calibrate on, and that --bits auto measures layers on."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean (gptq, qep)."""
