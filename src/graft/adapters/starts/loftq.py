"""LoftQ: a low-rank start that makes up for the rounding of the weight beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from graft.adapters.base import lora_scaling
from graft.adapters.config import AdapterConfig
from graft.adapters.starts.base import Preparation, Start
from graft.adapters.starts.low_rank import LowRankStart, set_starts
from graft.adapters.svd import truncated_svd
from graft.formats.base import Packed, WeightFormat


@dataclass(frozen=True)
class LoftQStart(LowRankStart):
    """What a layer's adapter begins with, and what that makes up for."""

    rounding_error: float
    """Squared error |W - Q|² of rounding alone."""
    error: float
    """Squared error |W - Q - s B A|² that is left."""


@dataclass
class LoftQ(Preparation):
    """Rounds layers one after another and keeps the start of each one's adapter in `starts`."""

    rank: int
    scaling: float
    rounds: int
    starts: dict[str, LoftQStart] = field(default_factory=dict)

    def pack(
        self,
        name: str,
        weight: Tensor,
        weight_format: WeightFormat,
        rounding: Callable[[Tensor], Packed],
    ) -> Packed:
        """Return the packed weight of the named layer; see `loftq`."""
        packed, start = loftq(weight, weight_format, self.rank, self.scaling, self.rounds, rounding)
        self.starts[name] = start
        return packed

    def left(self) -> float:
        """Return the squared error that is left over that of rounding alone, over all layers."""
        before = sum(start.rounding_error for start in self.starts.values())
        return sum(start.error for start in self.starts.values()) / before if before else 1.0


def loftq(
    weight: Tensor,
    weight_format: WeightFormat,
    rank: int,
    scaling: float,
    rounds: int,
    rounding: Callable[[Tensor], Packed],
) -> tuple[Packed, LoftQStart]:
    """Return the packed weight and the A, B with which W is near Q + s B A.

    Algorithm 1 of LoftQ (arXiv 2310.08659), with s = scaling: from A = B = 0 on, in turns

        Q = round(W - s B A);   s B A = the best approximation of rank `rank` to W - Q,

    `rounds` times; of all rounds the one with the least |W - Q - s B A|² is kept. The singular
    values go to A and B in equal parts.

    weight [out_features, in_features]; `rounding` packs a float32 weight of that shape to the
    format. Deterministic.
    """
    out_features, in_features = weight.shape
    dense = weight.double()
    update, best, plain = torch.zeros_like(dense), None, 0.0
    for index in range(rounds):
        packed = rounding((dense - update).float())
        lost = dense - weight_format.unpack(packed, out_features, in_features, torch.float32)
        left, sizes, right = truncated_svd(lost, rank)
        roots = (sizes / scaling).sqrt()
        A, B = (roots[:, None] * right).float(), (left * roots).float()
        update = (B.double() @ A.double()) * scaling
        error = (lost - update).square().sum().item()
        plain = lost.square().sum().item() if index == 0 else plain
        if best is None or error < best[1].error:
            best = packed, LoftQStart(A, B, plain, error)
    assert best is not None, "rounds is at least 1"
    return best


class _LoftQStart(Start):
    name = "loftq"
    changes_base = True

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
                "--init loftq starts a low-rank update beside the weights; method "
                f"{config.method} has none. Drop it, or use qlora"
            )
        elif not quantises:
            problems.append(
                f"--init loftq makes up for rounding, and method {config.method} without --format "
                "rounds nothing; give --format, or use qlora"
            )
        if solver is not None:
            problems.append(
                "--init loftq rounds each weight several times while it is read, and --solver "
                f"{solver} needs the whole model; use rtn or hqq"
            )
        return problems

    def prepare(self, config: AdapterConfig) -> LoftQ:
        scaling = lora_scaling(config.update_rank, config.alpha, config.rslora)
        return LoftQ(config.update_rank, scaling, config.loftq_rounds)

    def begin(
        self, model: nn.Module, preparation: Preparation | None, name: str = "default"
    ) -> str:
        assert isinstance(preparation, LoftQ)
        set_starts(model, preparation.starts, name)
        return (
            "loftq: with the adapter's start the weights' squared error is "
            f"{preparation.left():.2f} times that of rounding alone"
        )

    def export_note(self, base: str) -> str:
        return (
            f"started as loftq: it makes up for the rounding of the quantised base in {base}, and "
            "belongs on those weights (dequantised: export the base with --to hf), not on the "
            "original ones"
        )


LOFTQ = _LoftQStart()
