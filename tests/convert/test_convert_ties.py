"""A head beside settings that tie it, and two sets of weights, as other tools leave them behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from foreign import foreign_folder, gptq_layer, gptq_weight, linear_names
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import graft
from graft.errors import GraftError

WEIGHTS, HEAD, EMBEDDING = "model.safetensors", "lm_head.weight", "model.embed_tokens.weight"
BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}


@pytest.fixture
def own_head(tiny_base, tmp_path) -> tuple[Path, LlamaForCausalLM]:
    """A copy of the base, whose settings tie, with a head of its own, and the model."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "own"))
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors[HEAD] = tensors[EMBEDDING].roll(1, 0)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(tiny_base).eval()
    model.lm_head.weight = torch.nn.Parameter(tensors[HEAD])
    return folder, model


def pickled(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / BIN)
    return tensors


def pickled_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    names, places = list(tensors), {}
    for number in (1, 2):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name].clone() for name in names[number - 1 :: 2]}, folder / file)
        places |= dict.fromkeys(names[number - 1 :: 2], file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def converted(folder: Path, out: Path, logits) -> tuple[torch.Tensor, tuple[str, ...], bool]:
    report = graft.convert_model(folder, out)
    config = json.loads((out / "config.json").read_text())
    found = logits(graft.load(out, dtype="float32")[0])
    return found, report.notes, config["tie_word_embeddings"]


def test_a_pickled_head_of_its_own(own_head, logits, tmp_path) -> None:
    folder, model = own_head
    pickled(folder)
    found, [note], tied = converted(folder, tmp_path / "out", logits)
    assert torch.equal(found, logits(model)) and not tied
    assert HEAD in note and "tie_word_embeddings false" in note


def test_a_pickled_head_alone(own_head, logits, tmp_path) -> None:
    folder, model = own_head
    tensors = pickled(folder)
    del tensors[EMBEDDING]
    torch.save(tensors, folder / BIN)
    found, notes, tied = converted(folder, tmp_path / "out", logits)
    model.model.embed_tokens.weight = model.lm_head.weight
    assert torch.equal(found, logits(model)) and tied and not notes


def test_a_quantised_head_of_its_own(own_head, logits, tmp_path) -> None:
    folder, model = own_head
    names = [*linear_names(load_file(folder / WEIGHTS)), "lm_head"]
    theirs = foreign_folder(folder, tmp_path / "gptq", SETTINGS, gptq_layer(4, 32), names)
    tensors = load_file(theirs / WEIGHTS)
    for name in names:
        model.get_parameter(f"{name}.weight").data = gptq_weight(tensors, name, 4).float()
    found, notes, tied = converted(theirs, tmp_path / "out", logits)
    assert (found - logits(model)).abs().max() <= 0.02 * found.abs().max()
    assert not tied and any(HEAD in note for note in notes)


def test_two_pickled_sets(own_head, logits, tmp_path) -> None:
    folder, model = own_head
    tensors = pickled(folder)
    pickled_shards(folder, tensors)
    found, _, _ = converted(folder, tmp_path / "out", logits)
    assert torch.equal(found, logits(model))
    torch.save(tensors | {"model.norm.weight": torch.ones(64) * 2}, folder / BIN)
    with pytest.raises(GraftError, match="holds two models: pytorch_model.bin.*model.norm.weight"):
        graft.convert_model(folder, tmp_path / "second")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    _, notes, _ = converted(folder, tmp_path / "third", logits)
    assert any(f"{INDEX} in {folder} names files that are not there" in note for note in notes)


def test_pickled_weights_beside_a_variant_and_an_adapter(own_head, logits, tmp_path) -> None:
    folder, model = own_head
    for name in ("model.fp16.safetensors", "adapter_model.safetensors"):
        shutil.copy(folder / WEIGHTS, folder / name)
    pickled(folder)
    with pytest.raises(GraftError, match="holds only pickled weights"):
        graft.load(folder)
    assert torch.equal(converted(folder, tmp_path / "out", logits)[0], logits(model))


def test_a_tensor_in_two_pickled_shards(own_head, tmp_path) -> None:
    folder, _ = own_head
    tensors = pickled(folder)
    (folder / BIN).unlink()
    pickled_shards(folder, tensors)
    second = folder / "pytorch_model-00002-of-00002.bin"
    name = list(tensors)[0]
    torch.save(torch.load(second) | {name: tensors[name] + 1}, second)
    with pytest.raises(GraftError, match=f"two files hold different tensors.*{name}"):
        graft.convert_model(folder, tmp_path / "out")
