"""The starts by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.entries import Entries, Listed

if TYPE_CHECKING:
    from graft.adapters.starts.base import Start

STARTS: Entries[Start] = Entries(
    "start",
    {
        "default": Listed("graft.adapters.starts.base:DEFAULT", "as no update at all"),
        "loftq": Listed(
            "graft.adapters.starts.loftq:LOFTQ",
            "as the low-rank part of what rounding takes from the weights (arXiv 2310.08659)",
        ),
    },
)
