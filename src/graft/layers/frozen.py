"""A linear layer whose weight is frozen in a weight format."""

from __future__ import annotations

from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graft.formats.base import Packed, WeightFormat
from graft.kernels.frozen.ops import linear
from graft.kernels.packed.weight import Weight
from graft.kernels.rounded.ops import rounded_inputs, rounded_linear
from graft.layers.config import Activations


class _Held(NamedTuple):
    """The weight of a layer, and what it was made from."""

    weight_format: WeightFormat
    parameters: tuple[Tensor, ...]
    weight: Weight


class FrozenLinear(nn.Module):
    """y = x Wᵀ + bias, with W in a weight format and nothing trainable.

    The packed tensors are parameters (not buffers) with requires_grad False, under the names that
    the format's `storage` gives them: they shard, save and memory-map like any other parameter.

    `transposed` says that the layer stands for one that stores W as [in_features, out_features]
    (GPT-2's Conv1D); the packed weight is [out_features, in_features] either way.
    """

    bias: Tensor | None
    activations: Activations = "float"
    """What the weight is multiplied with; see `graft.layers.config`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_format: WeightFormat,
        packed: Packed,
        bias: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight_format = weight_format
        self.transposed = transposed
        self._check(packed)
        for name, tensor in packed.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._packed_names = tuple(packed)
        self._held: _Held | None = None
        self.stands_for: tuple[nn.Module, ...] = ()
        """The plain module in whose place it is, without its parameters; none where it was read
        packed. A tuple, so that it is no module of this one."""
        frozen_bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen_bias)

    def _check(self, packed: Packed) -> None:
        specs = self.weight_format.storage(self.out_features, self.in_features)
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()}
        expected = {name: (spec.shape, spec.dtype) for name, spec in specs.items()}
        if found != expected:
            raise ValueError(
                f"packed tensors of {self.weight_format.name} are {found}; expected {expected}"
            )

    @property
    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return {name: self.get_parameter(name) for name in self._packed_names}

    @property
    def storage_bytes(self) -> int:
        """Bytes of the packed weight, without the bias."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.packed.values())

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias in x's dtype; x [..., in_features], rounded where it is to be."""
        return self.add_bias(self._product(x, self.kernel_weight()))

    def _product(self, x: Tensor, weight: Weight) -> Tensor:
        y: Tensor
        if self.rounds:
            y = rounded_linear(x, weight, self.activations == "q8")
        else:
            y = linear(x, weight)
        return y

    @property
    def rounds(self) -> bool:
        """Whether the weight meets rounded inputs."""
        return self.activations != "float" and self.weight_format.meets_rounded

    def met(self, x: Tensor) -> Tensor:
        """Return what the weight meets of x, and adapters beside it: x, or x rounded to 8 bits."""
        return rounded_inputs(x, self.activations == "q8") if self.rounds else x

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        """Return the layer's output with other packed tensors in place of its own."""
        return self.add_bias(self._product(x, self._weight_of(packed)))

    def add_bias(self, y: Tensor) -> Tensor:
        """Return y + bias, if there is one."""
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def kernel_weight(self) -> Weight:
        """Return the packed weight as the operations take it.

        It is the same until a parameter or the format is replaced, unless it is computed from the
        packed tensors.
        """
        held, parameters = self._held, map(self._parameters.get, self._packed_names)
        if (
            held is not None
            and held.weight_format is self.weight_format
            and all(map(is_, held.parameters, parameters))
        ):
            return held.weight
        packed = self.packed
        weight = self._weight_of(packed)
        own = tuple(packed.values())
        if all(part is None or any(part is tensor for tensor in own) for part in weight.tensors):
            self._held = _Held(self.weight_format, own, weight)
        return weight

    def _weight_of(self, packed: Packed) -> Weight:
        return self.weight_format.kernel_weight(packed, self.out_features, self.in_features)

    def dense_weight(
        self, dtype: torch.dtype = torch.float32, packed: Packed | None = None
    ) -> Tensor:
        """Return the weight [out_features, in_features] that the packed tensors stand for."""
        tensors = self.packed if packed is None else packed
        return self.weight_format.unpack(tensors, self.out_features, self.in_features, dtype)

    def replaced(self, weight_format: WeightFormat, packed: Packed) -> FrozenLinear:
        """Return a new layer with another weight and this layer's shape and bias."""
        new = type(self)(
            self.in_features, self.out_features, weight_format, packed, self.bias, self.transposed
        )
        new.activations = self.activations
        return new

    def extra_repr(self) -> str:
        """Return what print(model) shows."""
        options = ", ".join(f"{key}={value}" for key, value in self.weight_format.options().items())
        return (
            f"{self.in_features}, {self.out_features}, {self.weight_format.name}({options}), "
            f"bias={self.bias is not None}"
        )
