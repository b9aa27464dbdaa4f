"""`graft chat`."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show, show_answer
from graft.evaluate.config import DecodingConfig
from graft.layers.config import ActivationConfig
from graft.model.config import TrustConfig


@dataclass(frozen=True, kw_only=True)
class ChatArguments(DecodingConfig, ActivationConfig, TrustConfig):
    """The model, and how it answers."""

    model: Positional
    """A run, a model folder, or a hub id."""
    max_new_tokens: int = 256
    """Most tokens of an answer."""


def chat(arguments: ChatArguments) -> None:
    """Talk to a model; an empty line or Ctrl-D ends it."""
    from graft.api.evaluate import generate as run
    from graft.api.run.folder import load_any, prompt_style, round_inputs
    from graft.data.shapes.registry import SHAPES

    loaded = load_any(arguments.model, trust_remote_code=arguments.trust_remote_code)
    round_inputs(loaded, arguments.activations)
    for note in loaded.notes:
        show(note, error=True)
    style = prompt_style(Path(arguments.model))
    remembers = SHAPES[style.kind].is_conversation or loaded.tokenizer.chat_template is not None
    if not remembers:
        show("This model has no chat template: each line stands alone.", error=True)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text ends no conversation
    messages: list[dict[str, str]] = []
    while line := _ask():
        messages.append({"role": "user", "content": line})
        answer = run(
            loaded,
            messages if remembers else line,
            style=style,
            max_new_tokens=arguments.max_new_tokens,
            **arguments.options(),
            on_text=show_answer,
        )
        show()
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


COMMAND = Command(arguments=ChatArguments, run=chat, loads_models=True)
