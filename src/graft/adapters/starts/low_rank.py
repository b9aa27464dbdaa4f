"""What the starts of low-rank updates share: what they refuse, and how A and B are set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.adapters.attach import adapted_layers
from graft.adapters.base import Adapter, lora_scaling
from graft.adapters.config import AdapterConfig
from graft.adapters.starts.base import Preparation, Start
from graft.formats.base import Packed, WeightFormat
from graft.layers.frozen import FrozenLinear

BOTH_FACTORS = 0.5
"""The learning rate where neither A nor B begins at zero, over that of a zero B: a step then moves
the update by both. Of 1, 1/2 and 1/4 it ended lowest for orthogonal, PiSSA and OLoRA, and 3 % above
the lowest for CorDA (benchmarks/starts.py, 100 steps)."""


@dataclass(frozen=True)
class LowRankStart:
    """A [k, in_features] and B [out_features, k], float32, k = min(rank, in, out features)."""

    A: Tensor
    B: Tensor


class DrawnStart(Start):
    """Sets A, and leaves the weights and what the layers compute as they are."""

    def problems(
        self,
        config: AdapterConfig,
        *,
        low_rank: bool,
        adds_low_rank: bool,
        quantises: bool,
        solver: str | None,
    ) -> list[str]:
        if low_rank:
            return []
        return [
            f"--init {self.name} sets the factors A [rank, inputs] and B of a low-rank update; "
            f"method {config.method} trains no such factors. Drop it, or use lora or qlora"
        ]


class ResidualStart(Start):
    """Moves a low-rank part of each weight into its adapter; the rest stays frozen."""

    changes_base = True
    rate = BOTH_FACTORS

    def problems(
        self,
        config: AdapterConfig,
        *,
        low_rank: bool,
        adds_low_rank: bool,
        quantises: bool,
        solver: str | None,
    ) -> list[str]:
        problems = []
        if not adds_low_rank:
            problems.append(
                f"--init {self.name} moves a part of each weight into the low-rank update beside "
                f"it; method {config.method} has none beside its weights. Drop it, or use lora or "
                "qlora"
            )
        if solver is not None and quantises:
            problems.append(
                f"--init {self.name} leaves a rest of each weight to be rounded, and --solver "
                f"{solver} would calibrate it on what a model without the other part computes; "
                "use rtn or hqq"
            )
        return problems

    def begin(
        self, model: nn.Module, preparation: Preparation | None, name: str = "default"
    ) -> str:
        assert isinstance(preparation, Residual)
        set_starts(model, preparation.starts, name)
        return (
            f"{self.name}: the adapters begin with {preparation.share():.1%} of the weights' "
            "squared sum"
        )

    def export_note(self, base: str) -> str:
        return (
            f"started as {self.name}: it holds a part of the weights, whose rest is quantised in "
            f"{base}, and belongs on that (dequantised: export the base with --to hf), not on the "
            "original weights. No adapter of those can say what the rounding of the rest changed; "
            "`graft merge --into original` adds what was trained to them"
        )


class Residual(Preparation):
    """Takes from each weight the part s B A that its adapter begins with, kept in `starts`."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self.rank = config.update_rank
        self.scaling = lora_scaling(self.rank, config.alpha, config.rslora)
        self.starts: dict[str, LowRankStart] = {}
        self._taken = self._whole = 0.0

    def factors(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B of a layer's start; weight float64 [out_features, in_features]."""
        raise AssertionError(f"{name} was not looked at")

    def pack(
        self,
        name: str,
        weight: Tensor,
        weight_format: WeightFormat,
        rounding: Callable[[Tensor], Packed],
    ) -> Packed:
        """Return W - s B A in the format; A and B are those in `starts` where it has them."""
        dense = weight.double()
        if name not in self.starts:
            A, B = self.factors(name, dense)
            self.starts[name] = LowRankStart(A.float().contiguous(), B.float().contiguous())
        start = self.starts[name]
        part = (start.B.to(dense) @ start.A.to(dense)).mul_(self.scaling)
        self._taken += part.square().sum().item()
        self._whole += dense.square().sum().item()
        return rounding((dense - part).float())

    def recall(self, starts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (A, B) in starts.items():
            rank = min(len(A), len(B), A.shape[1])  # beyond it B is zero
            self.starts[name] = LowRankStart(A[:rank], B[:, :rank])

    def share(self) -> float:
        """Return the squared sum of what was taken over that of the weights."""
        return self._taken / self._whole if self._whole else 0.0


def low_rank_adapters(
    model: nn.Module, name: str
) -> Iterator[tuple[str, FrozenLinear, Adapter, Tensor, Tensor]]:
    """Yield each layer's name, base, adapter of that name, and its factors A and B."""
    for layer_name, layer in adapted_layers(model):
        if name in layer.adapters:
            adapter = layer.adapter(name)
            yield (
                layer_name,
                layer.base,
                adapter,
                adapter.get_parameter("A"),
                adapter.get_parameter("B"),
            )


@torch.no_grad()
def set_starts(model: nn.Module, starts: Mapping[str, LowRankStart], name: str = "default") -> None:
    """Set the named adapter of every layer in `starts` to its start.

    What goes beyond the sides of a small layer stays as it was drawn.
    """
    for layer_name, base, adapter, A, B in low_rank_adapters(model, name):
        if layer_name in starts:
            start = starts[layer_name]
            A[: len(start.A)] = start.A.to(A)
            B[:, : len(start.A)] = start.B.to(B)
            adapter.started(base)
