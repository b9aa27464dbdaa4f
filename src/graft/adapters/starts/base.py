"""What a start is: how an adapter begins, and what that asks of its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from graft.adapters.config import AdapterConfig
from graft.formats.base import Packed, WeightFormat


@dataclass(frozen=True)
class Inputs:
    """What a linear layer got as inputs x [in_features] on a text, summed over its tokens."""

    second: Tensor
    """The sum of x xᵀ, float64 [in_features, in_features]."""
    total: Tensor
    """The sum of x, float64 [in_features]."""
    tokens: int


class Preparation:
    """What a start finds in the layers, one after another, before their adapters are made."""

    def look(self, name: str, weight: Tensor, inputs: Inputs) -> None:
        """See the named layer's weight, float32 [out_features, in_features], and its inputs."""

    def pack(
        self,
        name: str,
        weight: Tensor,
        weight_format: WeightFormat,
        rounding: Callable[[Tensor], Packed],
    ) -> Packed:
        """Return the packed weight of the named layer; `rounding` packs one to that format."""
        return rounding(weight)

    def recall(self, starts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take A and B that the layers began with, instead of finding them when packing."""

    def ranks(self) -> Mapping[str, int] | None:
        """Return the rank of each layer, 0 for one that gets no adapter; None: the run's in all."""
        return None


class Start:
    """How adapters begin; this one leaves them as they were drawn, which changes nothing."""

    name: ClassVar[str] = "default"
    changes_base: ClassVar[bool] = False
    """Whether a part of each weight moves into its adapter, which then belongs on no other base.
    What it began with is kept beside the run, so that it can be taken out again."""
    reads_inputs: ClassVar[bool] = False
    """Whether it looks at what the layers get as inputs on rows of the training data."""
    chooses_ranks: ClassVar[bool] = False
    """Whether each layer has a rank of its own."""

    rate: ClassVar[float] = 1.0
    """What multiplies the method's default learning rate."""

    def problems(
        self,
        config: AdapterConfig,
        *,
        low_rank: bool,
        adds_low_rank: bool,
        quantises: bool,
        solver: str | None,
    ) -> list[str]:
        """Return what hinders in a run's configuration.

        low_rank: the method trains factors A [rank, in_features] and B of a low-rank update.
        adds_low_rank: that update is beside its weights, and not inside their rounding. quantises:
        the run quantises them. solver: one that was asked for and needs the whole model.
        """
        return []

    def prepare(self, config: AdapterConfig) -> Preparation | None:
        """Return what looks at the layers, or changes them, before their adapters are made."""
        return None

    def begin(
        self, model: nn.Module, preparation: Preparation | None, name: str = "default"
    ) -> str | None:
        """Set the named adapter of every layer to its start; return what is worth telling."""
        return None

    def export_note(self, base: str) -> str | None:
        """Return what must be told with an adapter that belongs on a run's own base alone.

        base: the folder of that base, whose weights are quantised.
        """
        return None


DEFAULT = Start()
