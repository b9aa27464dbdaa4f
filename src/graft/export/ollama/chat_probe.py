"""A tokenizer's chat template as Ollama's: found by rendering conversations, and checked so.

A Jinja template is a program, and no translation of it to Go's templates is attempted. What is
used of it is its output: the text that it writes between the contents of two messages. Where that
depends on the two roles alone, six such texts are the whole template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graft.errors import GraftError
from graft.export.ollama.go_template import go_text, render_go
from graft.text import quoted

Render = Callable[[Sequence[dict[str, str]]], str]
"""From messages, the last a user's, to the text that asks for an answer."""

_INSTEAD = "export with --to gguf: llama.cpp takes the template as it is"
_ROLES = ("u", "su", "uau", "suau", "uauau", "suauau")
"""Conversations by their roles; Ollama asks for an answer behind a user's message only."""
_NAMES = {"s": "system", "u": "user", "a": "assistant"}
_PLAIN = ("Zeroth", "First one", "2nd", "The third,\nin two lines", "4: {{ x }} ü", "fifth")
_SPACED = tuple(f"  {text}\n" for text in _PLAIN)
_THOUGHTS = tuple(f"<think>\nwell\n</think>\n\n{text}" for text in _PLAIN)


@dataclass(frozen=True)
class ChatJoints:
    """What a chat template writes before, between and behind the contents of messages."""

    start_user: str
    user_assistant: str
    assistant_user: str
    user_end: str
    start_system: str | None = None
    system_user: str | None = None
    """None, as the one above: there is no system message."""

    def without_start(self, bos: str) -> ChatJoints:
        """Return the same without what a conversation begins with."""
        system = self.start_system
        return dataclasses.replace(
            self,
            start_user=self.start_user.removeprefix(bos),
            start_system=None if system is None else system.removeprefix(bos),
        )

    def go_template(self) -> str:
        """Return the template in Go's syntax, over System and Messages."""
        first = go_text(self.start_user)
        if self.start_system is not None and self.system_user is not None:
            system = f"{go_text(self.start_system)}{{{{ .System }}}}{go_text(self.system_user)}"
            first = f"{{{{ if .System }}}}{system}{{{{ else }}}}{first}{{{{ end }}}}"
        return (
            first
            + '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}'
            + '{{ else if eq .Role "assistant" }}'
            + f"{go_text(self.user_assistant)}{{{{ .Content }}}}{go_text(self.assistant_user)}"
            + "{{ end }}{{ end }}"
            + go_text(self.user_end)
        )


def chat_joints(render: Render) -> ChatJoints:
    """Return the joints of a chat template; raises GraftError when it is not made of such."""
    start_user, user_assistant, assistant_user, user_end = _pieces(render, "uau")
    joints = ChatJoints(start_user, user_assistant, assistant_user, user_end)
    try:
        start_system, system_user, _ = _pieces(render, "su")
    except GraftError:
        return joints
    return dataclasses.replace(joints, start_system=start_system, system_user=system_user)


def checked_template(joints: ChatJoints, render: Render, bos: str) -> tuple[str, tuple[str, ...]]:
    """Return Ollama's template, and notes on what it does otherwise with rare contents.

    bos: what `render` may begin with and the joints do not.

    Raises GraftError when the template does more than write texts between messages.
    """
    template = joints.go_template()

    def differing(texts: Sequence[str]) -> list[tuple[str, str, str]]:
        cases = []
        for roles in _ROLES:
            if "s" in roles and joints.start_system is None:
                continue
            messages = conversation(roles, texts)
            found, expected = render_chat(template, messages), render(messages).removeprefix(bos)
            if found != expected:
                cases.append((roles, found, expected))
        return cases

    wrong = differing(_PLAIN)
    if wrong and all("s" in roles for roles, _, _ in wrong):
        return checked_template(
            dataclasses.replace(joints, start_system=None, system_user=None), render, bos
        )
    if wrong:
        roles, found, expected = wrong[0]
        raise GraftError(
            "the chat template does not write the same between any two messages: with "
            f"{', '.join(_NAMES[role] for role in roles)} it gives {quoted(expected)}, where its "
            f"parts give {quoted(found)}; Ollama's templates cannot do that; {_INSTEAD}"
        )
    notes = []
    if joints.start_system is None:
        notes.append(
            "Ollama's system message is left out: the chat template takes none, or writes it "
            "elsewhere than before the first message"
        )
    if differing(_SPACED):
        notes.append("the chat template strips white space around messages, Ollama's does not")
    if differing(_THOUGHTS):
        notes.append("the chat template leaves out earlier thoughts (<think>), Ollama's does not")
    return template, tuple(notes)


def conversation(roles: str, texts: Sequence[str]) -> list[dict[str, str]]:
    """Return messages of these roles, each by its first letter, with these texts."""
    return [
        {"role": _NAMES[role], "content": text} for role, text in zip(roles, texts, strict=False)
    ]


def render_chat(template: str, messages: Sequence[dict[str, str]]) -> str:
    """Return what Ollama renders a conversation to: the system's content is System as well."""
    system = "\n\n".join(each["content"] for each in messages if each["role"] == "system")
    fields = [{"Role": each["role"], "Content": each["content"]} for each in messages]
    return render_go(template, {"System": system, "Messages": fields})


def _pieces(render: Render, roles: str) -> list[str]:
    """Return what is rendered before, between and behind the contents of a conversation."""
    contents = [f"sentinel{index}{_NAMES[role]}" for index, role in enumerate(roles)]
    text = render(conversation(roles, contents))
    pieces = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found or content in text:
            raise GraftError(
                f"the chat template does not write the {content[9:]}'s message once and in its "
                f"place; {_INSTEAD}"
            )
        pieces.append(before)
    return [*pieces, text]
