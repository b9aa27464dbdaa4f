"""Every registered format against every adapter, and every format as the target of a merge."""

from __future__ import annotations

import pytest
import torch

from graft.adapters.attach import adapted_layer, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.adapters.merge import merge
from graft.adapters.registry import METHODS, method_of
from graft.calibrate.gptq import gptq_pack
from graft.calibrate.hessian import output_error
from graft.errors import GraftError
from graft.formats.base import GridFormat
from graft.formats.registry import FORMATS, make_format
from graft.layers.frozen import FrozenLinear

CODEBOOKS = [("nf4", False), ("nf4", True), ("fp4", False)]
OPTIONS = {
    "nf4": [{}, {"double_quant": True}],
    "fp4": [{}, {"double_quant": True}],
    "int": [{"bits": bits, "group_size": size} for bits in (2, 3, 4, 8) for size in (8, 32)],
    "latent": [
        *({"bits": bits, "group_size": 32} for bits in (2, 3, 4, 8)),
        *({"grid": {"format": name, "double_quant": twice}} for name, twice in CODEBOOKS),
    ],
}
VARIANTS = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name in FORMATS
    for options in OPTIONS.get(name, [{}])
]
FLAGS = {"lora": [{"dora": True}]}
"""What makes another adapter of a method."""
ADAPTERS = {
    "-".join([method, *options]): {"method": method, **options}
    for method in METHODS
    if METHODS[method].trains_adapter
    for options in [{}, *FLAGS.get(method, [])]
}
CHOSEN = {name: method_of(AdapterConfig(**options)) for name, options in ADAPTERS.items()}
ADDITIVE = {name for name, method in CHOSEN.items() if not method.merges_exactly}
NEEDS = {
    name: method.adapter.needed_format
    for name, method in CHOSEN.items()
    if method.adapter.needed_format is not None
}
IN, OUT = 44, 12


def adapted_model(name: str, options: dict, method: str) -> torch.nn.Sequential:
    """One frozen layer with a trained adapter, or GraftError when the pair cannot be."""
    weight_format = make_format(name, options)
    packed = weight_format.pack(torch.randn(OUT, IN))
    layer = FrozenLinear(IN, OUT, weight_format, packed, torch.randn(OUT))
    model = torch.nn.Sequential(layer)
    attach_adapter(model, ["0"], AdapterConfig(**ADAPTERS[method], rank=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x, y = torch.randn(32, IN), torch.randn(32, OUT)
    losses = []
    for _ in range(8):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


def supported(name: str, method: str) -> bool:
    return method in ADDITIVE or name == NEEDS[method]


PAIRS = [
    pytest.param(*variant.values, method, id=f"{variant.id}-{method}")
    for variant in VARIANTS
    for method in ADAPTERS
]


@pytest.mark.parametrize(("name", "options", "method"), PAIRS)
def test_train_and_merge(name: str, options: dict, method: str) -> None:
    if not supported(name, method):
        with pytest.raises(GraftError, match=f"needs weights in the {NEEDS[method]} format"):
            adapted_model(name, options, method)
        return
    model = adapted_model(name, options, method)
    layer = adapted_layer(model, "0")
    result = merge(layer)
    x = torch.randn(8, IN)
    if method in ADDITIVE:
        torch.testing.assert_close(result.layer(x), layer(x), rtol=1e-5, atol=1e-5)
        assert result.error.relative_to_update < 1e-4
    else:
        assert torch.equal(result.layer(x), layer(x))
        assert result.error.exact


@pytest.mark.parametrize(("target", "target_options"), VARIANTS)
@pytest.mark.parametrize("method", ADAPTERS)
def test_merge_into_every_format(method: str, target: str, target_options: dict) -> None:
    """The reported error is the distance between the merged and the trained weight."""
    base = NEEDS.get(method, "int")
    layer = adapted_layer(adapted_model(base, {"group_size": 16}, method), "0")
    weight_format = make_format(target, target_options)
    result = merge(layer, weight_format)
    assert result.layer.weight_format == weight_format
    lost = (result.layer.dense_weight().double() - layer.effective_weight()).abs()
    assert result.error.max_abs == lost.max().item()
    assert result.error.exact == (not lost.any())
    if target == "dense":
        assert result.error.relative_to_update < 1e-4
    else:
        assert result.error.relative_to_update > 1e-3


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("method", ADAPTERS)
def test_every_solver_result_takes_every_adapter(name: str, options: dict, method: str) -> None:
    weight_format = make_format(name, options)
    weight = torch.randn(OUT, IN)
    x = torch.randn(300, IN) @ torch.randn(IN, IN)
    hessian = x.double().T @ x.double()
    if not isinstance(weight_format, GridFormat):
        with pytest.raises(GraftError, match="need a format with a grid"):
            gptq_pack(weight, hessian, weight_format)
        return
    base = FrozenLinear(IN, OUT, weight_format, gptq_pack(weight, hessian, weight_format))
    nearest = weight_format.unpack(weight_format.pack(weight), OUT, IN, torch.float32)
    error = output_error(weight, base.dense_weight(), hessian)
    assert error < output_error(weight, nearest, hessian)
    if not supported(name, method):
        return
    model = torch.nn.Sequential(base)
    before = model(x)
    attach_adapter(model, ["0"], AdapterConfig(**ADAPTERS[method], rank=4))
    assert torch.equal(model(x), before)
