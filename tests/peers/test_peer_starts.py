"""PEFT's starts beside graft's: same weights, same text, so same factors, gradients and merges.

The factors of a decomposition are known up to a sign for each of the rank's directions; outputs and
merged weights are not, nor what a step of gradient descent makes of them.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from graft.adapters.attach import adapted_layers, attach_adapter, frozen_layers, replace_module
from graft.adapters.config import AdapterConfig
from graft.adapters.merge import merge_adapters
from graft.adapters.starts.registry import STARTS
from graft.calibrate.inputs import look_at_inputs
from graft.model.adapter_files import read_factors, save_adapter
from graft.model.load import load_model
from graft.model.targets import freeze_layers, select_targets

peft = pytest.importorskip("peft", reason="needs peft: make test-peers installs it")

pytestmark = [
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage"),
    pytest.mark.filterwarnings("ignore:.* changes the base weights of the model and should thus"),
    pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'corda' but `corda_config` is not"),
    pytest.mark.filterwarnings("ignore:Adapter start was active which is now deleted"),
]

SAME = 1e-5
RATE = 0.05
RANK, ALPHA = 4, 6.0
FAMILIES = ["llama", "gpt2", "qwen2"]


@pytest.fixture
def folder(
    bases: dict[str, Path],
    tiny_base: Path,
    tiny_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
) -> Callable[[str], Path]:
    def of(family: str) -> Path:
        if family in bases:
            return bases[family]
        out = tmp_path / family
        if out.exists():
            return out
        tiny_model(family, vocab_size=320, initializer_range=0.1).save_pretrained(out)
        for file in tiny_base.glob("*token*"):
            shutil.copy(file, out / file.name)
        return out

    return of


def text() -> Tensor:
    return torch.randint(0, 320, (1, 60), generator=torch.Generator().manual_seed(5))


def ours(folder: Path, init: str, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """Return graft's model with adapters that have begun, as a run begins them."""
    model = load_model(str(folder), dtype="float32", device="cpu").model
    names = select_targets(model, ())
    freeze_layers(model, names)
    chosen = {"method": "lora", "rank": RANK, "alpha": ALPHA, "init": init}
    config = AdapterConfig(**chosen | options)
    start = STARTS[init]
    preparation = start.prepare(config)
    assert preparation is not None
    if start.reads_inputs:
        look_at_inputs(model, names, [text()], preparation.look)
    for name, layer in list(frozen_layers(model)):
        kept = layer.weight_format
        packed = preparation.pack(name, layer.dense_weight(), kept, kept.pack)
        replace_module(model, name, layer.replaced(kept, packed))
    attach_adapter(model, names, config, ranks=preparation.ranks())
    start.begin(model, preparation)
    return model, names


def theirs(folder: Path, names: list[str], init: str, **options: Any) -> Any:
    """Return PEFT's model, on Transformers' own layers."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=names,
        init_lora_weights=init,
        fan_in_fan_out=folder.name.startswith("gpt2"),
        **options,
    )
    if init == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        config.corda_config = peft.tuners.lora.config.CordaConfig(corda_method="ipm")
        preprocess_corda(twin, config, run_model=lambda: twin(input_ids=text()))
    return peft.get_peft_model(twin, config).eval()


def their_factors(model: Any) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            found[name] = module.lora_A["default"].weight, module.lora_B["default"].weight
    return found


def our_factors(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    found = {}
    for name, layer in adapted_layers(model):
        adapter = layer.adapter("default")
        found[name] = adapter.get_parameter("A"), adapter.get_parameter("B")
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """Return max |found - expected| over max |expected|."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def backward(model: Any) -> Tensor:
    out = model(input_ids=text(), labels=text())
    out.loss.backward()
    logits: Tensor = out.logits
    return logits


def step(factors: dict[str, tuple[nn.Parameter, nn.Parameter]]) -> None:
    with torch.no_grad():
        for pair in factors.values():
            for factor in pair:
                assert factor.grad is not None
                factor -= RATE * factor.grad


CASES = [(family, init) for family in FAMILIES for init in ("pissa", "olora")]
# PEFT forgets that GPT-2's layers hold their weights transposed when it begins as OLoRA.
CASES.remove(("gpt2", "olora"))


