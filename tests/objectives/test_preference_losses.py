"""The losses on preferences against float64 loops over whole logits, and what they hand back."""

from __future__ import annotations

import math

import pytest
import torch

from graft.data.config import DataConfig
from graft.data.examples import sequences_of
from graft.data.load import load_train_and_eval
from graft.model.load import load_model
from graft.model.running.attention import use_own_attention
from graft.model.running.token_losses import target_losses
from graft.objectives.config import ObjectiveConfig
from graft.objectives.reference import Referenced, find_out, unknown
from graft.objectives.registry import OBJECTIVES

SETTINGS = ObjectiveConfig(beta=0.3, label_smoothing=0.1, wanted_weight=1.5, unwanted_weight=0.5)


@pytest.fixture(scope="module")
def loaded(tiny_base):
    found = load_model(str(tiny_base), dtype="float32")
    use_own_attention(found.model)
    found.model.requires_grad_(False)
    found.model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    return found


def rows_of(loaded, path, name):
    objective = OBJECTIVES[name].configured(SETTINGS)
    config = DataConfig(data=str(path), max_length=40)
    data, _ = load_train_and_eval(config, loaded.tokenizer, None, 0, holds=objective.holds)
    data = objective.arranged(data, 40)
    known = unknown(data.examples)
    generator = torch.Generator().manual_seed(1)
    known[:] = -20 - 5 * torch.rand(known.shape, generator=generator).double().numpy()
    return objective, Referenced(data.examples, known)[:6]


def sums_of(model, side):
    """The log-probabilities of a sequence's targets, one by one in float64."""
    logits = model(input_ids=torch.tensor([side.input_ids])).logits[0].double()
    found = []
    for place, target in enumerate(side.targets):
        if target:
            row = logits[place - 1]
            found.append(row[side.input_ids[place]] - torch.logsumexp(row, 0))
    return torch.stack(found)


def truth(name, model, examples):
    b, e = SETTINGS.beta, SETTINGS.label_smoothing
    total, margins = torch.zeros((), dtype=torch.float64), []
    if name == "kto":
        apart = [
            sums_of(model, sequences_of(one)[-1]).sum() - one.values["reference"][-1]
            for one in examples
        ]
        z = max(0.0, (b * torch.stack(apart).mean()).item())
    for one in examples:
        sides = sequences_of(one)
        known = one.values.get("reference")
        for number, wanted in enumerate(one.values["wanted"] if name == "kto" else ()):
            r = b * (sums_of(model, sides[number]).sum() - known[number])
            if wanted:
                total = total + SETTINGS.wanted_weight * (1 - torch.sigmoid(r - z))
            else:
                total = total + SETTINGS.unwanted_weight * (1 - torch.sigmoid(z - r))
        if name == "dpo":
            chosen, rejected = (
                b * (sums_of(model, side).sum() - value)
                for side, value in zip(sides, known, strict=True)
            )
            d = chosen - rejected
            total = total + (1 - e) * torch.log1p(torch.exp(-d)) + e * torch.log1p(torch.exp(d))
            margins.append(d.item())
        if name == "orpo":
            chosen, rejected = (sums_of(model, side).mean() for side in sides)
            odds = [torch.exp(m) / (1 - torch.exp(m)) for m in (chosen, rejected)]
            ratio = torch.log(odds[0] / odds[1])
            total = total - chosen + b * torch.log1p(torch.exp(-ratio))
            margins.append(b * (chosen - rejected).item())
    return total, margins


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_loss_and_gradient_are_the_loops(name, packs, loaded, preferences, labelled):
    objective, examples = rows_of(loaded, labelled if name == "kto" else preferences, name)
    model = loaded.model
    weight = model.model.layers[0].mlp.down_proj.weight
    batch = (objective.pack if packs else objective.collate)(examples)
    loss, measured = objective.loss(model, batch)
    (gradient,) = torch.autograd.grad(loss, weight)
    expected, margins = truth(name, model, examples)
    (wanted,) = torch.autograd.grad(expected, weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert batch.targets == len(examples)
    if margins:
        assert measured["reward_margin"] == pytest.approx(sum(margins), rel=1e-4)
        assert measured["reward_accuracy"] == sum(one > 0 for one in margins)


def test_pairs_serve_kto_as_two_answers(loaded, preferences):
    objective, examples = rows_of(loaded, preferences, "kto")
    batch = objective.collate(examples)
    assert batch.targets == 2 * len(examples)
    loss, measured = objective.loss(loaded.model, batch)
    expected, _ = truth("kto", loaded.model, examples)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    means = objective.measured({name: value / batch.targets for name, value in measured.items()})
    margin = means["reward_chosen"] - means["reward_rejected"]
    assert means["reward_margin"] == pytest.approx(margin)


def test_a_row_has_the_next_ones_answer_behind_its_prompt(loaded, labelled):
    objective, examples = rows_of(loaded, labelled, "kto")
    own, other = sequences_of(examples[0])
    following = sequences_of(examples[1])[0]
    begin, answer = own.targets.index(True), following.targets.index(True)
    assert other.input_ids == (own.input_ids[:begin] + following.input_ids[answer:])[:40]
    assert examples.facts.lengths[0] == len(examples[0].input_ids)


def test_before_training_no_answer_has_a_reward(loaded, preferences):
    objective, examples = rows_of(loaded, preferences, "dpo")
    known = unknown(examples)
    find_out(known, loaded.model, examples, range(len(examples)), 4)
    again = Referenced(examples, known)
    loss, measured = objective.loss(loaded.model, objective.pack(list(again)))
    assert loss.item() / len(examples) == pytest.approx(math.log(2), rel=1e-4)
    assert measured["reward_margin"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("head_trains", [False, True])
def test_each_targets_loss_weighs_its_own_gradient(head_trains, tiny_base):
    model = load_model(str(tiny_base), dtype="float32").model.requires_grad_(False)
    head, inner = model.lm_head.weight, model.model.layers[0].mlp.down_proj.weight
    head.requires_grad_(head_trains)
    inner.requires_grad_(True)
    ids = torch.randint(5, 60, (3, 300), generator=torch.Generator().manual_seed(2))
    labels = ids.where(torch.arange(300) % 3 > 0, -100)
    weights = torch.randn(int((labels[:, 1:] >= 0).sum()))
    leaves = [head, inner] if head_trains else [inner]
    found = torch.autograd.grad((target_losses(model, ids, labels) * weights).sum(), leaves)
    logits = model(input_ids=ids).logits[:, :-1]
    asked = labels[:, 1:] >= 0
    losses = torch.nn.functional.cross_entropy(
        logits[asked].double(), labels[:, 1:][asked], reduction="none"
    )
    expected = torch.autograd.grad((losses * weights).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
