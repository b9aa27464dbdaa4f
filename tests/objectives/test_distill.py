"""Distillation against a float64 loop, and the checks of its teacher."""

from __future__ import annotations

import pytest
import torch

from graft.data.examples import Example
from graft.model.load import load_model
from graft.model.running.attention import use_own_attention
from graft.objectives.config import ObjectiveConfig
from graft.objectives.registry import OBJECTIVES


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("head_trains", [False, True])
def test_loss_and_gradient_are_the_loops(packs, head_trains, tiny_base):
    model = load_model(str(tiny_base), dtype="float32").model.requires_grad_(False)
    teacher = load_model(str(tiny_base), dtype="float32").model
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    for one in (model, teacher):
        use_own_attention(one)
    leaves = [model.model.layers[0].mlp.down_proj.weight]
    leaves += [model.lm_head.weight] if head_trains else []
    for leaf in leaves:
        leaf.requires_grad_(True)
    config = ObjectiveConfig(distill_weight=0.7, distill_temperature=2.0)
    objective = OBJECTIVES["distill"].configured(config).taught(teacher)
    examples = [
        Example(list(range(9, 30)), [False] * 6 + [True] * 15, "one"),
        Example(list(range(40, 52)), [False] + [True] * 11, "two"),
    ]
    batch = (objective.pack if packs else objective.collate)(examples)
    loss, measured = objective.loss(model, batch)
    found = torch.autograd.grad(loss, leaves)
    nll = kl = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logits = model(input_ids=ids).logits[0].double()
        with torch.no_grad():
            told = teacher(input_ids=ids).logits[0].double()
        for place, target in enumerate(example.targets):
            if target:
                row, other = logits[place - 1], told[place - 1]
                nll = nll + torch.logsumexp(row, 0) - row[example.input_ids[place]]
                q = torch.softmax(other / 2, 0)
                kl = kl + 4 * (q * (q.log() - torch.log_softmax(row / 2, 0))).sum()
    expected = 0.3 * nll + 0.7 * kl
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert measured["divergence"] == pytest.approx(kl.item(), rel=1e-4)
    for one, other in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
