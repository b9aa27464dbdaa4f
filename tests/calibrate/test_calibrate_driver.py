from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graft.adapters.attach import replace_module
from graft.calibrate.driver import calibrate_model, stages
from graft.calibrate.gptq import GPTQ, gptq_pack
from graft.calibrate.hessian import HessianSum
from graft.calibrate.qep import QEP, Qep
from graft.errors import GraftError
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.kernels.packed.planes import unpack_codes
from graft.layers.frozen import FrozenLinear
from graft.model.load import load_model
from graft.model.targets import freeze_layers, select_targets

WIDTH = 24
FORMAT = IntGroupFormat(bits=3, group_size=8)


def frozen(in_features: int, out_features: int) -> FrozenLinear:
    weight = torch.randn(out_features, in_features) / in_features**0.5
    bias = torch.randn(out_features) * 0.1
    return FrozenLinear(in_features, out_features, DenseFormat(), {"weight": weight}, bias)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = frozen(WIDTH, 40)
        self.down = frozen(40, WIDTH)
        self.forwards = 0

    def forward(self, x: Tensor, gain: Tensor) -> tuple[Tensor]:
        self.forwards += 1
        return (x + gain * self.down(functional.silu(self.up(functional.layer_norm(x, (WIDTH,))))),)


class TinyDecoder(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.lm_head = frozen(WIDTH, 50)
        self.forwards = 0

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        self.forwards += 1
        x = self.embed(input_ids)
        for index, layer in enumerate(self.layers):
            (x,) = layer(x, gain=x[:, :1].new_tensor(index + 0.5))
        return self.lm_head(x)


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randint(0, 50, (2, 30)), torch.randint(0, 50, (4, 11))]


def layer_names(depth: int = 3) -> list[str]:
    return [f"layers.{index}.{name}" for index in range(depth) for name in ("up", "down")]


def hessian_of(model: nn.Module, name: str, batches: list[Tensor]) -> HessianSum:
    """The Hessian from whole forward passes of the model as it is now."""
    layer = model.get_submodule(name)
    hessian = HessianSum(layer.in_features)
    handle = layer.register_forward_pre_hook(lambda _, args: hessian.add(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return hessian


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 2)])  # the second leaves a gap in the chain
@pytest.mark.parametrize("weight_format", [FORMAT, CodebookFormat(double_quant=True)])
def test_each_stage_is_calibrated_on_the_rounded_stages_before_it(
    weight_format, layers, batches
) -> None:
    model, twin = TinyDecoder(), TinyDecoder()
    twin.load_state_dict(model.state_dict())
    wanted = [f"layers.{index}.{kind}" for index in layers for kind in ("up", "down")]
    reports = calibrate_model(
        model, dict.fromkeys(wanted, weight_format), batches, GPTQ, damping=0.02
    )
    assert list(reports) == wanted
    for index in layers:
        names = [f"layers.{index}.up", f"layers.{index}.down"]
        hessians = {name: hessian_of(twin, name, batches) for name in names}
        for name, hessian in hessians.items():
            layer = twin.get_submodule(name)
            packed = gptq_pack(layer.dense_weight(), hessian.value, weight_format, damping=0.02)
            rounded = layer.replaced(weight_format, packed)
            replace_module(twin, name, rounded)
            done = model.get_submodule(name)
            assert isinstance(done, FrozenLinear)
            assert all(torch.equal(done.packed[key], packed[key]) for key in packed)
            assert torch.equal(done.bias, layer.bias)
            nearest = layer.replaced(weight_format, weight_format.pack(layer.dense_weight()))
            lost = [layer.dense_weight() - q.dense_weight() for q in (rounded, nearest)]
            gptq, rtn = (((d.double() @ hessian.value) * d.double()).sum().item() for d in lost)
            assert reports[name].error == pytest.approx(gptq, rel=1e-6)
            assert reports[name].nearest_error == pytest.approx(rtn, rel=1e-6)
            assert reports[name].tokens == 2 * 30 + 4 * 11


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 2)])
def test_weights_make_up_for_the_rounded_layers_before_them(layers, batches) -> None:
    model, twin, dense = TinyDecoder(), TinyDecoder(), TinyDecoder()
    for other in (twin, dense):
        other.load_state_dict(model.state_dict())
    wanted = [f"layers.{index}.{kind}" for index in layers for kind in ("up", "down")]
    calibrate_model(model, dict.fromkeys(wanted, FORMAT), batches, QEP, damping=0.02)
    for index in layers:
        names = [f"layers.{index}.up", f"layers.{index}.down"]
        seen = {
            name: (inputs_of(twin, name, batches), inputs_of(dense, name, batches))
            for name in names
        }
        for name, (now, before) in seen.items():
            layer = twin.get_submodule(name)
            weight, hessian = layer.dense_weight().double(), now.T @ now
            damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(len(hessian))
            # A layer behind one that stays dense is reached from the start, and counts anew.
            drifted = index - 1 in layers
            moved = weight @ (before - now).T @ now @ torch.linalg.inv(damped) * drifted
            target = (weight + 0.5 * moved).float()
            packed = gptq_pack(target, hessian, FORMAT, damping=0.02)
            done = model.get_submodule(name).packed
            codes = unpack_codes((done["codes"], done["codes_high"]), 3, layer.in_features)
            ours = unpack_codes((packed["codes"], packed["codes_high"]), 3, layer.in_features)
            # float32 sums in another order may turn a tie.
            assert (codes != ours).float().mean() < 0.01
            torch.testing.assert_close(done["scales"], packed["scales"], rtol=0.02, atol=1e-3)
            plain = gptq_pack(layer.dense_weight(), hessian, FORMAT, damping=0.02)
            assert torch.equal(plain["codes"], done["codes"]) == (not drifted)
            replace_module(twin, name, layer.replaced(FORMAT, dict(done)))


