"""What a kind of optimizer says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class StateSpec(NamedTuple):
    """How a state lies in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


_SCALAR = StateSpec((1,), torch.float32)


class OptimizerSettings(Protocol):
    """What an optimizer is told of the training's configuration."""

    @property
    def weight_decay(self) -> float:
        """How fast weights decay, per unit of the learning rate."""

    @property
    def max_grad_norm(self) -> float:
        """The norm that gradients are scaled down to."""


class OptimizerKind(ABC):
    """How an optimizer is made, and the states that it keeps of each trained parameter."""

    name: str
    states: tuple[str, ...]
    """Names of a parameter's states, by which the optimizer and a checkpoint's file know them."""
    scalars: tuple[str, ...] = ()
    """Those of the states that are one number; a file holds them as vectors of length 1."""
    memory_note: str
    """What the memory plan says of the states, such as 'AdamW: two states per parameter'."""

    @abstractmethod
    def make(
        self,
        groups: list[dict[str, Any]],
        learning_rate: float,
        settings: OptimizerSettings,
        device: torch.device,
    ) -> torch.optim.Optimizer:
        """Return an optimizer of parameters that lie on `device`, without any state yet.

        groups: torch's parameter groups; the loop sets `lr` of each before every step.
        """

    @abstractmethod
    def state_bytes(self, numbers: int, size: int) -> int:
        """Return the bytes of the states of so many trained numbers, themselves of `size` bytes."""

    def specs(self, parameter: Tensor) -> dict[str, StateSpec]:
        """Return the shape and dtype that a file holds each of a parameter's states in.

        A checkpoint is held against them before anything of it is used. By default a state is as
        the parameter, and a scalar a float32 vector of length 1.
        """
        own = StateSpec(tuple(parameter.shape), parameter.dtype)
        return dict.fromkeys(self.states, own) | dict.fromkeys(self.scalars, _SCALAR)

    def saved(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a parameter's state as the tensors of a file; none for one that has not trained.

        Going on from `restored` of them must give the bits of a run that was not interrupted.
        """
        if not state:
            return {}
        tensors = {name: torch.as_tensor(state[name]) for name in self.states}
        return tensors | {name: tensors[name].reshape(1) for name in self.scalars}

    def restored(
        self,
        saved: Mapping[str, Tensor],
        parameter: nn.Parameter,
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, Any]:
        """Return a parameter's state from what `saved` gave; the tensors may be kept."""
        tensors = {**saved, **{name: saved[name][0] for name in self.scalars}}
        return {name: tensor.to(parameter.device) for name, tensor in tensors.items()}