@pytest.mark.parametrize(("family", "init"), CASES)
def test_factors_gradients_and_merged_weights_are_pefts(family, init, folder, tmp_path) -> None:
    mine, names = ours(folder(family), init)
    other = theirs(folder(family), names, init)
    other.save_pretrained(tmp_path / "start")
    save_adapter(mine, tmp_path / "own-start")
    assert distance(backward(mine), backward(other)) < SAME
    mine_factors, other_factors = our_factors(mine), their_factors(other)
    assert set(mine_factors) == set(other_factors) == set(names)
    for name, (A, B) in mine_factors.items():
        other_a, other_b = other_factors[name]
        signs = (A * other_a).sum(1).sign()
        for found, expected, turned in (
            (A, other_a, signs[:, None]),
            (B, other_b, signs),
            (A.grad, other_a.grad, signs[:, None]),
            (B.grad, other_b.grad, signs),
        ):
            assert distance(found * turned, expected) < 10 * SAME, name
    step(mine_factors)
    step(other_factors)

    # What was trained, as an adapter of the base as it was: PEFT's conversion is graft's.
    other.save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    began = read_factors(tmp_path / "own-start")
    save_adapter(mine, tmp_path / "ours", base=str(folder(family)), began=began)
    configs = [
        json.loads((tmp_path / side / "adapter_config.json").read_text())
        for side in ("ours", "theirs")
    ]
    assert configs[0]["r"] == configs[1]["r"] == 2 * RANK
    assert configs[0]["lora_alpha"] == configs[1]["lora_alpha"] == 2 * ALPHA
    tensors = [
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")
    ]
    assert {k: v.shape for k, v in tensors[0].items()} == {
        k: v.shape for k, v in tensors[1].items()
    }
    plain = AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.float32).eval()
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    with torch.no_grad():
        trained = mine(input_ids=text()).logits
        assert distance(trained, other(input_ids=text()).logits) < SAME
        assert distance(again(input_ids=text()).logits, trained) < SAME

    merge_adapters(mine)
    merged = other.merge_and_unload()
    for name, layer in frozen_layers(mine):
        weight = merged.get_submodule(name).weight
        expected = weight.T if layer.transposed else weight
        assert distance(layer.dense_weight(), expected) < SAME, name


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_a_dora_that_began_as_pissa_on_the_base_as_it_was(
    family, folder, tmp_path
) -> None:
    mine, _ = ours(folder(family), "pissa", method="dora")
    save_adapter(mine, tmp_path / "start")
    with torch.no_grad():
        for pair in our_factors(mine).values():
            for factor in pair:
                factor += 0.05 * torch.randn_like(factor)
    save_adapter(mine, tmp_path / "ours", began=read_factors(tmp_path / "start"))
    plain = AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.float32).eval()
    with torch.no_grad():
        untouched = plain(input_ids=text()).logits
        again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
        trained = mine(input_ids=text()).logits
        assert distance(again(input_ids=text()).logits, trained) < SAME
        assert distance(untouched, trained) > 0.05


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_corda_takes_pefts_part_of_each_weight(family, folder, monkeypatch) -> None:
    """The same product; PEFT's factors share its size out by the largest of the inputs."""
    if importlib.util.find_spec("attr") is None:  # PEFT takes one decorator from there
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))
    mine, names = ours(folder(family), "corda")
    other = theirs(folder(family), names, "corda")
    with torch.no_grad():
        logits = [model(input_ids=text()).logits for model in (mine, other)]
    assert distance(*logits) < SAME
    others = their_factors(other)
    for name, (A, B) in our_factors(mine).items():
        other_a, other_b = others[name]
        assert distance(B @ A, other_b @ other_a) < 1e-2, name  # PEFT inverts in float32


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_eva_finds_pefts_directions_and_ranks(family, rho, folder, monkeypatch) -> None:
    """With whole decompositions in the place of PEFT's randomised ones."""
    whole = peft.utils.incremental_pca.IncrementalPCA
    monkeypatch.setattr(
        "peft.tuners.lora.eva.IncrementalPCA",
        lambda n_components, **rest: whole(n_components=n_components),
    )
    mine, names = ours(folder(family), "eva", eva_rho=rho)
    config = peft.EvaConfig(rho=rho, tau=0.9999, use_label_mask=False)
    other = theirs(folder(family), names, "eva", eva_config=config)
    row = {"input_ids": text(), "attention_mask": torch.ones_like(text())}
    peft.initialize_lora_eva_weights(other, dataloader=[row] * 4, show_progress_bar=False)
    found, expected = our_factors(mine), their_factors(other)
    ranks = [sorted(len(A) for A, _ in factors.values()) for factors in (found, expected)]
    assert ranks[0] == ranks[1]
    assert sum(ranks[0]) == RANK * len(names)
    for name in found.keys() & expected.keys():
        A, other_a = found[name][0], expected[name][0]
        rank = min(len(A), len(other_a))
        cosines = (A[:rank] * other_a[:rank]).sum(1).abs()
        assert cosines.min() > 1 - 1e-4, name
        assert found[name][1].abs().max() == expected[name][1].abs().max() == 0


def test_drawn_factors_are_of_pefts_size(folder) -> None:
    with torch.random.fork_rng():
        for init in ("gaussian", "orthogonal"):
            names = select_targets(load_model(str(folder("llama"))).model, ())
            others = their_factors(theirs(folder("llama"), names, init))
            model = load_model(str(folder("llama")), dtype="float32", device="cpu").model
            freeze_layers(model, names)
            config = AdapterConfig(method="lora", rank=RANK, init=init)
            attach_adapter(model, names, config)
            STARTS[init].begin(model, None)
            for index in (0, 1):
                sizes = [
                    torch.cat([pair[index].detach().flatten() for pair in factors.values()]).std()
                    for factors in (our_factors(model), others)
                ]
                assert sizes[0].item() == pytest.approx(sizes[1].item(), rel=0.05)
