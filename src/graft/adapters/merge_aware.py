"""Merge-aware training: LoRA inside the quantiser, so that the update chooses the codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from graft.adapters.attach import adapted_layers
from graft.adapters.base import (
    Adapter,
    StoredAdapter,
    fill,
    lora_scaling,
    low_rank_moves,
    low_rank_start,
    require_format,
)
from graft.adapters.config import AdapterConfig
from graft.adapters.lora import low_rank, scaling_of
from graft.adapters.method import Config, Method
from graft.adapters.rates import low_rank_moves_factors
from graft.errors import GraftError
from graft.formats.base import GridUpdate, LowRank, Packed, Scaled, WeightFormat
from graft.formats.choice import latent_described
from graft.formats.config import FormatConfig
from graft.formats.latent import LatentFormat
from graft.formats.latent_grid import LatentGrid
from graft.kernels.low_rank.ops import lora_linear, low_rank_product
from graft.layers.frozen import FrozenLinear

_GRID_PARAMETERS = ("u_A", "u_B", "v_A", "v_B")


class MergeAwareAdapter(Adapter):
    """w = round(W + s B A) to a grid, s = alpha/rank; W is the latent weight.

    On int: w = scale (1 + u) round((W + s B A - offset) / scale) + offset + scale v.

    A: float32 [rank, in_features], random as LoRA's; B: float32 [out_features, rank], zero;
    u = u_B u_A and v = v_B v_A [out_features, groups], of rank grid_rank at most (0: the grid
    stays), u_B and v_B zero. A low-rank update flips codes, as in L4Q (arXiv
    2402.04902), and the grid moves in units of its own scales, as in affine tuning. What is trained
    is the quantised weight itself: the forward computes with the very codes and statistics that a
    merge keeps. It needs a base in the latent format.

    Before the base is rounded it is LoRA: x Wᵀ + s (x Aᵀ) Bᵀ.
    """

    method = "merge_aware"
    scaling: float
    moves_grid = True
    moves_codes = True
    needed_format = "latent"
    own_names = ("A", "B", *_GRID_PARAMETERS)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int,
        rank: int,
        alpha: float | None = None,
        rslora: bool = False,
        grid_rank: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.scaling = lora_scaling(rank, alpha, rslora)
        self.A, self.B = low_rank_start(rank, in_features, out_features, device)
        self.grid_rank = min(grid_rank, groups)
        if self.grid_rank:
            sizes = self.grid_rank, out_features, groups, device
            self.u_A, self.u_B = low_rank_moves(*sizes)
            self.v_A, self.v_B = low_rank_moves(*sizes)

    @classmethod
    def from_layer(cls, layer: FrozenLinear, config: AdapterConfig) -> Self:
        """Return a fresh adapter, which changes nothing yet."""
        grid_rank = config.grid_rank or 0
        return cls(
            layer.in_features,
            layer.out_features,
            _groups(layer, grid_rank, cls),
            config.update_rank,
            config.alpha,
            config.rslora,
            grid_rank,
            next(layer.parameters()).device,
        )

    @classmethod
    def from_stored(cls, layer: FrozenLinear, stored: StoredAdapter) -> Self:
        """Return the adapter of a file of our own form."""
        moves = stored.tensors.get("u_A")
        grid_rank = 0 if moves is None else moves.shape[0]
        sizes = layer.in_features, layer.out_features, _groups(layer, grid_rank, cls)
        adapter = cls(*sizes, low_rank(stored), grid_rank=grid_rank)
        adapter.scaling = scaling_of(stored)
        fill(adapter, stored.tensors)
        return adapter

    def grid_update(self, packed: Packed) -> GridUpdate:
        """Return weights += s B A, scales += scale u, offsets += scale v."""
        weights = LowRank(self.A, self.B, self.scaling)
        u, v = self._moves()
        if u is None or v is None:
            return GridUpdate(weights=weights)
        return GridUpdate(scales=Scaled(u), offsets=Scaled(v), weights=weights)

    def dense_update(self) -> Tensor:
        """Return s B A, float32 [out_features, in_features]."""
        return ((self.B.double() @ self.A.double()) * self.scaling).float()

    def let_grid_train(self, trains: bool) -> None:
        """Let what moves the grid train, or wait."""
        for parameter in self._grid_parameters():
            parameter.requires_grad_(trains)

    def _grid_parameters(self) -> list[nn.Parameter]:
        return [self.get_parameter(name) for name in _GRID_PARAMETERS if self.grid_rank]

    def _moves(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return u and v, float32 [out_features, groups], or nothing for a grid that stays."""
        if not self.grid_rank:
            return None, None
        u_A, u_B, v_A, v_B = self._grid_parameters()
        return low_rank_product(u_A, u_B), low_rank_product(v_A, v_B)

    def fused_output(self, x: Tensor, base: FrozenLinear) -> Tensor | None:
        """Return x W'ᵀ, W' the weight that a merge keeps, with gradients of all that trains.

        On a base that is not rounded yet it is LoRA, and the grid gets no gradient.
        """
        weight_format = base.weight_format
        if not isinstance(weight_format, LatentFormat):
            return None
        if not weight_format.rounds:
            weight = base.kernel_weight()
            out: Tensor = lora_linear(x, weight, self.A, self.B, self.scaling)[0]
            return out
        update = LowRank(self.A, self.B, self.scaling)
        return weight_format.latent_linear(x, base.packed, update, *self._moves())

    def delta(self, base: FrozenLinear) -> Tensor:
        """Return the rounded weight after the update minus that before, float64 [out, in]."""
        with torch.no_grad():
            moved = base.weight_format.absorb(base.packed, self.grid_update(base.packed))
            after = base.dense_weight(torch.float32, moved).double()
            return after - base.dense_weight(torch.float32).double()


