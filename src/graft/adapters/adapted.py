"""The layer that carries adapters by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter
from graft.errors import GraftError
from graft.layers.frozen import FrozenLinear


class AdaptedLinear(nn.Module):
    """A frozen layer with named adapters, of which any number is active at a time.

    y = linear(x; packed moved by the active grid adapters) + sum of the active additive outputs,
    each times its weight. With no active adapter the layer computes exactly what its base computes.
    """

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.weights: dict[str, float] = {}
        """By what the updates of some adapters are multiplied; of the others by 1."""
        self._merged: tuple[FrozenLinear, ...] = ()  # a tuple, so that it is no module of this one

    @property
    def merged(self) -> FrozenLinear | None:
        """The layer that the active adapters were merged into in memory, which computes instead."""
        return self._merged[0] if self._merged else None

    def compute_with(self, layer: FrozenLinear | None) -> None:
        """Let a merged layer compute in the place of base and adapters; None: these again."""
        self._merged = () if layer is None else (layer,)

    def add(self, name: str, adapter: Adapter) -> None:
        """Add an adapter under a new name and activate it; raises GraftError if it is taken."""
        if name in self.adapters:
            raise GraftError(f"an adapter named {name!r} is already there; remove it first")
        self.adapters[name] = adapter
        self.active = (*self.active, name)

    def adapter(self, name: str) -> Adapter:
        """Return the adapter of that name."""
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def active_adapters(self) -> list[Adapter]:
        """Return the active adapters in the order in which they were activated."""
        return [self.adapter(name) for name in self.active]

    def weight_of(self, name: str) -> float:
        """Return by what the update of an adapter is multiplied."""
        return self.weights.get(name, 1.0)

    def delta_bias(self) -> Tensor | None:
        """Return what the active adapters add to the bias, float64 [out_features], or None."""
        moves = [(self.adapter(name).delta_bias(), self.weight_of(name)) for name in self.active]
        parts = [move * weight for move, weight in moves if move is not None]
        return sum(parts[1:], parts[0]) if parts else None

    def moves_grid_only(self) -> bool:
        """Return whether all active adapters move the grid, so that a merge loses nothing."""
        return all(adapter.moves_grid for adapter in self.active_adapters())

    def effective_packed(self) -> dict[str, Tensor]:
        """Return the base's packed tensors moved by the active grid adapters.

        This one function feeds the forward and the merge, so merging changes no number.
        """
        packed = self.base.packed
        for adapter in self.active_adapters():
            if adapter.moves_grid:
                absorbed = self.base.weight_format.absorb(packed, adapter.grid_update(packed))
                if absorbed is None:
                    raise GraftError(
                        f"{self.base.weight_format.name} weights cannot absorb a {adapter.method} "
                        "update; quantise the base to the int format"
                    )
                packed = absorbed
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output in x's dtype; x [..., in_features]."""
        if self._merged:
            merged: Tensor = self._merged[0](x)
            return merged
        if len(self.active) == 1 and not self.weights:
            adapter = self.adapter(self.active[0])
            fuses = not self.base.rounds or (torch.is_grad_enabled() and adapter.moves_codes)
            fused = adapter.fused_output(self.base.met(x), self.base) if fuses else None
            if fused is not None:
                return self.base.add_bias(fused)
        y, met = self.base.linear(x, self.effective_packed()), self.base.met(x)
        for name in self.active:
            added = self.adapter(name).added_output(met, self.base)
            if added is not None:
                y = y + (added * self.weights[name] if name in self.weights else added)
        return y

    def effective_weight(self) -> Tensor:
        """Return the dense weight that the forward stands for; float64 [out, in], detached."""
        with torch.no_grad():
            packed = self.effective_packed()
            weight = self.base.dense_weight(torch.float32, packed).double()
            for name in self.active:
                if not self.adapter(name).moves_grid:
                    weight += self.adapter(name).delta(self.base) * self.weight_of(name)
        return weight
