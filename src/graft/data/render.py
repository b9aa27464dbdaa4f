"""Rendering: a row becomes one text and the character spans in it that are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft.data.rows import Row
from graft.data.shapes.base import Rendered, Tokenizer
from graft.data.shapes.registry import SHAPES
from graft.errors import GraftError


def render_row(kind: str, row: Row, tokenizer: Tokenizer, separator: str) -> Rendered:
    """Render a checked row; the text up to each span is what generation will be prompted with.

    Raises GraftError when the chat template refuses the messages or rewrites earlier turns, and
    when a shape's prompt is not what stands before its answer.
    """
    shape = SHAPES[kind]
    rendered = shape.render(row.fields, tokenizer, separator)
    # A conversation looks at this itself, where it renders each of its answers.
    if shape.has_prompts and not shape.is_conversation and rendered.spans:
        prompt = shape.prompt(row.fields, tokenizer, separator)
        if rendered.text[: rendered.spans[0][0]] != prompt:
            raise GraftError(
                f"{shape.article} {kind} row is trained on another beginning than its prompt, so "
                "the model would be asked what it was not taught; the shape's render and "
                "render_prompt must agree"
            )
    return rendered


def render_prompt(
    kind: str, fields: str | Mapping[str, Any], tokenizer: Tokenizer, separator: str
) -> str:
    """Render a prompt exactly as training rendered what stands before the trained part.

    A string stands for the row's text, prompt, instruction (without input) or single user
    message; a mapping holds the row's keys, those of the answer are not read.

    Raises GraftError when a key is missing or the chat template refuses the messages.
    """
    return SHAPES[kind].prompt(fields, tokenizer, separator)


def render_opening(
    kind: str, fields: str | Mapping[str, Any], tokenizer: Tokenizer, separator: str
) -> Rendered:
    """Return `render_prompt` with the places in it that no token straddles; raises as it does."""
    return SHAPES[kind].opening(fields, tokenizer, separator)
