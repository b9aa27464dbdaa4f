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
        "dpo": Listed("graft.objectives.dpo:DPO", "the chosen answer rather than the rejected one"),
        "orpo": Listed(
            "graft.objectives.orpo:ORPO", "the chosen answer, at better odds than the rejected one"
        ),
        "kto": Listed(
            "graft.objectives.kto:KTO", "answers that are wanted, and not those that are not"
        ),
        "distill": Listed(
            "graft.objectives.distill:DISTILL", "the next token, and what a teacher thinks of it"
        ),
    },
)

DEFAULT_OBJECTIVE = "next_token"
