"""`graft generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show, show_answer
from graft.evaluate.config import DecodingConfig
from graft.layers.config import ActivationConfig
from graft.model.config import TrustConfig


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(DecodingConfig, ActivationConfig, TrustConfig):
    """The model, the prompt, and how to go on from it."""

    model: Positional
    """A run, a model folder, a hub id, or a GGUF file that graft wrote."""
    prompt: str
    """The prompt; to a run it is dressed as the run's training rows were."""
    max_new_tokens: int = 128
    """Most tokens to generate."""
    raw: bool = False
    """Take the prompt as it is, without the run's separator or template."""
    tokenizer: str | None = None
    """Folder of the tokenizer, for a GGUF file."""


def generate(arguments: GenerateArguments) -> None:
    """Continue a prompt."""
    from graft.api.evaluate import generate as run
    from graft.api.run.folder import load_any, prompt_style, round_inputs

    loaded = load_any(
        arguments.model,
        tokenizer=arguments.tokenizer,
        trust_remote_code=arguments.trust_remote_code,
    )
    round_inputs(loaded, arguments.activations)
    for note in loaded.notes:
        show(note, error=True)
    run(
        loaded,
        arguments.prompt,
        style=None if arguments.raw else prompt_style(Path(arguments.model)),
        max_new_tokens=arguments.max_new_tokens,
        **arguments.options(),
        on_text=show_answer,
    )
    show()


COMMAND = Command(arguments=GenerateArguments, run=generate, loads_models=True)
