"""Extracted, merged and resized adapters in PEFT, whose add_weighted_adapter is the oracle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from graft.adapters.combine import dare, dare_ties, ties
from graft.api.adapter.extract import extract_adapter
from graft.api.adapter.merge import combine_adapters
from graft.api.adapter.resize import resize_adapter
from graft.model.lora_files import read_lora

peft = pytest.importorskip("peft", reason="needs peft: make test-peers installs it")
merge_utils = pytest.importorskip("peft.utils.merge_utils", reason="needs a peft that merges")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape"),
]

Make = Callable[..., PreTrainedModel]
IDS = torch.randint(0, 90, (3, 17), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.double()


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def pair(tiny_model: Make, tiny_base: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return a function to the folders of a model and of one that was tuned from it."""

    def make(name: str, changes: Callable[[str], bool]) -> tuple[Path, Path]:
        model = tiny_model(name, vocab_size=160)
        folders = tmp_path / "base", tmp_path / "tuned"
        for folder in folders:
            model.save_pretrained(folder)
            for file in tiny_base.glob("*token*"):
                shutil.copy(file, folder)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if changes(key):
                        parameter += 0.1 * torch.randn_like(parameter)
        return folders

    return make


@pytest.mark.parametrize("name", ["llama3-rope", "tied-qwen2", "gpt2", "phi"])
@pytest.mark.parametrize("everything", [False, True])
def test_peft_gives_the_tuned_logits_back_at_full_rank(
    name: str, everything: bool, pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    parts = ("proj.", "c_attn.", "c_fc.", "c_proj.", "dense.", "fc1.")
    base, tuned = pair(name, lambda key: everything or any(part in key for part in parts))
    report = extract_adapter(base, tuned, tmp_path / "adapter", energy=1.0)
    assert bool(report.rest) == everything
    expected, before = logits(opened(tuned)), logits(opened(base))
    model = peft.PeftModel.from_pretrained(opened(base), tmp_path / "adapter")
    assert (expected - before).abs().max() > 0.1
    assert (logits(model) - expected).abs().max() < 1e-4


def trained(folder: Path, base: PreTrainedModel, rank: int, seed: int) -> Path:
    """An adapter that PEFT wrote, with random factors."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(base, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.1)
            if "down_proj" in key and "lora_A" in key:  # which uses less of its rank
                parameter.data *= 0.4 ** torch.arange(rank)[:, None]
    model.save_pretrained(folder)
    model.unload()
    return folder


COMBINED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear", {}, {"combination_type": "cat"}),
    ("svd", {"rank": 5}, {"combination_type": "svd", "svd_rank": 5}),
    ("ties", {"density": 0.3, "rank": 6}, {"combination_type": "ties_svd", "svd_rank": 6}),
    ("dare", {"density": 1.0, "rank": 3}, {"combination_type": "dare_linear_svd", "svd_rank": 3}),
    ("linear", {"factors": True}, {"combination_type": "linear"}),
    ("ties", {"density": 0.5, "factors": True}, {"combination_type": "ties"}),
    ("dare_ties", {"density": 1.0, "factors": True}, {"combination_type": "dare_ties"}),
]


@pytest.mark.parametrize(("how", "ours", "theirs"), COMBINED)
def test_merged_adapters_are_those_of_add_weighted_adapter(
    how: str, ours: dict[str, Any], theirs: dict[str, Any], tiny_model: Make, tmp_path: Path
) -> None:
    base = tiny_model("mistral", vocab_size=160)
    folders = [trained(tmp_path / f"a{seed}", base, 4, seed) for seed in range(3)]
    weights = [0.7, -0.4, 1.2]
    combine_adapters(folders, tmp_path / "merged", weights=weights, how=how, **ours)
    model = peft.PeftModel.from_pretrained(base, folders[0], adapter_name="a0")
    for number in (1, 2):
        model.load_adapter(folders[number], f"a{number}")
    density = {"density": ours["density"]} if "density" in ours else {}
    model.add_weighted_adapter(["a0", "a1", "a2"], weights, "sum", **theirs, **density)
    found = read_lora(tmp_path / "merged").layers
    assert len(found) == 4
    for name, layer in found.items():
        A, B = layer.update()
        expected = model.base_model.model.get_submodule(name).get_delta_weight("sum")
        torch.testing.assert_close(B @ A, expected.double().detach(), rtol=0, atol=3e-6)
    model.set_adapter("sum")
    expected = logits(model)
    model.load_adapter(tmp_path / "merged", "ours")
    model.set_adapter("ours")
    assert (logits(model) - expected).abs().max() < 1e-4


def test_ties_and_dare_are_those_of_peft_tensor_by_tensor() -> None:
    tensors, weights = [torch.randn(30, 40) for _ in range(3)], [0.7, -0.4, 1.2]
    for one, other in (
        (ties, merge_utils.ties),
        (dare, merge_utils.dare_linear),
        (dare_ties, merge_utils.dare_ties),
    ):
        torch.manual_seed(3)
        expected = other(tensors, torch.tensor(weights), 0.3)
        found = one(tensors, weights, 0.3, torch.Generator().manual_seed(3))
        torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)


def test_a_resized_adapter_is_read_with_its_ranks(tiny_model: Make, tmp_path: Path) -> None:
    base = tiny_model("mistral", vocab_size=160)
    trained(tmp_path / "adapter", base, 6, 0)
    report = resize_adapter(tmp_path / "adapter", tmp_path / "small", energy=0.7)
    assert len({layer.rank for layer in report.layers.values()}) > 1
    model = peft.PeftModel.from_pretrained(base, tmp_path / "small")
    for name, layer in read_lora(tmp_path / "small").layers.items():
        A, B = layer.update()
        expected = model.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(B @ A, expected.double().detach(), rtol=0, atol=1e-6)
