"""Each start against its article, written out in float64."""

from __future__ import annotations

import pytest
import torch
from tests.adapters.starting import begun, error, problems, seen, spread_weight

from graft.adapters.config import AdapterConfig
from graft.adapters.registry import METHODS
from graft.adapters.starts.base import Preparation
from graft.adapters.starts.registry import STARTS
from graft.adapters.svd import leading_svd
from graft.formats.dense import DenseFormat
from graft.formats.registry import make_format

SCALINGS = [{"rank": 4}, {"rank": 4, "alpha": 9.0}, {"rank": 6, "alpha": 3.0, "rslora": True}]
SIZES = [(24, 40), (40, 24), (3, 16), (16, 3)]
FORMATS = {
    "dense": None,
    "nf4": make_format("nf4", {"double_quant": True}),
    "int4": make_format("int", {"bits": 4, "group_size": 8}),
    "int2": make_format("int", {"bits": 2, "group_size": 8}),
    "int8": make_format("int8"),
}
DRAWN = [name for name in STARTS if not STARTS[name].changes_base]
MOVED = ["pissa", "olora", "corda"]


def inputs(columns: int, tokens: int = 64) -> torch.Tensor:
    """Inputs whose directions differ in size and whose mean is not zero."""
    return torch.randn(tokens, columns) @ torch.randn(columns, columns) + torch.randn(columns)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("init", DRAWN)
def test_a_drawn_start_changes_no_output(init: str, name: str, method: str) -> None:
    weight, x = spread_weight(24, 40), inputs(40)
    layer = begun(weight, x, FORMATS[name], method=method, rank=4, init=init)
    assert error(layer(x), layer.base(x)) < 2e-6
    assert error(layer.effective_weight(), layer.base.dense_weight()) < 1e-6


@pytest.mark.parametrize("options", SCALINGS)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("init", MOVED)
def test_what_moves_into_the_adapter_leaves_the_layer_as_it_was(
    init: str, sizes: tuple[int, int], method: str, options: dict
) -> None:
    weight, x = spread_weight(*sizes), inputs(sizes[1])
    layer = begun(weight, x, method=method, init=init, **options)
    assert error(layer.effective_weight(), weight) < 1e-6
    assert error(layer(x), x @ weight.T) < 1e-5
    assert error(layer.base.dense_weight(), weight) > 0.1


@pytest.mark.parametrize("name", ["nf4", "int4", "int2", "int8"])
@pytest.mark.parametrize("init", MOVED)
def test_the_rest_of_a_weight_is_what_is_quantised(init: str, name: str) -> None:
    weight, x, kept = spread_weight(24, 40), inputs(40), FORMATS[name]
    layer = begun(weight, x, kept, method="qlora", rank=4, init=init)
    adapter = layer.adapter("default")
    rest = weight.double() - adapter.B.double() @ adapter.A.double()
    expected = kept.unpack(kept.pack(rest.float()), 24, 40, torch.float32)
    assert torch.equal(layer.base.dense_weight(), expected)
    assert error(layer.effective_weight(), expected.double() + weight.double() - rest) < 1e-6


@pytest.mark.parametrize("options", SCALINGS)
def test_pissa_is_the_principal_part(options: dict) -> None:
    weight = spread_weight(24, 40)
    adapter = begun(weight, inputs(40), method="lora", init="pissa", **options).adapter("default")
    u, s, v = torch.linalg.svd(weight.double())
    rank = options["rank"]
    part = sum(s[i] * torch.outer(u[:, i], v[i]) for i in range(rank))
    assert error(adapter.delta(None), part) < 1e-6
    roots = (s[:rank] / adapter.scaling).sqrt()
    assert error(adapter.A.norm(dim=1), roots) < 1e-6
    assert error(adapter.B.norm(dim=0), roots) < 1e-6


def test_a_randomised_decomposition_is_near_the_whole_one() -> None:
    weight = spread_weight(600, 700).double()
    whole = torch.linalg.svdvals(weight)[:8]
    for steps, near in ((None, 0.05), (2, 0.1), (24, 0.002)):  # None: in parts, from 513 on
        left, sizes, right = leading_svd(weight, 8, steps)
        assert error(sizes[:4], whole[:4]) < 1e-9
        assert (whole - sizes).abs().max() < near * whole[-1]
        assert error(left.T @ weight @ right.T, sizes.diag()) < 1e-6
    small = weight[:40, :60]
    exact = torch.linalg.svdvals(small)[:8]
    assert error(leading_svd(small, 8)[1], exact) < 1e-12


@pytest.mark.parametrize("options", SCALINGS)
def test_olora_is_the_first_part_of_the_qr_decomposition(options: dict) -> None:
    weight = spread_weight(24, 40)
    adapter = begun(weight, inputs(40), method="lora", init="olora", **options).adapter("default")
    q, r = torch.linalg.qr(weight.double())
    rank = options["rank"]
    assert error(adapter.B, q[:, :rank]) < 1e-6
    assert error(adapter.A, r[:rank]) < 1e-6


@pytest.mark.parametrize("options", SCALINGS)
def test_corda_loses_least_of_the_outputs(options: dict) -> None:
    weight, x = spread_weight(24, 40), inputs(40)
    adapter = begun(weight, x, method="lora", init="corda", **options).adapter("default")
    moments = x.double().T @ x.double()
    moments /= moments.diagonal().mean()
    moments += 0.01 * torch.eye(40)
    u, s, v = torch.linalg.svd(weight.double() @ moments)
    rank = options["rank"]
    part = sum(s[i] * torch.outer(u[:, i], v[i]) for i in range(rank)) @ moments.inverse()
    assert error(adapter.delta(None), part) < 1e-5
    roots = (s[:rank] / adapter.scaling).sqrt()
    assert error(adapter.B.norm(dim=0), roots) < 1e-6


