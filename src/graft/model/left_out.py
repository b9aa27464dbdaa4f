"""What neither adapters nor packed weights reach of a model, in words."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel

from graft.model.targets import kept_layers, linear_layers
from graft.text import printable

_NAMED = 3
"""Kinds of parts that are named; the others are counted."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def left_out(model: PreTrainedModel, chosen: Collection[str], does: str) -> str | None:
    """Return a line on what a model has besides its linear layers that stays as it is.

    None where that is only what always does: embeddings, output head, norms and biases. What was
    left unchosen among the linear layers is not named, as somebody chose so.

    model: without frozen or adapted layers. chosen: the layers that are adapted or packed. does:
    what is done to them, as in 'adapts'.
    """
    kept, usual = kept_layers(model), set(linear_layers(model))
    head = model.get_output_embeddings()
    total = 0
    parts: dict[str, int] = defaultdict(int)
    reasons: dict[str, str] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            always = name in usual or module is head or isinstance(module, nn.Embedding)
            if not always and parameter.dim() > 1:
                part = re.sub(r"\.\d+(?=\.|$)", ".*", name)
                parts[part] += parameter.numel()
                reasons[part] = kept.get(name) or _reason(module)
    if not parts:
        return None
    largest = sorted(parts.items(), key=lambda item: -item[1])
    named = "; ".join(
        f"{printable(part)} ({_share(count / total)}: {reasons[part]})"
        for part, count in largest[:_NAMED]
    )
    more = f"; and {len(largest) - _NAMED} more kinds" if len(largest) > _NAMED else ""
    share = _share(sum(parts.values()) / total)
    return (
        f"{does} {len(chosen)} linear layers; {share} of the parameters stay as they are, besides "
        f"embeddings, head and norms: {named}{more}"
    )


def _reason(module: nn.Module) -> str:
    if isinstance(module, _CONVOLUTIONS):
        return "a convolution"
    kind = type(module).__name__
    return "fused experts are not adapted yet" if "Expert" in kind else f"{kind} is no linear layer"


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.2%}" if share >= 1e-4 else "under 0.01%"
