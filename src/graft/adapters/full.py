"""Full fine-tuning: the weights themselves, all of them or a chosen subset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from graft.adapters.config import AdapterConfig
from graft.adapters.method import Method
from graft.adapters.rates import weight_rate
from graft.formats.registry import AS_IT_IS


class Full(Method):
    """All weights, or those that --train names."""

    name = "full"
    takes = frozenset({"train"})
    whys: ClassVar[Mapping[str, str]] = {
        "train": "method {} trains an adapter, on the layers that --targets names"
    }

    def card_rows(self, config: AdapterConfig) -> dict[str, object]:
        """Return nothing: it has no rank."""
        return {}

    def problems(self, config: AdapterConfig) -> list[str]:
        """Return that what trains is said twice, where it is."""
        both = config.train and config.targets
        return ["--train and --targets both say what trains; give --train alone"] if both else []

    def format_problem(self, name: str) -> str | None:
        """Return why quantised weights cannot train."""
        if name == AS_IT_IS:
            return None
        return (
            f"method full trains the weights themselves, and {name} weights are frozen codes that "
            "no optimizer can move; train with qlora, qalora or affine, or start from dense "
            "weights, without --format"
        )

    def compute_dtype(self, dtype: str) -> str:
        """Return float32 unless another is asked for.

        A bfloat16 weight does not move by less than 1/256 of itself, so small steps would be lost.
        """
        return "float32" if dtype == "auto" else dtype

    def make_trainable(
        self,
        model: nn.Module,
        targets: Sequence[str],
        config: AdapterConfig,
        ranks: Mapping[str, int] | None = None,
    ) -> dict[str, nn.Parameter]:
        """Free the named weights; return them by name."""
        chosen = {name: model.get_parameter(name) for name in targets}
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return chosen

    def learning_rate(self, config: AdapterConfig, hidden_size: int) -> float:
        """Return the default peak learning rate of AdamW."""
        return weight_rate(hidden_size)


FULL = Full()
