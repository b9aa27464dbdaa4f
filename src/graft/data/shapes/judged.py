"""Rows of preferences: a chosen and a rejected answer to a prompt, or an answer and a judgement.

Each is a row of another shape (prompt, instruction, messages) with more beside it, and is rendered,
asked and continued as that shape's rows are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graft.data.shapes.base import (
    AnsweredShape,
    Continuation,
    Rendered,
    RowShape,
    Tokenizer,
    type_in_words,
)
from graft.data.shapes.instruction import INSTRUCTION
from graft.data.shapes.messages import MESSAGES
from graft.data.shapes.prompt import PROMPT
from graft.errors import GraftError

REJECTED, LABEL = "rejected", "label"
"""The keys beside those of the other shape: a row of that shape, and true or false."""


class _Beside(RowShape):
    """A row of another shape, `of`, with one key more."""

    def __init__(self, of: RowShape) -> None:
        self.of = of
        self.article = of.article
        self.is_conversation = of.is_conversation
        self.uses_separator = of.uses_separator
        self.optional = of.optional

    def asked(self, text: str) -> dict[str, Any]:
        """Return the keys of a prompt that is nothing but a text."""
        return self.of.asked(text)

    def opening(
        self, given: str | Mapping[str, Any], tokenizer: Tokenizer, separator: str
    ) -> Rendered:
        """Return the prompt with the seams that training has before an answer."""
        return self.of.opening(given, tokenizer, separator)

    def render_prompt(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> str:
        """Render the prompt, which is that of the other shape."""
        return self.of.render_prompt(fields, tokenizer, separator)

    def continuation(self, fields: Mapping[str, Any]) -> Continuation:
        """Return the prompt, and the answer of the row: of two the chosen one."""
        return self.of.continuation(self.of.fields(fields))


class PairShape(_Beside):
    """A row of another shape, whose answer is chosen, and under `rejected` another such row."""

    holds = "pairs"

    def __init__(self, of: RowShape) -> None:
        super().__init__(of)
        self.name = f"{of.name}_pair"
        self.required = (of.required[0], "chosen", REJECTED)

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the chosen row's fields and, under `rejected`, those of the other."""
        return {**self.of.fields(row), REJECTED: self.of.fields(row[REJECTED])}

    def problems(self, fields: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with either side, and whether both are the same."""
        chosen, rejected = self.of.fields(fields), fields[REJECTED]
        found = self.of.problems(chosen)
        answer = repr(self.of.answer) if isinstance(self.of, AnsweredShape) else ""
        for one in self.of.problems(rejected):
            if answer and one.startswith(answer):
                found.append(repr(REJECTED) + one.removeprefix(answer))
            elif one not in found:
                found.append(f"{REJECTED!r}: {one}")
        if not found and chosen == rejected:
            found.append(f"{REJECTED!r} is the same as 'chosen'; remove the row")
        return found

    def render(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> Rendered:
        """Render both sides; raises GraftError where they do not begin with the same prompt."""
        chosen = self.of.render(self.of.fields(fields), tokenizer, separator)
        rejected = self.of.render(fields[REJECTED], tokenizer, separator)
        if _asked(chosen) != _asked(rejected):
            raise GraftError(
                "the chosen and the rejected answer are not rendered behind the same prompt, so "
                "their probabilities cannot be compared; give both the same messages before them"
            )
        remarks = tuple(dict.fromkeys((*chosen.remarks, *rejected.remarks)))
        values = {"wanted": [True, False]}
        return replace(chosen, values=values, remarks=remarks, others=(rejected,))


class LabelledShape(_Beside):
    """A row of another shape and, under `label`, whether its answer is a wanted one."""

    holds = "judgements"

    def __init__(self, of: RowShape) -> None:
        super().__init__(of)
        self.name = f"{of.name}_labelled"
        self.required = (*of.required, LABEL)
        self.may_be_empty = of.may_be_empty

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row's fields and its label."""
        return {**self.of.fields(row), LABEL: row[LABEL]}

    def problems(self, fields: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with the row, or its label."""
        found = self.of.problems(self.of.fields(fields))
        if not isinstance(fields[LABEL], bool):
            found.append(f"{LABEL!r} is {type_in_words(fields[LABEL])}; expected true or false")
        return found

    def render(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> Rendered:
        """Render the row; its label goes to the objective."""
        found = self.of.render(self.of.fields(fields), tokenizer, separator)
        return replace(found, values={"wanted": [fields[LABEL]]})


def _asked(row: Rendered) -> str:
    """Return what stands before the first answer that is trained."""
    return row.text[: row.spans[0][0]]


PROMPT_PAIR, INSTRUCTION_PAIR = PairShape(PROMPT), PairShape(INSTRUCTION)
MESSAGES_PAIR = PairShape(MESSAGES)
PROMPT_LABELLED, MESSAGES_LABELLED = LabelledShape(PROMPT), LabelledShape(MESSAGES)
