"""Rows of `prompt` and `completion`, joined by --separator where the prompt ends in no space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft.data.shapes.base import AnsweredShape, Tokenizer


class PromptShape(AnsweredShape):
    """{"prompt": ..., "completion": ...}."""

    name = "prompt"
    required = ("prompt", "completion")
    answer = "completion"
    may_be_empty = ("prompt",)
    uses_separator = True

    def render_prompt(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> str:
        """Return the prompt, and the separator behind one that does not end in white space."""
        text: str = fields["prompt"]
        return text + separator if text and not text[-1].isspace() else text


PROMPT = PromptShape()
