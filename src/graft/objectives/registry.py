"""The objectives that a training may have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.entries import Entries, Listed

if TYPE_CHECKING:
    from graft.objectives.base import Objective

OBJECTIVES: Entries[Objective] = Entries(
    "objective",
    {
        "next_token": Listed(
            "graft.objectives.next_token:NEXT_TOKEN", "each trained token from those before it"
        ),
    },
)

DEFAULT_OBJECTIVE = "next_token"
