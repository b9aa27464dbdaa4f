"""The shapes that a row may have: the one whose required keys are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.entries import Entries, Listed

if TYPE_CHECKING:
    from graft.data.shapes.base import RowShape

SHAPES: Entries[RowShape] = Entries(
    "kind of rows",
    {
        "text": Listed("graft.data.shapes.text:TEXT", "a text, all of which is trained"),
        "prompt": Listed("graft.data.shapes.prompt:PROMPT", "a prompt and its completion"),
        "instruction": Listed(
            "graft.data.shapes.instruction:INSTRUCTION", "an instruction and its output"
        ),
        "messages": Listed("graft.data.shapes.messages:MESSAGES", "a conversation"),
        "prompt_pair": Listed(
            "graft.data.shapes.judged:PROMPT_PAIR", "a prompt, a chosen and a rejected completion"
        ),
        "instruction_pair": Listed(
            "graft.data.shapes.judged:INSTRUCTION_PAIR",
            "an instruction, a chosen and a rejected output",
        ),
        "messages_pair": Listed(
            "graft.data.shapes.judged:MESSAGES_PAIR",
            "a conversation with a chosen and a rejected end",
        ),
        "prompt_labelled": Listed(
            "graft.data.shapes.judged:PROMPT_LABELLED",
            "a prompt, its completion, and whether that is wanted",
        ),
        "messages_labelled": Listed(
            "graft.data.shapes.judged:MESSAGES_LABELLED",
            "a conversation, and whether its answers are wanted",
        ),
    },
)

PLAIN = "text"
"""Prompts to a model of which nothing is known: they go as they are."""
CHAT = "messages"
"""Prompts to a model of which no more is known than that it has a chat template."""
