"""Rows of one key, `messages`: a conversation, rendered by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft.data.chat import (
    answer_problems,
    chat_opening,
    chat_prompt,
    message_problems,
    render_chat,
)
from graft.data.shapes.base import Continuation, Rendered, RowShape, Tokenizer


class MessagesShape(RowShape):
    """{"messages": [{"role": ..., "content": ...}, ...]}."""

    name = "messages"
    required = ("messages",)
    is_conversation = True

    def problems(self, fields: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with the messages, or with who speaks when."""
        messages = fields["messages"]
        return message_problems(messages) or answer_problems(messages)

    def render(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> Rendered:
        """Render up to the last answer; every answer is trained, with its end-of-turn token."""
        return render_chat(fields["messages"], tokenizer)

    def asked(self, text: str) -> dict[str, Any]:
        """Return the text as the one message of a user."""
        return {"messages": [{"role": "user", "content": text}]}

    def render_prompt(self, fields: Mapping[str, Any], tokenizer: Tokenizer, separator: str) -> str:
        """Return the messages as the template renders them, and its opening of an answer."""
        return chat_prompt(fields["messages"], tokenizer)

    def opening(
        self, given: str | Mapping[str, Any], tokenizer: Tokenizer, separator: str
    ) -> Rendered:
        """Return the prompt, with both ends of each answer in it."""
        return chat_opening(self.given(given)["messages"], tokenizer)

    def continuation(self, fields: Mapping[str, Any]) -> Continuation:
        """Ask for the last answer, and show the message before it."""
        messages = fields["messages"]
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        before = {"messages": messages[:last]}
        return Continuation(before, messages[last - 1]["content"], messages[last]["content"])


MESSAGES = MessagesShape()
