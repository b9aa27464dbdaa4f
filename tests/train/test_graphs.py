"""Recorded steps: what is replayed in place of a CUDA graph gives the steps without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.data.batches import IGNORED, Batch
from graft.errors import GraftError
from graft.formats.registry import make_format
from graft.layers.registry import kind_of
from graft.model.running.attention import use_own_attention
from graft.model.running.checkpointing import enable_checkpointing
from graft.model.targets import select_targets
from graft.objectives.base import Objective
from graft.objectives.next_token import NEXT_TOKEN
from graft.train import graphs
from graft.train.graphs import GraphedGradients

VOCABULARY = 50


@dataclass
class Replayed:
    """Stands for CUDA's graphs: calls the function anew, and writes where the first call wrote.

    As theirs do, all of them overwrite each other's results: it fills them with NaN.
    """

    results: list[list[Tensor]] = field(default_factory=list)
    replays: int = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        state = torch.get_rng_state()
        recorded = run()
        torch.set_rng_state(state)  # a graph that is recorded draws nothing
        own = [leaf for leaf in tree_leaves(recorded) if isinstance(leaf, Tensor)]
        self.results.append(own)
        self._spoil()

        def replay() -> None:
            self.replays += 1
            self._spoil()
            fresh = [leaf for leaf in tree_leaves(run()) if isinstance(leaf, Tensor)]
            for to, of in zip(own, fresh, strict=True):
                to.detach().copy_(of)

        return recorded, replay

    def _spoil(self) -> None:
        for result in self.results:
            for tensor in result:
                tensor.detach().fill_(torch.nan)


def adapted(dropout: float = 0.0) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    assert use_own_attention(model)
    dense = make_format("dense", {"dtype": "float32"})
    for name in select_targets(model, ()):
        module = model.get_submodule(name)
        packed = dense.pack(module.weight.detach())
        parent, _, child = name.rpartition(".")
        layer = kind_of(module).frozen(module, dense, packed, None)
        setattr(model.get_submodule(parent), child, layer)
    lora = AdapterConfig(method="lora", rank=4, dropout=dropout)
    attach_adapter(model, select_targets(model, ()), lora.resolved(None))
    parameters = adapter_parameters(model, "default")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train(), parameters


def batch(rows: int, length: int, seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=draw)
    trained = torch.rand(rows, length, generator=draw) < 0.7
    return Batch(ids, ids.where(trained, IGNORED))


STEPS = [  # the batches of each step: shapes that come again, alone, together and mixed
    [(2, 9)],
    [(2, 9)],
    [(2, 9), (2, 9)],
    [(3, 70), (2, 9)],
    [(3, 70), (2, 9), (3, 70)],
    [(2, 9), (3, 70), (1, 5)],
]


def trained(
    add: Callable[[Batch, float], Tensor], parameters: dict[str, nn.Parameter]
) -> tuple[list[float], list[Tensor]]:
    """The losses of all batches, and the parameters after all steps."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    losses = []
    for step, shapes in enumerate(STEPS):
        batches = [batch(*shape, seed=10 * step + at) for at, shape in enumerate(shapes)]
        targets = sum(one.targets for one in batches)
        kept = [add(one, targets) for one in batches]
        losses += [loss.item() for loss in kept]
        nn.utils.clip_grad_norm_(list(parameters.values()), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, [parameter.detach().clone() for parameter in parameters.values()]


def plainly(model: PreTrainedModel) -> Callable[[Batch, float], Tensor]:
    def add(one: Batch, targets: float) -> Tensor:
        loss, _ = NEXT_TOKEN.loss(model, one)
        (loss / targets).backward()
        return loss.detach()

    return add


def recorded(
    model: PreTrainedModel, parameters: dict[str, nn.Parameter], **options: Any
) -> tuple[GraphedGradients, Replayed, list[str]]:
    notes: list[str] = []
    replayed = Replayed()
    graphed = GraphedGradients(
        model, parameters, NEXT_TOKEN, notes.append, record=replayed, **options
    )
    return graphed, replayed, notes


def test_recorded_steps_are_those_without() -> None:
    model, parameters = adapted()
    losses, after = trained(plainly(model), parameters)
    model, parameters = adapted()
    graphed, replayed, notes = recorded(model, parameters)
    found, moved = trained(graphed.add, parameters)
    assert found == pytest.approx(losses, rel=1e-5)
    for ours, theirs in zip(moved, after, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # Of three shapes after padding to 64; the first batch of each is computed as it comes.
    assert len(replayed.results) == 2 and replayed.replays == sum(map(len, STEPS)) - 3
    assert notes == []


def test_dropout_draws_anew_in_each_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "ROUNDING", 1)
    model, parameters = adapted(dropout=0.3)
    torch.manual_seed(1)
    losses, after = trained(plainly(model), parameters)
    model, parameters = adapted(dropout=0.3)
    torch.manual_seed(1)
    found, moved = trained(recorded(model, parameters)[0].add, parameters)
    assert found == pytest.approx(losses, rel=1e-5)
    for ours, theirs in zip(moved, after, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_graph_is_recorded_anew_when_its_parameters_moved() -> None:
    model, parameters = adapted()
    graphed, replayed, _ = recorded(model, parameters)
    for _ in range(3):
        graphed.add(batch(2, 9, 0), 10)
    assert len(replayed.results) == 1
    for parameter in parameters.values():
        parameter.grad = None
        parameter.data = parameter.data.clone()
    graphed.add(batch(2, 9, 0), 10)
    assert len(replayed.results) == 2
    ours = [parameter.grad.clone() for parameter in parameters.values()]
    for parameter in parameters.values():
        parameter.grad = None
    plainly(model)(batch(2, 9, 0), 10)
    for mine, parameter in zip(ours, parameters.values(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


def test_more_shapes_than_are_recorded_are_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    model, parameters = adapted()
    graphed, replayed, notes = recorded(model, parameters)
    for rows in (1, 2, 3, 2, 1):
        assert graphed.add(batch(rows, 9, 0), 10).isfinite()
    assert len(replayed.results) == 1 and replayed.replays == 1
    assert len(notes) == 1 and "[2, 64]" in notes[0]


def test_the_loss_of_a_fixed_shape_is_the_loss() -> None:
    model, parameters = adapted()
    one = batch(3, 20, 5)
    theirs, _ = NEXT_TOKEN.loss(model, one)
    ours = NEXT_TOKEN.fixed_loss(model, one.input_ids, one.labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    some = list(parameters.values())
    both = (torch.autograd.grad(loss, some) for loss in (ours, theirs))
    for mine, other in zip(*both, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


class Asking(Objective):
    name = "asking"

    def loss(self, model: Any, batch: Any) -> Any:
        raise NotImplementedError


def test_what_cannot_be_recorded_is_refused() -> None:
    model, parameters = adapted()
    with pytest.raises(GraftError, match="the model is on cpu"):
        GraphedGradients(model, parameters, NEXT_TOKEN, print)
    with pytest.raises(GraftError, match="asking asks for numbers"):
        GraphedGradients(model, parameters, Asking(), print, record=Replayed())
    with pytest.raises(GraftError, match="changes its layers"):
        recorded(model, parameters, changes=True)
    model.config.sliding_window = 8
    with pytest.raises(GraftError, match="a window of 8 tokens"):
        recorded(model, parameters)
    model.config.sliding_window = None
    enable_checkpointing(model, "layers")
    with pytest.raises(GraftError, match="--checkpointing none"):
        recorded(model, parameters)
    with pytest.raises(GraftError, match="LlamaForCausalLM does not leave its attention"):
        recorded(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1)), parameters)
