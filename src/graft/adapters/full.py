"""Full fine-tuning: the weights themselves, all of them or those of the target layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from graft.adapters.config import AdapterConfig
from graft.adapters.method import Method
from graft.adapters.rates import weight_rate
from graft.formats.registry import AS_IT_IS


class Full(Method):
    """All weights, or those of the layers that --targets names."""

    name = "full"

    def card_rows(self, config: AdapterConfig) -> dict[str, object]:
        """Return nothing: it has no rank."""
        return {}

    def format_problem(self, name: str) -> str | None:
        """Return why quantised weights cannot train."""
        if name == AS_IT_IS:
            return None
        return (
            f"method full trains every weight, and {name} weights are frozen codes that no "
            "optimizer can move; train with qlora, qalora or affine, or start from dense "
            "weights, without --format"
        )

    def compute_dtype(self, dtype: str) -> str:
        """Return float32 unless another is asked for.

        A bfloat16 weight does not move by less than 1/256 of itself, so small steps would be lost.
        """
        return "float32" if dtype == "auto" else dtype

    def make_trainable(
        self, model: nn.Module, targets: Sequence[str], config: AdapterConfig
    ) -> dict[str, nn.Parameter]:
        """Free the weights of the target layers, or all of them; return what trains, by name."""
        inside = tuple(f"{name}." for name in targets)
        chosen = {
            name: parameter
            for name, parameter in model.named_parameters()
            if not config.targets or name.startswith(inside)
        }
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return chosen

    def trains_everything(self, config: AdapterConfig) -> bool:
        """Return whether no layers were named."""
        return not config.targets

    def learning_rate(self, config: AdapterConfig, hidden_size: int) -> float:
        """Return the default peak learning rate of AdamW."""
        return weight_rate(hidden_size)


FULL = Full()
