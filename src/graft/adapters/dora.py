"""DoRA: a low-rank update that turns the rows of a weight, and the length of each row."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.adapters.lora import LoraAdapter
from graft.kernels.low_rank.ops import Operands, lora_linear, operands
from graft.kernels.low_rank.row_norms import dora_norms, row_squares
from graft.layers.frozen import FrozenLinear

_TINY = torch.finfo(torch.float32).tiny
"""Stands for the norm of a row of zeros, which stays 0 whatever it is divided by."""


class DoraAdapter(LoraAdapter):
    """y = m / |W + s B A| (W x + s B A x), the norm taken row by row (DoRA, arXiv 2402.09353).

    A, B and s are LoRA's; m: float32 [out_features], |W + s B A| at the start, so that training
    starts from the base model. The norm is a constant in the gradient (section 4.3). Dropout acts
    on what is beyond W x, as in PEFT: y = W x + (m / |..| (W + s B A) - W) dropout(x). The layer's
    own bias is not scaled. |W|² is computed once, from the frozen weight, and is not saved.

    The factor m / |..| is float32 whatever x is: in bfloat16 the next number after 1 is 1.008.
    """

    squares: Tensor

    def __init__(
        self,
        base: FrozenLinear,
        rank: int,
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        device = next(base.parameters()).device
        sizes = base.in_features, base.out_features
        super().__init__(*sizes, rank, alpha, rslora, dropout, device=device)
        if device.type == "meta":
            squares = torch.empty(base.out_features, device=device)
        else:
            with torch.no_grad():
                squares = row_squares(base.dense_weight(torch.float32))
        self.register_buffer("squares", squares, persistent=False)
        self.magnitude = nn.Parameter(squares.sqrt())
        self._kept: tuple[list[tuple[int, int]], Tensor] | None = None

    def norms(self, base: FrozenLinear) -> Tensor:
        """Return |W + s B A| of each row, float32 [out_features], without a gradient."""
        return self._norms(operands(base.kernel_weight()))

    def _norms(self, weight: Operands) -> Tensor:
        low_rank = self.A.detach(), self.B.detach(), self.scaling
        out: Tensor = dora_norms(*weight, *low_rank, self.squares)
        return out

    def _factor(self, weight: Operands) -> Tensor:
        """Return m / |W + s B A|, float32 [out_features]; differentiable in m.

        Without gradients it is kept until a parameter changes: a token that is decoded costs less
        than the norms. A forward pass that records gradients drops it, as an optimizer that goes
        past PyTorch's count of changes may follow.
        """
        if torch.is_grad_enabled():
            self._kept = None
            return self.magnitude / self._norms(weight).clamp_min(_TINY)
        state = [(p.data_ptr(), p._version) for p in self.parameters()]
        if self._kept is None or self._kept[0] != state:
            self._kept = state, self.magnitude / self._norms(weight).clamp_min(_TINY)
        return self._kept[1]

    def _scaled(self, x: Tensor, base: FrozenLinear) -> Tensor:
        """Return m / |..| (W x + s B A x) in x's dtype."""
        weight = operands(base.kernel_weight())
        y: Tensor = lora_linear(x, *weight, self.A, self.B, self.scaling)[0]
        return (y * self._factor(weight)).to(y.dtype)

    def added_output(self, x: Tensor, base: FrozenLinear) -> Tensor:
        """Return (m / |..| (W + s B A) - W) x in x's dtype."""
        dropped = functional.dropout(x, self.dropout, self.training)
        own = base.weight_format.linear(dropped, base.packed, base.out_features)
        return self._scaled(dropped, base) - own

    def fused_output(self, x: Tensor, base: FrozenLinear) -> Tensor:
        """Return m / |..| (W x + s B A x); where dropout leaves x', W (x - x') on top of that."""
        if not (self.dropout and self.training):
            return self._scaled(x, base)
        dropped = functional.dropout(x, self.dropout, True)
        lost = base.weight_format.linear(x - dropped, base.packed, base.out_features)
        return lost + self._scaled(dropped, base)

    def delta(self, base: FrozenLinear) -> Tensor:
        """Return m / |W + s B A| (W + s B A) - W, float64 [out_features, in_features]."""
        weight = base.dense_weight(torch.float32).double()
        moved = super().delta(base).add_(weight)
        lengths = torch.linalg.vector_norm(moved, dim=1).clamp_min(_TINY)
        return moved.mul_((self.magnitude.double() / lengths)[:, None]).sub_(weight)
