"""Rows of `messages`: a conversation, rendered by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft.data.chat import chat_opening, render_chat
from graft.data.conversations.messages import answer_problems, read_conversation, shown_text
from graft.data.shapes.base import Continuation, Rendered, RowShape, Tokenizer


class MessagesShape(RowShape):
    """{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}."""

    name = "messages"
    required = ("messages",)
    optional = ("tools", "functions", "chat_template_kwargs")
    is_conversation = True

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the messages, and those of the other keys that the row has."""
        keys = (key for key in self.optional if row.get(key) is not None)
        return {key: row[key] for key in (*self.required, *keys)}

    def problems(self, fields: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with the messages, or with who speaks when."""
        found, problems = read_conversation(fields)
        return problems or answer_problems(found)

    def render(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> Rendered:
        """Render up to the last trained answer, each with its end-of-turn token."""
        return render_chat(fields, tokenizer)

    def asked(self, text: str) -> dict[str, Any]:
        """Return the text as the one message of a user."""
        return {"messages": [{"role": "user", "content": text}]}

    def render_prompt(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> str:
        """Return the messages as the template renders them, and its opening of an answer."""
        return chat_opening(fields, tokenizer).text

    def opening(
        self, given: str | Mapping[str, Any], tokenizer: Tokenizer, separator: str
    ) -> Rendered:
        """Return the prompt, with both ends of each answer in it."""
        return chat_opening(self.given(given), tokenizer)

    def continuation(self, fields: Mapping[str, Any]) -> Continuation:
        """Ask for the last trained answer, and show the message before it."""
        found, _ = read_conversation(fields)
        last = found.turns[-1]
        before = {**fields, "messages": fields["messages"][:last]}
        asked, answer = found.messages[last - 1], found.messages[last]
        return Continuation(before, shown_text(asked), shown_text(answer))


MESSAGES = MessagesShape()
