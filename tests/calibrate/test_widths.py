from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from graft.calibrate.widths import allocate, choose_widths, measure_widths
from graft.errors import GraftError
from graft.formats.base import storage_bytes
from graft.formats.int_group import IntGroupFormat
from graft.model.load import load_model
from graft.model.targets import freeze_layers, linear_layers

FORMATS = [IntGroupFormat(bits=bits) for bits in (2, 3, 4, 8)]


@pytest.mark.parametrize("seed", range(30))
def test_the_allocation_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    layers = [f"layer{index}" for index in range(draw.randint(1, 6))]
    step = draw.choice([1, 1, 7, 512])
    costs = {name: sorted((draw.random() for _ in range(4)), reverse=True) for name in layers}
    if seed % 3 == 0:  # rounding to more bits is not always better
        costs = {name: draw.sample(cost, 4) for name, cost in costs.items()}
    sizes = {name: [step * draw.randint(1, 40) for _ in range(4)] for name in layers}
    least, most = (sum(f(size) for size in sizes.values()) for f in (min, max))
    for budget in (least, draw.randint(least, most), most, most + 9):
        picked = allocate(costs, sizes, budget)
        assert list(picked) == layers
        assert sum(sizes[name][index] for name, index in picked.items()) <= budget
        found = sum(costs[name][index] for name, index in picked.items())
        best = min(
            sum(costs[name][index] for name, index in zip(layers, choice, strict=True))
            for choice in itertools.product(range(4), repeat=len(layers))
            if sum(sizes[n][i] for n, i in zip(layers, choice, strict=True)) <= budget
        )
        assert found == pytest.approx(best, abs=1e-12)
        assert picked == allocate(costs, sizes, budget)


def test_sizes_without_a_common_divisor_stay_within_the_budget() -> None:
    draw = random.Random(0)
    layers = [str(index) for index in range(40)]
    costs = {name: [8 * (c := draw.random()), 3 * c, c, 0.1 * c] for name in layers}
    sizes = {name: [n := draw.randint(10**6, 10**7), n + n // 3, 2 * n, 4 * n] for name in layers}
    budget = sum(size[2] for size in sizes.values())
    picked = allocate(costs, sizes, budget)
    spent = sum(sizes[name][index] for name, index in picked.items())
    assert 0.99 * budget < spent <= budget
    uniform = sum(cost[2] for cost in costs.values())
    assert sum(costs[name][index] for name, index in picked.items()) < uniform


def test_a_budget_below_the_smallest_is_refused(tiny_base: Path) -> None:
    with pytest.raises(GraftError, match="holds 9 bytes.*take 10"):
        allocate({"a": [1.0, 0.5]}, {"a": [10, 20]}, 9)
    loaded = load_model(str(tiny_base))
    names = list(linear_layers(loaded.model))
    freeze_layers(loaded.model, names)
    with pytest.raises(GraftError, match=r"--budget 2.9: .* takes 3.000 bits"):
        choose_widths(loaded.model, names, [], FORMATS, 2.9)


def test_costs_and_the_choice(tiny_base: Path) -> None:
    loaded = load_model(str(tiny_base), dtype="float32", device="cpu")
    model, names = loaded.model, list(linear_layers(loaded.model))
    freeze_layers(model, names)
    batches = [torch.randint(0, 300, (2, 20)), torch.randint(0, 300, (1, 33))]
    costs = measure_widths(model, names, batches, FORMATS)
    assert list(costs) == names

    inputs = {name: [] for name in names}
    gradients = {name: [] for name in names}
    for name in names:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, x, n=name: inputs[n].append(x[0].detach()))
        layer.register_full_backward_hook(lambda _, __, g, n=name: gradients[n].append(g[0]))
    model.get_input_embeddings().weight.requires_grad_(True)
    for ids in batches:
        logits = model(input_ids=ids).logits
        losses = functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
        losses.sum().backward()
    for name in names:
        layer = model.get_submodule(name)
        weight = layer.dense_weight().double()
        for chosen, cost in zip(FORMATS, costs[name], strict=True):
            rounded = layer.replaced(chosen, chosen.pack(weight.float())).dense_weight().double()
            moved = [(x.double() @ (weight - rounded).T).square().sum(-1) for x in inputs[name]]
            power = [g.double().square().sum(-1) for g in gradients[name]]
            mean = [
                torch.cat([part.flatten() for part in parts]).mean() for parts in (moved, power)
            ]
            expected = mean[0] * mean[1] / layer.out_features
            assert cost == pytest.approx(expected.item(), rel=1e-4)

    layers = linear_layers(model)
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    for budget in (3.0, 4.2, 9.0):
        picked = choose_widths(model, names, batches, FORMATS, budget)
        size = sum(
            storage_bytes(one, layers[name].out_features, layers[name].in_features)
            for name, one in picked.items()
        )
        assert 8 * size / weights <= budget
        assert 8 * size / weights > budget - 0.3
    assert {one.bits for one in picked.values()} == {8}
