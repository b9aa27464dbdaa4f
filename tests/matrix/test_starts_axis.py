"""Every start on every format with every method that takes it: trained, saved, loaded, merged."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.adapters.starting import begun, error, problems, spread_weight
from tests.matrix.test_axes import ADAPTERS, CHOSEN, IN, NEEDS, OUT, VARIANTS

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.attach import adapted_layers
from graft.adapters.config import AdapterConfig
from graft.adapters.merge import merge
from graft.adapters.starts.registry import STARTS
from graft.formats.dense import DenseFormat
from graft.formats.registry import make_format
from graft.layers.frozen import FrozenLinear
from graft.model.adapter_files import load_adapter, read_factors, save_adapter

RANK = 4


def fits(method: str, init: str) -> bool:
    return not problems(AdapterConfig(**ADAPTERS[method], rank=RANK, init=init))


KINDS = {CHOSEN[name].adapter: name for name in reversed(ADAPTERS)}
"""A method of each kind of adapter: others differ in their base alone."""
FORMATS = {variant.values[0]: variant for variant in VARIANTS}
FORMATS["narrow int"] = VARIANTS[[variant.id for variant in VARIANTS].index("int-2-8")]
CASES = [
    pytest.param(*variant.values, method, init, id=f"{variant.id}-{method}-{init}")
    for variant in FORMATS.values()
    for method in KINDS.values()
    for init in STARTS
    if init != "default"
    and fits(method, init)
    and NEEDS.get(method, variant.values[0]) == variant.values[0]
    and not (init == "loftq" and variant.values[0] in ("dense", "latent"))
]


def trained(layer: AdaptedLinear) -> AdaptedLinear:
    parameters = list(layer.adapters.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    x, y = torch.randn(32, IN), torch.randn(32, OUT)
    losses = []
    for _ in range(4):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return layer.eval()


def in_a_model(layer: torch.nn.Module) -> torch.nn.Module:
    model = torch.nn.Module()
    model.layer = layer
    return model


@pytest.mark.parametrize(("name", "options", "method", "init"), CASES)
def test_start_train_save_and_merge(name, options, method, init, tmp_path) -> None:
    weight, x = spread_weight(OUT, IN), torch.randn(64, IN)
    kept = make_format(name, options)
    layer = begun(weight, x, kept, **ADAPTERS[method], rank=RANK, init=init)
    moved = STARTS[init].changes_base
    if not (moved and kept.quantised):
        own = weight if moved or not kept.quantised else layer.base.dense_weight()
        narrow = name == "dense" and options
        assert error(layer.effective_weight(), own) < (1e-2 if narrow else 1e-6)
    start = in_a_model(copy.deepcopy(layer))
    trained(layer)
    result = merge(layer)
    if result.error.exact:
        assert torch.equal(result.layer(x), layer(x))
    else:
        torch.testing.assert_close(result.layer(x), layer(x), rtol=1e-5, atol=1e-5)
        assert result.error.relative_to_update < 1e-4

    save_adapter(in_a_model(layer), tmp_path / "own", base="base", init=init)
    again = in_a_model(copy.deepcopy(layer.base))
    if moved and not kept.quantised:
        # A part of the dense weights: what was trained, on the weights as they were.
        save_adapter(start, tmp_path / "start", base="base", init=init)
        began = read_factors(tmp_path / "start")
        save_adapter(in_a_model(layer), tmp_path / "plain", base="base", began=began)
        whole = FrozenLinear(IN, OUT, DenseFormat("float32"), {"weight": weight})
        model = in_a_model(whole)
        load_adapter(model, tmp_path / "plain")
        ((_, loaded),) = adapted_layers(model)
        assert loaded.adapter("default").A.shape == (2 * RANK, IN)
        assert error(loaded.effective_weight(), layer.effective_weight()) < 1e-6
        return
    load_adapter(again, tmp_path / "own")
    ((_, loaded),) = adapted_layers(again)
    assert torch.equal(loaded.eval()(x), layer(x))