def _groups(layer: FrozenLinear, grid_rank: int, adapter: type[Adapter]) -> int:
    """Return the groups of a row whose scales and offsets could move; 0 where the grid stays."""
    grid = require_format(layer, LatentFormat, adapter).grid
    if grid.integers is not None:
        return grid.integers.groups(layer.in_features)
    if grid_rank:
        raise GraftError(_no_moves(grid_rank, grid))
    return 0


def _no_moves(grid_rank: int, grid: LatentGrid) -> str:
    return f"--grid-rank {grid_rank}: {grid.name} weights have no offsets that could move; give 0"


class MergeAware(Method):
    """LoRA inside the rounding of the very grid that is deployed."""

    name = "merge_aware"
    adapter = MergeAwareAdapter
    low_rank = True
    takes = frozenset({"grid_rank", "dense_fraction"})
    default_format = "int"
    rounds_itself = True
    merges_exactly = True

    def resolved(self, config: Config, bits: int | None) -> Config:
        """Return the configuration with its defaults filled in.

        The wider the codes, the less there is to learn inside the rounding, and the more time and
        rank the update is given.
        """
        if bits is None:
            return super().resolved(config, bits)
        grid_rank = int(bits == 2) if config.grid_rank is None else config.grid_rank
        dense = {2: 0.5, 3: 0.7}.get(bits, 0.99)
        return dataclasses.replace(
            config,
            rank=config.rank or (14 if grid_rank else 16),
            grid_rank=grid_rank,
            dense_fraction=dense if config.dense_fraction is None else config.dense_fraction,
        )

    def weight_format(self, settings: FormatConfig, float32: bool) -> dict[str, Any]:
        """Return the latent format over the grid that --format names; see `Method`."""
        return latent_described(settings, float32=float32)

    def grid_problems(self, config: AdapterConfig, weight_format: WeightFormat) -> list[str]:
        """Return why moves were asked of a grid that has none."""
        assert isinstance(weight_format, LatentFormat)
        if not config.grid_rank or weight_format.grid.integers is not None:
            return []
        return [_no_moves(config.grid_rank, weight_format.grid)]

    def default_solver(self, bits: int | str | None) -> str:
        """Return qep: it ends near where it starts, so it rounds as well as can be."""
        return "qep"

    def make_trainable(
        self,
        model: nn.Module,
        targets: Sequence[str],
        config: AdapterConfig,
        ranks: Mapping[str, int] | None = None,
    ) -> dict[str, nn.Parameter]:
        """Attach the adapters; a grid waits where the base is not rounded yet, and has none."""
        trained = super().make_trainable(model, targets, config, ranks)
        for _, layer in adapted_layers(model):
            latent = layer.base.weight_format
            if isinstance(latent, LatentFormat) and not latent.rounds:
                for adapter in layer.active_adapters():
                    adapter.let_grid_train(False)
        return trained

    def dense_steps(self, config: AdapterConfig, steps: int) -> int:
        """Return how many steps train as LoRA.

        What is deployed has been trained as it is: one step at least is inside the rounding.
        """
        return min(round(steps * (config.dense_fraction or 0.0)), steps - 1)

    def rounds_in_training(self, config: AdapterConfig) -> bool:
        """Return whether some steps train as LoRA first; None stands for a default above 0."""
        return config.dense_fraction != 0

    def training_format(self, weight_format: WeightFormat, dense_steps: int) -> WeightFormat:
        """Return the latent format, which does not round while steps train as LoRA."""
        assert isinstance(weight_format, LatentFormat)
        return dataclasses.replace(weight_format, rounds=dense_steps == 0)

    def rate_factors(
        self, config: AdapterConfig, hidden_size: int, bits: Mapping[str, int]
    ) -> dict[str, float]:
        """Return a grid's rate for its moves; not more at more bits, where codes move as finely."""
        return low_rank_moves_factors(config, hidden_size, bits)


MERGE_AWARE = MergeAware()
