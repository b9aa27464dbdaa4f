"""AdamW (Loshchilov and Hutter, arXiv:1711.05101), as torch computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graft.optimizers.base import OptimizerKind, OptimizerSettings


class AdamW(OptimizerKind):
    """Averages of the gradient and of its square, in the parameter's dtype."""

    name = "adamw"
    states = ("step", "exp_avg", "exp_avg_sq")
    scalars = ("step",)
    memory_note = "AdamW: two states per trained parameter"

    def make(
        self,
        groups: list[dict[str, Any]],
        learning_rate: float,
        settings: OptimizerSettings,
        device: torch.device,
    ) -> torch.optim.Optimizer:
        """Return torch's AdamW, fused where there is such a kernel."""
        return torch.optim.AdamW(
            groups,
            lr=learning_rate,
            weight_decay=settings.weight_decay,
            # Gradients are scaled to max_grad_norm, and what keeps from dividing by 0 with them.
            eps=1e-8 * min(1.0, settings.max_grad_norm),
            # One kernel per tensor instead of ten, and no temporaries.
            fused=device.type in ("cpu", "cuda"),
        )

    def state_bytes(self, numbers: int, size: int) -> int:
        """Return twice the parameters' bytes; their step counts are not worth counting."""
        return 2 * size

    def restored(
        self,
        saved: Mapping[str, Tensor],
        parameter: nn.Parameter,
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, Any]:
        """Return the state, its step where this optimizer counts it."""
        state = super().restored(saved, parameter, optimizer)
        # A step that the CPU counts is read there; a fused one counts beside its weights.
        if not optimizer.defaults["fused"]:
            state["step"] = saved["step"][0]
        return state


ADAMW = AdamW()
