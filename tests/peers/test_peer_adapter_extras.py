"""What PEFT saves beside low-rank updates of linear layers: adopted, it is PEFT's own model.

Embeddings and heads, trained or resized, updates of them, single tokens, norms, biases; with the
head tied to the embeddings and not.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.small_models import model_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import graft
from graft.errors import GraftError

peft = pytest.importorskip("peft", reason="needs peft: make test-peers installs it")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers"),
]

SAME = 1e-5
IDS = torch.randint(4, 90, (2, 24), generator=torch.Generator().manual_seed(5))
QV = ["q_proj", "v_proj"]
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "whole embedding": ({"modules_to_save": ["embed_tokens"]}, True),
    "whole head": ({"modules_to_save": ["lm_head"]}, True),
    "both whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "whole, kept tied": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "norms and a layer": ({"modules_to_save": ["norm", "input_layernorm", "o_proj"]}, True),
    "a block": ({"modules_to_save": ["mlp"]}, True),
    "update of the head": ({"target_modules": [*QV, "lm_head"]}, True),
    "update of the embedding": ({"target_modules": [*QV, "embed_tokens"]}, True),
    "update, kept tied": (
        {"target_modules": [*QV, "embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "updates of both, rsLoRA": (
        {
            "target_modules": [*QV, "embed_tokens", "lm_head"],
            "use_rslora": True,
            "alpha_pattern": {"lm_head": 3},
            "rank_pattern": {"embed_tokens": 2},
        },
        True,
    ),
    "DoRA of both": (
        {"target_modules": [*QV, "embed_tokens", "lm_head"], "use_dora": True},
        True,
    ),
    "tokens": ({"trainable_token_indices": [3, 90]}, True),
    "tokens of the embedding": ({"trainable_token_indices": {"embed_tokens": [90, 3]}}, True),
    "tokens of the head": ({"trainable_token_indices": {"lm_head": [7]}}, True),
    "tokens of both": (
        {"trainable_token_indices": {"embed_tokens": [3, 90], "lm_head": [3, 90]}},
        True,
    ),
    "other tokens of both": (
        {"trainable_token_indices": {"embed_tokens": [3, 90], "lm_head": [5]}},
        True,
    ),
    "all biases": ({"bias": "all"}, True),
    "biases of adapted layers": ({"bias": "lora_only"}, True),
    "every linear layer": ({"target_modules": "all-linear"}, False),
    "no linear layer": ({"target_modules": ["lm_head"]}, True),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits.double()
    return out


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def base(folder: Path, tokenizer: Path, tied: bool, family: str = "qwen2") -> PreTrainedModel:
    model = model_of(family, tie_word_embeddings=tied)
    if not tied:
        with torch.no_grad():
            model.lm_head.weight.normal_(0, 0.1)
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def moved(model: nn.Module) -> nn.Module:
    """Move everything that PEFT trains away from its start."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True], ids=["two weights", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_what_it_brings_beside_becomes_the_base(case, tied, tiny_base, tmp_path) -> None:
    options, has_own = CASES[case]
    theirs = base(tmp_path / "base", tiny_base, tied)
    config = peft.LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": QV} | options), task_type="CAUSAL_LM"
    )
    trained = moved(peft.get_peft_model(theirs, config))
    trained.save_pretrained(tmp_path / "adapter")
    # PEFT's own reader is the judge, as it may load another model than was saved.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    expected = logits(peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    report = graft.adopt(tmp_path / "adapter", tmp_path / "run", model=str(tmp_path / "base"))
    assert bool(report.base_changes) == has_own
    assert distance(expected, logits(plain)) > 1e-3
    assert distance(logits(graft.load(tmp_path / "run")[0]), expected) < SAME
    if (tmp_path / "run" / "model").is_dir():
        merged = tmp_path / "run" / "model"
    else:
        merged = tmp_path / "merged"
        graft.merge(tmp_path / "run", merged)
    found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert distance(logits(found), expected) < SAME
    if has_own and merged.name == "merged":
        with pytest.raises(GraftError, match="this run's base is its own"):
            graft.export_model(tmp_path / "run", "peft", tmp_path / "peft")


@pytest.mark.parametrize("tied", [False, True], ids=["two weights", "tied"])
@pytest.mark.parametrize("rows", [101, 92], ids=["more", "fewer"])
@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]])
def test_a_resized_vocabulary(saved, rows, tied, tiny_base, tmp_path) -> None:
    model = base(tmp_path / "base", tiny_base, tied)
    model.resize_token_embeddings(rows, mean_resizing=False)
    settings = {"target_modules": QV, "modules_to_save": saved, "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    trained = moved(peft.get_peft_model(model, config))
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    expected = logits(trained)
    report = graft.adopt(tmp_path / "adapter", tmp_path / "run", model=str(tmp_path / "base"))
    assert f"to {rows} rows" in str(report.base_changes)
    ours, _ = graft.load(tmp_path / "run")
    assert ours.config.vocab_size == rows == ours.get_output_embeddings().weight.shape[0]
    assert distance(logits(ours), expected) < SAME
    graft.merge(tmp_path / "run", tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert distance(logits(found), expected) < SAME


def test_embeddings_that_are_scaled(tiny_base, tmp_path) -> None:
    model = base(tmp_path / "base", tiny_base, True, "gemma")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=[*QV, "embed_tokens"], task_type="CAUSAL_LM"
    )
    trained = moved(peft.get_peft_model(model, config))
    trained.save_pretrained(tmp_path / "adapter")
    graft.adopt(tmp_path / "adapter", tmp_path / "run", model=str(tmp_path / "base"))
    assert distance(logits(graft.load(tmp_path / "run")[0]), logits(trained)) < SAME


def test_on_rounded_weights_and_into_the_original(tiny_base, tmp_path) -> None:
    model = base(tmp_path / "base", tiny_base, False)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=QV, modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    trained = moved(peft.get_peft_model(model, config))
    trained.save_pretrained(tmp_path / "adapter")
    words = {"model": str(tmp_path / "base"), "format": "nf4"}
    graft.adopt(tmp_path / "adapter", tmp_path / "run", **words)
    graft.merge(tmp_path / "run", tmp_path / "merged", into="original")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert distance(logits(found), logits(trained)) < SAME


def test_copies_of_the_bases_own_are_left_out(tiny_base, tmp_path) -> None:
    model = base(tmp_path / "base", tiny_base, False)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=QV, task_type="CAUSAL_LM")
    trained = moved(peft.get_peft_model(model, config))
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert any(key.endswith("lm_head.weight") for key in tensors)
    report = graft.adopt(tmp_path / "adapter", tmp_path / "run", model=str(tmp_path / "base"))
    assert not report.base_changes and "copies of the base's own" in report.notes[0]
    assert not (tmp_path / "run" / "base").exists()
    assert distance(logits(graft.load(tmp_path / "run")[0]), logits(trained)) < SAME
    graft.export_model(tmp_path / "run", "peft", tmp_path / "peft")
    save_file({key: value for key, value in tensors.items() if "lora" in key}, file)
