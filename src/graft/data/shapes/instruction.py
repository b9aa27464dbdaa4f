"""Rows of `instruction`, `output` and perhaps `input`, under Alpaca's headings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft.data.shapes.base import AnsweredShape, Continuation, Tokenizer


class InstructionShape(AnsweredShape):
    """{"instruction": ..., "input": ..., "output": ...}."""

    name = "instruction"
    article = "an"
    required = ("instruction", "output")
    optional = ("input",)
    answer = "output"

    def render_prompt(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> str:
        """Return instruction and input under their headings, and the heading of the response."""
        given = f"### Input:\n{fields['input']}\n\n" if fields.get("input") else ""
        return f"### Instruction:\n{fields['instruction']}\n\n{given}### Response:\n"

    def continuation(self, fields: Mapping[str, Any]) -> Continuation:
        """Show the input, which differs from row to row as the instruction may not."""
        return Continuation(fields, fields["input"] or fields["instruction"], fields["output"])


INSTRUCTION = InstructionShape()
