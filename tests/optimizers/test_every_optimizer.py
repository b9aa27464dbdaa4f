"""What every optimizer says of its states: their names, their bytes, how they are restored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graft.optimizers.registry import DEFAULT_OPTIMIZER, OPTIMIZERS
from graft.train.config import LoopConfig

every = pytest.mark.parametrize("name", list(OPTIMIZERS))


class Training:
    """Two parameters that are pulled along fixed gradients, and one that is not trained yet."""

    def __init__(self, name: str) -> None:
        self.kind = OPTIMIZERS[name]
        drawn = torch.Generator().manual_seed(1)
        self.parameters = [
            nn.Parameter(torch.randn(shape, generator=drawn)) for shape in ((3, 256), (5,))
        ]
        self.idle = nn.Parameter(torch.zeros(4), requires_grad=False)
        groups = [{"params": [*self.parameters, self.idle], "factor": 1.0}]
        settings = LoopConfig(out="", weight_decay=0.1)
        self.optimizer = self.kind.make(groups, 1e-2, settings, torch.device("cpu"))

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            drawn = torch.Generator().manual_seed(step)
            for parameter in self.parameters:
                parameter.grad = torch.randn(parameter.shape, generator=drawn)
            self.optimizer.step()


@every
def test_what_is_restored_goes_on_with_equal_bits(name):
    unbroken, broken = Training(name), Training(name)
    unbroken.steps(1, 3)
    for ours, theirs in zip(unbroken.parameters, broken.parameters, strict=True):
        with torch.no_grad():
            theirs.copy_(ours)
        saved = unbroken.kind.saved(unbroken.optimizer.state[ours])
        assert all(tensor.dim() for tensor in saved.values()), "a file holds no plain numbers"
        copies = {key: tensor.clone() for key, tensor in saved.items()}
        state = broken.kind.restored(copies, theirs, broken.optimizer)
        broken.optimizer.state[theirs].update(state)
    unbroken.steps(4, 6)
    broken.steps(4, 6)
    assert not torch.equal(unbroken.parameters[0], Training(name).parameters[0])
    for ours, theirs in zip(unbroken.parameters, broken.parameters, strict=True):
        assert torch.equal(ours, theirs)


@every
def test_its_states_are_those_that_it_names(name):
    training = Training(name)
    training.steps(1, 1)
    kind, state = training.kind, training.optimizer.state
    assert kind.name == name
    size = sum(parameter.nbytes for parameter in training.parameters)
    numbers = sum(parameter.numel() for parameter in training.parameters)
    kept = 0
    for parameter in training.parameters:
        assert set(state[parameter]) == set(kind.states)
        saved = kind.saved(state[parameter])
        assert kind.specs(parameter) == {
            key: (tuple(tensor.shape), tensor.dtype) for key, tensor in saved.items()
        }
        kept += sum(state[parameter][key].nbytes for key in set(kind.states) - set(kind.scalars))
    assert kept == kind.state_bytes(numbers, size)
    assert kind.saved(state[training.idle]) == {}, "what has not trained has no state"


def test_one_of_them_is_the_default():
    assert LoopConfig(out="").optimizer == DEFAULT_OPTIMIZER
    assert DEFAULT_OPTIMIZER in OPTIMIZERS
    assert all(OPTIMIZERS.summary(name) for name in OPTIMIZERS)
