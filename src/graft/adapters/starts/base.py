"""What a start is: how an adapter begins, and what that asks of its base."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

from torch import Tensor, nn

from graft.adapters.config import AdapterConfig
from graft.formats.base import Packed, WeightFormat


class Packer(Protocol):
    """Rounds layers one after another, and keeps what their adapters begin with."""

    def pack(
        self,
        name: str,
        weight: Tensor,
        weight_format: WeightFormat,
        rounding: Callable[[Tensor], Packed],
    ) -> Packed:
        """Return the packed weight of the named layer; `rounding` packs one to that format."""
        ...


class Start:
    """How adapters begin; this one leaves them as they were drawn, which changes nothing."""

    name: ClassVar[str] = "default"
    changes_base: ClassVar[bool] = False
    """Whether the base is rounded together with it, so that the adapter belongs on no other. Such a
    start is kept beside the run, to be left out of a merge into another base."""

    def problems(
        self,
        config: AdapterConfig,
        *,
        adds_low_rank: bool,
        quantises: bool,
        solver: str | None,
    ) -> list[str]:
        """Return what hinders in a run's configuration.

        adds_low_rank: the method adds a low-rank update to its weights. quantises: the run
        quantises them. solver: one that was asked for and needs the whole model.
        """
        return []

    def packer(self, config: AdapterConfig) -> Packer | None:
        """Return what rounds the base while it is read, where the start needs a say in that."""
        return None

    def begin(self, model: nn.Module, packer: Packer | None, name: str = "default") -> str | None:
        """Set the named adapter of every layer to its start; return what is worth telling."""
        return None

    def export_note(self, base: str) -> str | None:
        """Return what must be told with an adapter by itself; base: the folder of its base."""
        return None


DEFAULT = Start()
