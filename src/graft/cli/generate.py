"""`graft generate`."""

from __future__ import annotations

from dataclasses import dataclass

from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.show import show, show_answer
from graft.evaluate.config import AdaptersConfig, DecodingConfig
from graft.layers.config import ActivationConfig
from graft.model.config import TrustConfig


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(DecodingConfig, ActivationConfig, AdaptersConfig, TrustConfig):
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
    from graft.api.run.folder import PromptStyle, round_inputs
    from graft.api.run.several import load_with_adapters, style_with_adapters

    loaded = load_with_adapters(
        arguments.model,
        arguments,
        tokenizer=arguments.tokenizer,
        trust_remote_code=arguments.trust_remote_code,
    )
    round_inputs(loaded, arguments.activations)
    for note in loaded.notes:
        show(note, error=True)
    run(
        loaded,
        arguments.prompt,
        style=PromptStyle() if arguments.raw else style_with_adapters(arguments.model, arguments),
        max_new_tokens=arguments.max_new_tokens,
        **arguments.options(),
        on_text=show_answer,
    )
    show()


COMMAND = Command(arguments=GenerateArguments, run=generate, loads_models=True)
