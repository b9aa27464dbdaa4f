"""What an adapter is, and the layer that carries several of them by name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from graft.errors import GraftError
from graft.formats.base import GridUpdate, Packed
from graft.layers.frozen import FrozenLinear


def lora_scaling(rank: int, alpha: float | None, rslora: bool) -> float:
    """Return alpha/rank, or alpha/sqrt(rank) for rsLoRA (arXiv 2312.03732); alpha None is rank."""
    numerator = rank if alpha is None else alpha
    return numerator / (math.sqrt(rank) if rslora else rank)


def low_rank_moves(
    rank: int, out_features: int, groups: int, device: torch.device | str | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A [rank, groups] and B [out_features, rank] of moves B A of a grid, B zero.

    The moves are in units of each group's own scale. A is uniform with variance 1/rank, so that a
    step of Adam in B moves B A by about the step's size, as if the moves were trained themselves;
    which they are where the rank is the number of groups, with the identity for A.
    """
    A = nn.Parameter(torch.empty(rank, groups, device=device))
    B = nn.Parameter(torch.zeros(out_features, rank, device=device))
    bound = math.sqrt(3 / rank)
    nn.init.eye_(A) if rank == groups else nn.init.uniform_(A, -bound, bound)
    return A, B


def per_input(values: Tensor, base: FrozenLinear) -> Tensor:
    """Return values [out_features, groups] repeated over each group's inputs."""
    group_size = base.weight_format.options()["group_size"]
    return values.repeat_interleave(group_size, dim=1)[:, : base.in_features]


def scaled_codes(base: FrozenLinear, u: Tensor) -> Tensor:
    """Return scale u q, what moving an int weight's scales does to it; float64 [out, in]."""
    scales = base.packed["scales"].double()
    ones = torch.ones_like(scales, dtype=torch.float32)
    unit = {"scales": ones, "offsets": torch.zeros_like(ones)}
    codes = base.dense_weight(torch.float32, base.packed | unit).double()
    return per_input(scales * u, base) * codes


class Adapter(nn.Module, ABC):
    """A trainable update of one frozen linear layer.

    An adapter changes the layer in one of two ways, and `AdaptedLinear` applies both:
    a *grid* adapter moves the packed weight's scales and offsets (`grid_update`), an *additive*
    one adds to the output (`added_output`). Its parameters are float32 on the layer's device.
    """

    method: str

    def grid_update(self, packed: Packed) -> GridUpdate | None:
        """Return the move of the packed weight's grid, or None for an additive adapter."""
        return None

    def added_output(self, x: Tensor, base: FrozenLinear) -> Tensor | None:
        """Return what is added to the layer's output, in x's dtype, or None for a grid adapter."""
        return None

    def fused_output(self, x: Tensor, base: FrozenLinear) -> Tensor | None:
        """Return the adapted product without the base's bias in one operation, if there is one.

        It is used where this adapter is the only active one; it computes what `grid_update` and
        `added_output` say.
        """
        return None

    @abstractmethod
    def delta(self, base: FrozenLinear) -> Tensor:
        """Return the update of the dense weight, unrounded; float64 [out_features, in_features]."""

    def delta_bias(self) -> Tensor | None:
        """Return the update of the bias, float64 [out_features], or None."""
        return None


class AdaptedLinear(nn.Module):
    """A frozen layer with named adapters, of which any number is active at a time.

    y = linear(x; packed moved by the active grid adapters) + sum of the active additive outputs.
    With no active adapter the layer computes exactly what its base computes.
    """

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()

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

    def moves_grid_only(self) -> bool:
        """Return whether all active adapters move the grid, so that a merge loses nothing."""
        packed = self.base.packed
        return all(adapter.grid_update(packed) is not None for adapter in self.active_adapters())

    def effective_packed(self) -> dict[str, Tensor]:
        """Return the base's packed tensors moved by the active grid adapters.

        This one function feeds the forward and the merge, so merging changes no number.
        """
        packed = self.base.packed
        for adapter in self.active_adapters():
            update = adapter.grid_update(packed)
            if update is not None:
                absorbed = self.base.weight_format.absorb(packed, update)
                if absorbed is None:
                    raise GraftError(
                        f"{self.base.weight_format.name} weights cannot absorb a {adapter.method} "
                        "update; quantise the base to the int format"
                    )
                packed = absorbed
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output in x's dtype; x [..., in_features]."""
        if len(self.active) == 1:
            fused = self.adapter(self.active[0]).fused_output(x, self.base)
            if fused is not None:
                return self.base.add_bias(fused)
        y = self.base.linear(x, self.effective_packed())
        for adapter in self.active_adapters():
            added = adapter.added_output(x, self.base)
            if added is not None:
                y = y + added
        return y

    def effective_weight(self) -> Tensor:
        """Return the dense weight that the forward stands for; float64 [out, in], detached."""
        with torch.no_grad():
            packed = self.effective_packed()
            weight = self.base.dense_weight(torch.float32, packed).double()
            for adapter in self.active_adapters():
                if adapter.grid_update(packed) is None:
                    weight += adapter.delta(self.base)
        return weight
