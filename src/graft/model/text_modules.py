"""Which modules of a model read text."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel


def text_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules below a model by name, but not those of its parts for images and sounds.

    A part that is a model of its own reads text when it has the model's configuration or that of
    its text, or when it is given tokens.
    """
    kinds = (type(model.config), type(model.config.get_text_config()))

    def below(module: nn.Module, prefix: str, reads_text: bool) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            inside = reads_text
            if isinstance(child, PreTrainedModel):
                inside = type(child.config) in kinds or _takes_tokens(child)
            if inside:
                yield f"{prefix}{name}", child
            yield from below(child, f"{prefix}{name}.", inside)

    return below(model, "", True)


def _takes_tokens(part: PreTrainedModel) -> bool:
    named = type(part.config).__name__
    return part.main_input_name == "input_ids" and "Vision" not in named and "Audio" not in named