def inputs_of(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """All inputs of a layer, float64 [tokens, in_features], from whole forward passes."""
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: found.append(args[0])
    )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in found]).double()


def test_making_up_brings_the_outputs_nearer(batches) -> None:
    """On the tokens themselves: the logits of the model whose weights make up for drift."""
    lost = {}
    for share in (0.0, 0.5):
        torch.manual_seed(4)
        model = TinyDecoder(depth=4)
        many = [torch.randint(0, 50, (40, 30))]
        with torch.no_grad():
            expected = model(many[0])
        calibrate_model(
            model, dict.fromkeys(layer_names(4), IntGroupFormat(2, 8)), many, Qep(share)
        )
        with torch.no_grad():
            lost[share] = (model(many[0]) - expected).pow(2).mean().item()
    assert lost[0.5] < 0.9 * lost[0.0]


def test_gptq_costs_less_than_round_to_nearest_over_the_model(batches) -> None:
    reports = calibrate_model(
        TinyDecoder(), dict.fromkeys(layer_names(), FORMAT), batches, GPTQ
    ).values()
    assert sum(report.error for report in reports) < sum(report.nearest_error for report in reports)


def test_progress_order_mode_and_hooks(batches) -> None:
    model = TinyDecoder().train()
    before = list(model.modules())
    seen: list[tuple[int, int]] = []
    names = ["lm_head", *reversed(layer_names())]
    reports = calibrate_model(
        model,
        dict.fromkeys(names, FORMAT),
        batches,
        GPTQ,
        on_layer=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 7) for done in range(1, 8)]
    assert list(reports) == [*layer_names(), "lm_head"]
    # To note the calls and to reach the first layer; then layer by layer, whatever the depth: a
    # layer runs to note its call, for its Hessians, and rounded, for what comes behind it.
    assert model.forwards == 2 * len(batches)
    assert [layer.forwards for layer in model.layers] == [3 * len(batches)] * 3
    assert all(module.training for module in model.modules())
    for module in [*before, *model.modules()]:
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert model(batches[0]).shape == (2, 30, 50)


def test_unnamed_layers_stay_dense(batches) -> None:
    model = TinyDecoder()
    before = model.layers[1].up
    calibrate_model(model, dict.fromkeys(["layers.0.up", "layers.2.down"], FORMAT), batches, GPTQ)
    assert model.layers[1].up is before
    assert model.layers[2].down.weight_format == FORMAT
    assert isinstance(model.layers[2].up.weight_format, DenseFormat)


