"""Whether a model's embedding and head stay in the 16 bits of the files."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from graft.kernels.backend import native_library
from graft.layers.narrow import NARROW, narrow
from graft.model.families import FAMILIES, is_class


def keep_narrow(
    model: PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device,
    stored: Callable[[str], torch.dtype | None],
) -> None:
    """Let embedding and head keep bfloat16 in a model that will compute in float32 on the CPU.

    So it is for the decoders that graft knows, where the files hold the tensor in bfloat16
    (`stored`, by its name) and the native kernels read that: half the memory, and half the time of
    reading the head for a token. No weight changes its value.
    """
    known = {family.decoder for family in FAMILIES.values() if family.decoder}
    if dtype != torch.float32 or device.type != "cpu" or not is_class(model, known):
        return
    if native_library.why_unavailable() is not None:
        return
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    plain = [module for module in ends if type(module) in (nn.Linear, nn.Embedding)]
    chosen = [module for module in plain if stored(names[module]) == NARROW]
    tied = len(plain) == 2 and plain[0].weight is plain[1].weight
    if tied and len(chosen) == 1:
        return
    for module in chosen:
        narrow(module)
    if tied and chosen:
        chosen[1].weight = chosen[0].weight
