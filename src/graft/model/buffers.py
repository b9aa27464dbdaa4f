"""The buffers that no file holds, such as rotary frequencies, from the model's own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graft.errors import raise_problems
from graft.model.foreign import NothingDrawn
from graft.model.internals import initialise, writes_to


def initialise_buffers(
    model: PreTrainedModel, device: torch.device, build: Callable[[], Mapping[str, Tensor]]
) -> None:
    """Compute the buffers that are in no file, of a model whose tensors are on the meta device.

    They come from Transformers' initialisation, as in `from_pretrained`; where that leaves one out,
    `build` returns the buffers of the model as it is built. Raises GraftError with those that
    neither has.
    """
    saved = model.state_dict().keys()
    places: dict[str, Tensor] = {}
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if name not in saved and buffer.is_meta:
            places[name] = _set(model, name, torch.empty_like(buffer, device=device))
    before = {name: writes_to(buffer) for name, buffer in places.items()}
    with NothingDrawn():
        initialise(model)
    found = dict(model.named_buffers(remove_duplicate=False))
    left = [
        name
        for name, place in places.items()
        if found[name] is place and writes_to(place) == before[name] and place.numel()
    ]
    if left:
        built = build()
        fit = [name for name in left if name in built and built[name].shape == places[name].shape]
        for name in fit:
            places[name].copy_(built[name])
        raise_problems(
            [
                f"buffer {name} is in no file, and its code computes none"
                for name in left
                if name not in fit
            ],
            "config.json",
        )


def _set(model: PreTrainedModel, name: str, buffer: Tensor) -> Tensor:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, buffer)
    return buffer
