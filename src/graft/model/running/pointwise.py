"""RMSNorm and SiLU gates by graft's own kernels, in the place of transformers' modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft.adapters.attach import replace_module
from graft.kernels.backend.registry import backend_of
from graft.kernels.pointwise.ops import rms_norm, silu_gate
from graft.model.families import FAMILIES, is_class


class RMSNorm(nn.Module):
    """y = weight * (x * scale), scale = 1 / sqrt(mean(x²) + epsilon), with a frozen weight."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Return y in x's dtype."""
        y: Tensor = rms_norm(x, self.weight, self.variance_epsilon)[0]
        return y


class GatedMLP(nn.Module):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)), under transformers' names."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Return y in x's dtype."""
        y: Tensor = self.down_proj(silu_gate(self.gate_proj(x), self.up_proj(x)))
        return y


def has_own_pointwise(device: torch.device) -> bool:
    """Return whether there are kernels for norms and gates on a device."""
    return backend_of("rms_norm", device).name != "reference"


def own_norms(model: nn.Module) -> list[str]:
    """Return the names of the norms that `use_own_pointwise` would replace, were they frozen."""
    classes = {family.norm for family in FAMILIES.values()}
    return [name for name, module in model.named_modules() if is_class(module, classes)]


def own_gates(model: PreTrainedModel) -> list[str]:
    """Return the names of the MLPs that `use_own_pointwise` would replace."""
    if getattr(model.config, "hidden_act", None) != "silu":
        return []
    classes = {family.gate for family in FAMILIES.values()}
    return [name for name, module in model.named_modules() if is_class(module, classes)]


def use_own_pointwise(model: PreTrainedModel) -> int:
    """Let graft's kernels compute norms and gates; return how many modules they take.

    Each is one operation, forward and backward, that keeps its inputs alone. Parameters keep their
    names. A norm whose weight trains stays as it is, and so does every module that no family
    names, or a model on a device without kernels for it.
    """
    if not has_own_pointwise(model.device):
        return 0
    norms = [
        name for name in own_norms(model) if not model.get_parameter(f"{name}.weight").requires_grad
    ]
    for name in norms:
        norm = model.get_submodule(name)
        epsilon = float(norm.variance_epsilon)  # type: ignore[arg-type]
        replace_module(model, name, RMSNorm(norm.get_parameter("weight"), epsilon))
    gates = own_gates(model)
    for name in gates:
        parts = (model.get_submodule(f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        replace_module(model, name, GatedMLP(*parts))
    return len(norms) + len(gates)
