"""Round to nearest: the format's own `pack`."""

from __future__ import annotations

from graft.calibrate.base import Solver
from graft.formats.base import WeightFormat


class RoundToNearest(Solver):
    """Each weight by itself to the nearest value of its format."""

    name = "rtn"

    def problem(self, weight_format: WeightFormat | None) -> str | None:
        """Return None: every format can be rounded to, and a dense model is left as it is."""
        return None


RTN = RoundToNearest()
