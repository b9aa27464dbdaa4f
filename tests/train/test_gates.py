from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.data.encode import EncodedData, Example
from graft.errors import GraftError
from graft.model.load import LoadedModel, load_model
from graft.model.targets import freeze_layers, select_targets
from graft.train.gates import DeadGradients, OutputProbe, eos_note, probed_step, raise_unchanged

ROW = Example(list(range(9, 60)), [False] + [True] * 50, "a row")


@pytest.fixture
def loaded(tiny_base: Path) -> LoadedModel:
    """The tiny base in bfloat16, with a LoRA that has dropout, in training mode."""
    found = load_model(str(tiny_base), dtype="bfloat16")
    names = select_targets(found.model, ())
    freeze_layers(found.model, names)
    attach_adapter(found.model, names, AdapterConfig(method="lora", rank=4, dropout=0.5))
    found.model.train()
    return found


def test_rows_that_do_not_train_their_end_are_told() -> None:
    whole = Example([1, 2, 0], [False, True, True], "whole", trains_eos=True)
    cut = Example([1, 2, 3], [False, True, True], "cut", cut=True)
    note = eos_note(EncodedData([whole, cut, cut], "text"), eos=True)
    assert note is not None and "in 1 of 3 rows (33%), and 2 are cut" in note
    assert "--max-length" in note
    assert eos_note(EncodedData([whole, cut], "text"), eos=True) is None
    assert eos_note(EncodedData([cut, cut], "text"), eos=False) is None


def test_a_tensor_that_nothing_reaches_is_named() -> None:
    a, b, idle = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    waits = nn.Parameter(torch.ones(2), requires_grad=False)
    dead = DeadGradients({"a": a, "b": b, "idle": idle, "waits": waits})
    for scale in (0.0, 1.0, 0.0):  # as a low-rank A beside a B that begins with zeros
        for parameter in (a, b, idle):
            parameter.grad = torch.zeros_like(parameter)
        assert a.grad is not None and b.grad is not None
        a.grad += scale
        b.grad += 1
        dead.look()
    note = dead.note(3)
    assert note is not None and "1 of 3 trained tensors" in note and "in 3 steps" in note
    assert ": idle." in note and "--targets" in note
    assert idle.grad is not None
    idle.grad += 1
    dead.look()
    assert dead.note(4) is None


def test_many_dead_tensors_are_counted() -> None:
    dead = DeadGradients({f"p{number}": nn.Parameter(torch.ones(1)) for number in range(8)})
    note = dead.note(10)
    assert note is not None and "p4 and 3 others" in note


def test_outputs_that_change_are_told_from_those_that_do_not(loaded: LoadedModel) -> None:
    state = torch.get_rng_state()
    probe = OutputProbe(loaded.model, ROW)
    assert not probe.changed()
    parameter = adapter_parameters(loaded.model, "default")["model.layers.0.self_attn.q_proj.B"]
    with torch.no_grad():
        parameter.fill_(1e-9)
    assert not probe.changed(), "bfloat16 rounds it away"
    with torch.no_grad():
        parameter.fill_(1e-1)
    assert probe.changed()
    assert torch.equal(torch.get_rng_state(), state) and loaded.model.training
    with pytest.raises(GraftError, match="step 12: .*raise --learning-rate"):
        raise_unchanged(12)


def test_outputs_are_asked_for_once_the_rate_is_whole() -> None:
    assert probed_step(100, 0.05) == 10
    assert probed_step(1000, 0.05) == 51
    assert probed_step(4, 0.05) == 10, "too short to tell"