def test_gaussian_draws_with_the_inverse_of_the_rank() -> None:
    A = (
        begun(spread_weight(8, 4000), None, method="lora", rank=8, init="gaussian")
        .adapter("default")
        .A.detach()
    )
    assert A.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert A.mean().item() == pytest.approx(0, abs=0.003)
    kurtosis = ((A / A.std()) ** 4).mean().item()
    assert kurtosis == pytest.approx(3, abs=0.2)  # 1.8 where it is uniform


def test_orthogonal_factors_cancel_and_both_get_a_gradient() -> None:
    weight, x = spread_weight(24, 40), inputs(40)
    layer = begun(weight, x, method="lora", rank=4, init="orthogonal")
    adapter = layer.adapter("default")
    assert adapter.delta(None).abs().max() < 1e-7
    layer(x).square().mean().backward()
    for factor in (adapter.A, adapter.B):
        assert factor.abs().mean() > 0.01
        assert factor.grad.abs().max() > 1e-3


def two_layers(rho: float, rank: int = 3) -> tuple[Preparation, list[torch.Tensor]]:
    eva = STARTS["eva"].prepare(AdapterConfig(method="lora", rank=rank, eva_rho=rho))
    plain = torch.randn(200, 20)
    narrow = torch.randn(200, 2) @ torch.randn(2, 30) + 0.01 * torch.randn(200, 30) + 5
    for name, x in (("plain", plain), ("narrow", narrow)):
        eva.look(name, torch.zeros(4, x.shape[1]), seen(x))
    return eva, [plain, narrow]


@pytest.mark.parametrize("rho", [1.0, 1.7, 2.0, 4.0])
def test_eva_shares_the_ranks_out_by_explained_variance(rho: float) -> None:
    eva, texts = two_layers(rho)
    explained = []
    for name, x in zip(("plain", "narrow"), texts, strict=True):
        centred = x.double() - x.double().mean(0)
        _, s, v = torch.linalg.svd(centred, full_matrices=False)
        most = round(3 * rho)
        explained += [(value, name) for value in (s**2 / s.square().sum())[:most].tolist()]
        products = (eva.components(name).double() @ v[:most].T).abs()
        assert error(products, torch.eye(most)) < 1e-4 or name == "narrow"
        assert error(products[:2, :2], torch.eye(2)) < 1e-4
    taken = [name for _, name in sorted(explained, reverse=True)[:6]]
    assert eva.ranks() == {name: taken.count(name) for name in ("plain", "narrow")}
    assert sum(eva.ranks().values()) == 6
    if rho >= 1.7:  # two directions are all that the narrow one has
        assert eva.ranks()["plain"] > 3


def test_eva_begins_with_the_components_and_the_runs_scaling() -> None:
    weight, x = spread_weight(24, 40), inputs(40)
    options = {"method": "lora", "rank": 4, "alpha": 10.0, "init": "eva"}
    adapter = begun(weight, x, **options).adapter("default")
    centred = x.double() - x.double().mean(0)
    v = torch.linalg.svd(centred, full_matrices=False)[2][:4]
    assert error((adapter.A.double() @ v.T).abs(), torch.eye(4)) < 1e-5
    assert not adapter.B.any()
    assert adapter.scaling == 2.5


@pytest.mark.parametrize("rslora", [False, True])
def test_another_rank_keeps_the_scaling(rslora: bool) -> None:
    config = AdapterConfig(method="lora", rank=8, alpha=20.0, rslora=rslora)
    model = torch.nn.Sequential(begun(spread_weight(6, 8), None, method="lora", rank=1).base)
    from graft.adapters.attach import adapted_layer, attach_adapter

    attach_adapter(model, ["0"], config)
    attach_adapter(model, ["0"], config, "other", ranks={"0": 3})
    layer = adapted_layer(model, "0")
    assert layer.adapter("other").A.shape == (3, 8)
    assert layer.adapter("other").scaling == pytest.approx(layer.adapter("default").scaling)
    attach_adapter(model, ["0"], config, "none", ranks={"0": 0})
    assert "none" not in layer.adapters


def test_what_is_recalled_gives_the_same_rest() -> None:
    weight, kept = spread_weight(3, 16), DenseFormat("float32")
    config = AdapterConfig(method="lora", rank=5, init="pissa")  # more than the layer has rows
    first, second = STARTS["pissa"].prepare(config), STARTS["pissa"].prepare(config)
    rest = first.pack("0", weight, kept, kept.pack)["weight"]
    A, B = torch.randn(5, 16), torch.zeros(3, 5)
    A[:3], B[:, :3] = first.starts["0"].A, first.starts["0"].B
    second.recall({"0": (A, B)})
    assert torch.equal(second.pack("0", torch.clone(weight), kept, kept.pack)["weight"], rest)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("init", [name for name in STARTS if name != "default"])
def test_a_start_is_taken_or_refused_with_its_name(init: str, method: str) -> None:
    config = AdapterConfig(method=method, rank=4, init=init)
    found = problems(config)
    moves = STARTS[init].changes_base
    fits = METHODS[method].adds_low_rank if moves else METHODS[method].low_rank
    assert bool(found) == (not fits)
    assert all(f"--init {init}" in problem and method in problem for problem in found)


def test_options_that_no_start_can_have() -> None:
    assert "rank is 5" in problems(AdapterConfig(method="lora", rank=5, init="orthogonal"))[0]
    eva = AdapterConfig(method="lora", rank=4, init="eva", eva_rho=0.5)
    assert "eva-rho is 0.5" in problems(eva)[0]