def test_stages_follow_the_first_number_in_a_name() -> None:
    model = nn.ModuleDict(
        {
            "h": nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList([nn.Identity(), nn.Identity()])})
                for _ in range(11)
            ),
            "head": nn.Identity(),
        }
    )
    found = stages(model, ["head", "h.10.experts.1", "h.2.experts.1", "h.2.experts.0"])
    assert found == {
        "h.2": ["h.2.experts.0", "h.2.experts.1"],
        "h.10": ["h.10.experts.1"],
        "head": ["head"],
    }


def test_all_problems_are_told_before_anything_changes() -> None:
    model = TinyDecoder()
    packed = FORMAT.pack(model.layers[0].up.dense_weight())
    replace_module(model, "layers.0.up", model.layers[0].up.replaced(FORMAT, packed))
    kept = dict(model.named_modules())
    names = ["layers.0.up", "embed", "nope", "layers.1.up"]
    with pytest.raises(GraftError) as caught:
        calibrate_model(model, dict.fromkeys(names, FORMAT), [], GPTQ)
    message = str(caught.value)
    assert "4 problems" in message
    for part in (
        "layers.0.up is already in format 'int'",
        "embed is a Embedding; expected a frozen linear layer",
        "nope is not in the model",
        "no calibration tokens",
    ):
        assert part in message
    assert dict(model.named_modules()) == kept


def test_a_format_without_a_grid_is_refused_first(batches) -> None:
    model = TinyDecoder()
    with pytest.raises(GraftError, match="need a format with a grid"):
        calibrate_model(model, dict.fromkeys(layer_names(), Int8Format()), batches, GPTQ)
    assert model.forwards == 0


def test_a_bad_hessian_names_the_layer(batches) -> None:
    model = TinyDecoder()
    with torch.no_grad():
        model.layers[1].up.bias.fill_(torch.nan)
    with pytest.raises(GraftError, match=r"^layers\.1\.down: the Hessian"):
        calibrate_model(model, dict.fromkeys(layer_names(), FORMAT), batches, GPTQ)


def test_a_transformers_llama(batches) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    names = [name for name, m in model.model.named_modules() if isinstance(m, nn.Linear)]
    names = [f"model.{name}" for name in names]
    with torch.no_grad():
        expected = model(input_ids=batches[0]).logits
    for name in names:
        linear = model.get_submodule(name)
        packed = {"weight": linear.weight.detach()}
        layer = FrozenLinear(linear.in_features, linear.out_features, DenseFormat(), packed)
        replace_module(model, name, layer)
    ran: list[nn.Module] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, _: ran.append(module))
    reports = calibrate_model(
        model, dict.fromkeys(names, IntGroupFormat(bits=8, group_size=8)), batches, GPTQ
    )
    first, last = model.model.layers
    assert [ran.count(first), ran.count(last)] == [3 * len(batches), 2 * len(batches)]
    assert len(reports) == 14
    assert all(report.tokens == 104 for report in reports.values())
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]).logits, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("data", ["e2e_nlg", "tinystories"])
def test_half_the_error_of_round_to_nearest_on_a_real_model(
    data: str, shared_models: Path, shared_data: Path
) -> None:
    loaded = load_model(str(shared_models / "babyllama-361-1m"), dtype="float32", device="cpu")
    names = select_targets(loaded.model, ())
    freeze_layers(loaded.model, names)
    with gzip.open(shared_data / data / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 24)]
    texts = [row.get("text") or row["prompt"] + "\n" + row["completion"] for row in rows]
    ids = [loaded.tokenizer(text, truncation=True, max_length=256).input_ids for text in texts]
    batches = [torch.tensor([row]) for row in ids]
    reports = calibrate_model(
        loaded.model, dict.fromkeys(names, IntGroupFormat(bits=3)), batches, GPTQ
    ).values()
    assert sum(report.error for report in reports) <= 0.5 * sum(
        report.nearest_error for report in reports
    )
