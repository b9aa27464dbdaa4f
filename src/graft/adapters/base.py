"""What an adapter is: a trainable update of one frozen linear layer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from graft.adapters.config import AdapterConfig
from graft.errors import GraftError
from graft.formats.base import GridUpdate, Packed
from graft.layers.frozen import FrozenLinear

F = TypeVar("F")


@dataclass(frozen=True)
class StoredAdapter:
    """One layer's adapter as a file holds it."""

    tensors: Mapping[str, Tensor]
    """By the adapter's own names of its parameters."""
    scaling: float | None
    """Exactly as it was trained; None where the file says it in PEFT's terms alone."""
    peft_scaling: float | None = None
    """alpha/rank of PEFT's configuration; None in our own form."""
    peft: Mapping[str, Any] = field(default_factory=dict)
    """PEFT's configuration; empty in our own form."""


class Adapter(nn.Module, ABC):
    """A trainable update of one frozen linear layer.

    An adapter changes the layer in one of two ways, and `AdaptedLinear` applies both:
    a *grid* adapter moves the packed weight's scales and offsets (`grid_update`), an *additive*
    one adds to the output (`added_output`). Its parameters are float32 on the layer's device.
    """

    method: ClassVar[str]
    """What its files call it."""
    moves_grid: ClassVar[bool] = False
    """Whether it is a grid adapter, so that a merge loses nothing."""
    moves_codes: ClassVar[bool] = False
    """Whether it moves codes too, which a gradient reaches through `fused_output` alone."""
    needed_format: ClassVar[str | None] = None
    """The one format that it trains on; None: any."""
    scaling: float | None = None
    """What multiplies its low-rank product, where it has one."""
    peft_names: ClassVar[Mapping[str, str]] = {}
    """Its parameters by name, each as PEFT's files call it behind the layer's name."""
    own_names: ClassVar[tuple[str, ...]] = ()
    """Its parameters in the files of our own form; none where PEFT's form holds all of it."""

    @classmethod
    @abstractmethod
    def from_layer(cls, layer: FrozenLinear, config: AdapterConfig) -> Self:
        """Return a fresh adapter that changes nothing yet; random parts from torch's generator."""

    @classmethod
    @abstractmethod
    def from_stored(cls, layer: FrozenLinear, stored: StoredAdapter) -> Self:
        """Return the adapter of a file; raises GraftError when it does not fit the layer."""

    def grid_update(self, packed: Packed) -> GridUpdate:
        """Return the move of the packed weight's grid, of an adapter that moves it."""
        raise AssertionError(f"{type(self).__name__} moves no grid")

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

    def dense_update(self) -> Tensor:
        """Return what is added to a latent weight before it is rounded; float32 [out, in]."""
        raise AssertionError(f"{type(self).__name__} trains inside no rounding")

    def started(self, base: FrozenLinear) -> None:
        """Take note that its factors were set to a start, not trained."""

    def let_grid_train(self, trains: bool) -> None:
        """Let what moves the grid train, or wait; of an adapter inside the rounding."""

    # Its files ---------------------------------------------------------------------------------

    def lora_tensors(self, base: FrozenLinear, as_lora: bool) -> dict[str, Tensor] | None:
        """Return the tensors of PEFT's form, by `peft_names`; None: PEFT has no such adapter.

        as_lora: those of an ordinary LoRA that is the same update.
        """
        return None

    def peft_settings(self, as_lora: bool) -> dict[str, Any]:
        """Return what it adds to PEFT's configuration, the same for every layer of a model."""
        return {}

    def peft_factor(self, base: FrozenLinear, as_lora: bool) -> float:
        """Return what PEFT's low-rank input is multiplied by, over ours."""
        return 1.0

    def why_no_lora(self) -> str:
        """Return how an adapter that PEFT cannot hold is deployed instead, in words."""
        return "Export the merged model"


def fill(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Set the parameters to a file's tensors; raises GraftError when shapes or names differ."""
    expected = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        raise GraftError(f"its tensors are {found}; the layer takes {expected}")
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(tensors[name])


def require_format(layer: FrozenLinear, kind: type[F], adapter: type[Adapter]) -> F:
    """Return the layer's format; raises GraftError when it is not the one of that kind."""
    weight_format = layer.weight_format
    if isinstance(weight_format, kind):
        return weight_format
    raise GraftError(
        f"method {adapter.method!r} needs weights in the {adapter.needed_format} format, found "
        f"{weight_format.name!r}; quantise the base with --format {adapter.needed_format}"
    )


# Starts of low-rank updates ------------------------------------------------------------------


def lora_scaling(rank: int, alpha: float | None, rslora: bool) -> float:
    """Return alpha/rank, or alpha/sqrt(rank) for rsLoRA (arXiv 2312.03732); alpha None is rank."""
    numerator = rank if alpha is None else alpha
    return numerator / (math.sqrt(rank) if rslora else rank)


def low_rank_start(
    rank: int,
    columns: int,
    out_features: int,
    device: torch.device | str | None,
    in_features: int | None = None,
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A [rank, columns] and B [out_features, rank] of an update B A, float32.

    A is uniform within 1/sqrt(in_features), by default its columns, and B zero, so that training
    starts from the base model (LoRA, arXiv 2106.09685, section 4.1).
    """
    A = nn.Parameter(torch.empty(rank, columns, device=device))
    B = nn.Parameter(torch.zeros(out_features, rank, device=device))
    bound = 1 / math.sqrt(in_features or columns)
    nn.init.uniform_(A, -bound, bound)
    return A, B


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


# Dense forms of moves of an int weight ---------------------------------------------------------


def per_input(values: Tensor, group_size: int, in_features: int) -> Tensor:
    """Return values [out_features, groups] repeated over each group's inputs."""
    return values.repeat_interleave(group_size, dim=1)[:, :in_features]


def scaled_codes(base: FrozenLinear, u: Tensor, group_size: int) -> Tensor:
    """Return scale u q, what moving an int weight's scales does to it; float64 [out, in]."""
    scales = base.packed["scales"].double()
    ones = torch.ones_like(scales, dtype=torch.float32)
    unit = {"scales": ones, "offsets": torch.zeros_like(ones)}
    codes = base.dense_weight(torch.float32, base.packed | unit).double()
    return per_input(scales * u, group_size, base.in_features) * codes
