"""`graft chat`."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show, show_answer
from graft.evaluate.config import AdaptersConfig, DecodingConfig
from graft.layers.config import ActivationConfig
from graft.model.config import TrustConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_COMMANDS = "/adapter NAME ... turns adapters on, /adapter none turns all off, /adapters lists them"


@dataclass(frozen=True, kw_only=True)
class ChatArguments(DecodingConfig, ActivationConfig, AdaptersConfig, TrustConfig):
    """The model, and how it answers."""

    model: Positional
    """A run, a model folder, or a hub id."""
    max_new_tokens: int = 256
    """Most tokens of an answer."""


def chat(arguments: ChatArguments) -> None:
    """Talk to a model; an empty line or Ctrl-D ends it, /adapter NAME switches adapters."""
    from graft.api.adapters import adapter_names
    from graft.api.evaluate import generate as run
    from graft.api.run.folder import round_inputs
    from graft.api.run.several import load_with_adapters, style_with_adapters
    from graft.data.shapes.registry import SHAPES

    loaded = load_with_adapters(
        arguments.model, arguments, trust_remote_code=arguments.trust_remote_code
    )
    round_inputs(loaded, arguments.activations)
    for note in loaded.notes:
        show(note, error=True)
    style = style_with_adapters(arguments.model, arguments)
    remembers = SHAPES[style.kind].is_conversation or loaded.tokenizer.chat_template is not None
    if not remembers:
        show("This model has no chat template: each line stands alone.", error=True)
    if len(adapter_names(loaded.model)) > 1:
        show(_COMMANDS, error=True)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text ends no conversation
    messages: list[dict[str, str]] = []
    while line := _ask():
        if line.split()[0] in ("/adapter", "/adapters"):
            _switch(loaded.model, line.split())
            continue
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


def _switch(model: PreTrainedModel, words: list[str]) -> None:
    """Do what a line that begins with a slash asks for, and show which adapters are on then."""
    from graft.api.adapters import active_adapters, adapter_names, set_adapters
    from graft.errors import GraftError

    try:
        if words[0] == "/adapter" and len(words) > 1:
            set_adapters(model, [] if words[1:] == ["none"] else words[1:])
        elif words[0] == "/adapter":
            show(_COMMANDS, error=True)
    except GraftError as error:
        show(str(error), error=True)
    on = active_adapters(model)
    for name in adapter_names(model):
        weight = f", times {on[name]:g}" if on.get(name, 1) != 1 else ""
        show(f"{name}: {'on' if name in on else 'off'}{weight}", error=True)
    if not adapter_names(model):
        show("this model has no adapter; --adapter loads some", error=True)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


COMMAND = Command(arguments=ChatArguments, run=chat, loads_models=True)
