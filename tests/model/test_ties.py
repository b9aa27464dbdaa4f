"""A head that config.json ties to the embedding is tied where the files hold no other one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from graft.adapters.config import AdapterConfig
from graft.formats.registry import make_format
from graft.model.load import load_model
from graft.model.save import save_model
from graft.model.subject import open_subject
from graft.plan.skeleton import plan_model

WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"
EMBEDDING = {"gpt2": "transformer.wte.weight"}
FAMILIES = ["llama-tied", "gemma", "gemma3", "gpt2"]


def change(folder: Path, *gone: str, **new: torch.Tensor) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    for name in gone:
        del tensors[name]
    save_file(tensors | new, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def trained(copied):
    """A function of a family that returns a folder with a head of its own, and its model."""

    def make(family: str) -> tuple[Path, torch.nn.Module]:
        folder = copied(family)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        head = model.get_input_embeddings().weight.detach().clone().roll(1, 0)
        model.lm_head.weight = torch.nn.Parameter(head)
        change(folder, **{HEAD: head})
        return folder, model

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_its_own_is_kept_and_written(family, trained, logits, tmp_path) -> None:
    folder, model = trained(family)
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    assert torch.equal(logits(loaded.model), logits(model))
    [note] = loaded.notes
    assert HEAD in note and "tie_word_embeddings false" in note
    for weight_format in (None, make_format("int8")):
        out = tmp_path / f"out-{weight_format}"
        loaded = load_model(str(folder), weight_format=weight_format, dtype="float32", device="cpu")
        save_model(loaded, out)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        again = load_model(str(out), dtype="float32", device="cpu")
        assert torch.equal(logits(again.model), logits(loaded.model)) and not again.notes
        if weight_format is None:
            theirs = AutoModelForCausalLM.from_pretrained(out).eval()
            assert torch.equal(logits(theirs), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("copies", ["the head alone", "both", "both, in other dtypes"])
def test_one_tensor_under_either_name_is_tied(family, copies, copied, load, logits) -> None:
    folder, embedding = copied(family), EMBEDDING.get(family, "model.embed_tokens.weight")
    weight = load_file(folder / WEIGHTS)[embedding].bfloat16().float()
    change(folder, embedding, **{HEAD: weight})
    if copies != "the head alone":
        stored = weight.bfloat16() if "dtypes" in copies else weight
        change(folder, **{embedding: stored.clone()})
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    model = loaded.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected = load(family).model
    expected.get_input_embeddings().weight.data = weight
    expected.tie_weights()
    assert torch.equal(logits(model), logits(expected)) and not loaded.notes


def test_the_plan_counts_the_head(trained, checkpoint) -> None:
    def planned(folder: Path) -> int:
        adapter = AdapterConfig(method="lora")
        plan = plan_model(
            str(folder), weight_format=None, adapter=adapter, dtype="float32", device="cpu"
        )
        return plan.counts.total

    folder, model = trained("llama-tied")
    more = model.lm_head.weight.numel()
    assert planned(folder) == planned(checkpoint("llama-tied")) + more


def test_what_was_trained_as_tied_stays_tied(trained, logits, load) -> None:
    """Earlier versions tied the head whatever the files held, and trained on that."""
    folder, _ = trained("llama-tied")
    subject = open_subject(folder, ties_as_stated=True)
    loaded = load_model(subject, dtype="float32", device="cpu")
    assert torch.equal(logits(loaded.model), logits(load("llama-tied").model))
