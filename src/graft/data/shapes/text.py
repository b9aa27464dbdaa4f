"""Rows of one key, `text`, all of which is trained; a prompt is a text that is not finished."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft.data.shapes.base import Rendered, RowShape, Tokenizer


class TextShape(RowShape):
    """{"text": ...}."""

    name = "text"
    required = ("text",)
    has_prompts = False

    def render(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> Rendered:
        """Render the text, which is trained from its beginning."""
        text = fields["text"]
        return Rendered(text, ((0, len(text)),))

    def render_prompt(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> str:
        """Return the text as it is."""
        text: str = fields["text"]
        return text


TEXT = TextShape()
