"""The solvers by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.entries import Entries, Listed

if TYPE_CHECKING:
    from graft.calibrate.base import Solver

SOLVERS: Entries[Solver] = Entries(
    "solver",
    {
        "rtn": Listed(
            "graft.calibrate.rtn:RTN", "round each weight to the nearest value, data-free"
        ),
        "gptq": Listed(
            "graft.calibrate.gptq:GPTQ",
            "round column by column and let the columns that follow make up for the error on "
            "calibration text (arXiv 2210.17323)",
        ),
        "qep": Listed(
            "graft.calibrate.qep:QEP",
            "gptq, but each weight first makes up for half of what rounding the layers before has "
            "done to its inputs (2504.09629)",
        ),
        "hqq": Listed(
            "graft.calibrate.hqq:HQQ",
            "fit the offsets of the int format to a sparse error, data-free",
        ),
    },
)
