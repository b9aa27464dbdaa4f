"""Trained factors in the dtype that products take: copied once a step, and all together.

A factor takes part in two products of a step, and a copy of it is a launch; a model of 22 layers
has 308 of them.
"""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from graft.kernels.backend.torch_internals import writes_to


class _Copy:
    """A parameter's copy, and of which of its states it is."""

    def __init__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        self.parameter, self.address = ref(parameter), parameter.data_ptr()
        self.copy = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        self.writes = -1

    def source(self) -> nn.Parameter | None:
        """Return the parameter while it lies where it lay."""
        parameter = self.parameter()
        lies = parameter is not None and parameter.data_ptr() == self.address
        return parameter if lies else None


class Casts:
    """Copies of parameters in another dtype, each made anew when its parameter was written to."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.dtype], _Copy] = {}
        self._watches = False

    def of(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return tensor.to(dtype); of a parameter, or what was detached from one, the kept copy.

        The copy is written anew after the parameter was: nobody may keep it beyond a step.
        """
        if tensor.dtype == dtype:
            return tensor
        key = tensor.data_ptr(), dtype
        kept = self._copies.get(key)
        source = None if kept is None else kept.source()
        if kept is None or source is None or source.shape != tensor.shape:
            if type(tensor) is not nn.Parameter or not tensor.is_contiguous():
                return tensor.to(dtype)
            self._watch_optimizers()
            kept = self._copies[key] = _Copy(tensor, dtype)
            source = tensor
        if kept.writes != writes_to(source):
            self.refresh()
        return kept.copy

    def _watch_optimizers(self) -> None:
        """Let every optimizer's step count as a write: a fused one's is not counted by PyTorch."""
        if not self._watches:
            register_optimizer_step_post_hook(lambda *arguments: self.written())
            self._watches = True

    def written(self) -> None:
        """Take every copy for old."""
        for one in self._copies.values():
            one.writes = -1

    def refresh(self) -> None:
        """Copy every parameter that was written to since; forget those that are gone."""
        self._copies = {key: one for key, one in self._copies.items() if one.source() is not None}
        stale: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for (_, dtype), one in self._copies.items():
            source = one.source()
            if source is not None and one.writes != writes_to(source):
                copies, sources = stale.setdefault(dtype, ([], []))
                copies.append(one.copy)
                sources.append(source)
                one.writes = writes_to(source)
        for copies, sources in stale.values():
            with torch.no_grad():
                torch._foreach_copy_(copies, sources)
