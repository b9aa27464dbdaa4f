"""Rows of one key, `text`, all of which is trained; a prompt is a text that is not finished."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from graft.data.shapes.base import Rendered, RowShape, Tokenizer

PART = 2**20
"""Characters of a text that are tokenised at once."""

_LINE = re.compile(r"\n(\S)")


class TextShape(RowShape):
    """{"text": ...}."""

    name = "text"
    required = ("text",)
    is_document = True
    has_prompts = False

    def render(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> Rendered:
        """Render the text, which is trained from its beginning."""
        text = fields["text"]
        return Rendered(text, ((0, len(text)),), seams=tuple(_seams(text)))

    def render_prompt(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> str:
        """Return the text as it is."""
        text: str = fields["text"]
        return text


def _seams(text: str) -> Iterator[int]:
    """Yield where a long text is cut to be tokenised in parts: between lines, or else words."""
    begin = 0
    while len(text) - begin > PART:
        part = text[begin : begin + PART]
        # Behind a newline and before a space no token of any common kind goes on.
        found = max((match.start(1) for match in _LINE.finditer(part, PART // 2)), default=0)
        found = found or part.rfind(" ", PART // 2)
        begin += found if found > 0 else PART
        yield begin


TEXT = TextShape()
