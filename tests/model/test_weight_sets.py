"""Folders with more than one set of weights: what Transformers reads, or a refusal by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from graft.errors import GraftError
from graft.model.load import load_model
from graft.model.weight_files import WeightFiles

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Change = Callable[[dict[str, torch.Tensor]], object]


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))


def change(folder: Path, file: str, how: Change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    how(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def change_index(folder: Path, how: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    how(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def both(checkpoint, tmp_path) -> Path:
    """The same model in one file and, with an index, in several."""
    folder = Path(shutil.copytree(checkpoint("llama", torch.float32, "100KB"), tmp_path / "both"))
    shutil.copy(checkpoint("llama") / SINGLE, folder / SINGLE)
    return folder


@pytest.fixture
def sharded(both) -> Path:
    (both / SINGLE).unlink()
    assert len(shards(both)) > 2
    return both


@pytest.fixture
def as_transformers(logits):
    """Load a folder, compare it with what Transformers makes of it, and return the notes."""

    def check(folder: Path) -> str:
        loaded = load_model(str(folder), dtype="float32", device="cpu")
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(logits(loaded.model), logits(theirs))
        return " ".join(loaded.notes)

    return check


def refused(folder: Path) -> str:
    with pytest.raises(GraftError) as raised:
        load_model(str(folder), device="cpu")
    return str(raised.value)


def test_two_sets_that_are_the_same(both, as_transformers) -> None:
    assert as_transformers(both) == ""


def test_two_sets_that_differ_are_refused(both) -> None:
    change(both, SINGLE, lambda t: t["model.norm.weight"].add_(1))
    message = refused(both)
    for piece in (str(both), SINGLE, INDEX, shards(both)[0], "'model.norm.weight'"):
        assert piece in message
    change(both, SINGLE, lambda t: t.pop("model.norm.weight"))
    assert "'model.norm.weight'" in refused(both)


def test_an_index_that_an_earlier_save_left_behind(both, as_transformers) -> None:
    change(both, SINGLE, lambda t: t["model.norm.weight"].add_(1))
    (both / shards(both)[-1]).unlink()
    assert f"{INDEX} in {both} names files that are not there" in as_transformers(both)


def test_what_lies_beside_the_weights_is_told(both, as_transformers) -> None:
    for file in shards(both):
        (both / file).unlink()
    (both / INDEX).unlink()
    others = [
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "model-00009-of-00009.safetensors",
    ]
    for file in others:
        save_file({"x": torch.ones(1)}, both / file)
    for file in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save({}, both / file)
    note = as_transformers(both)
    assert note.startswith(f"not read in {both}: ") and "training" not in note
    (both / SINGLE).unlink()
    with pytest.raises(GraftError, match="holds only pickled"):
        WeightFiles(both)
    (both / "pytorch_model.bin").unlink()
    with pytest.raises(GraftError, match=r"no model\.safetensors.* it holds consolidated"):
        WeightFiles(both)


def test_an_index_that_names_a_tensor_in_another_shard(sharded, as_transformers) -> None:
    def swap(places: dict[str, str]) -> None:
        names = list(places)
        one, other = names[0], next(name for name in names if places[name] != places[names[0]])
        places[one], places[other] = places[other], places[one]
        assert len(set(places.values())) == len(shards(sharded))

    change_index(sharded, swap)
    assert as_transformers(sharded) == ""


def test_an_index_that_leaves_tensors_of_its_files_out(sharded, as_transformers) -> None:
    change_index(sharded, lambda places: places.pop("model.layers.0.mlp.down_proj.weight"))
    assert as_transformers(sharded) == ""


def test_a_shard_that_lacks_a_tensor(sharded) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    file = json.loads((sharded / INDEX).read_text())["weight_map"][name]
    change(sharded, file, lambda tensors: tensors.pop(name))
    assert f"tensor {name} is missing; the index has it in {file}" in refused(sharded)


def test_a_tensor_in_two_shards(sharded, as_transformers) -> None:
    first, second = shards(sharded)[1:3]
    name, tensor = next(iter(load_file(sharded / first).items()))
    change(sharded, second, lambda tensors: tensors.update({name: tensor.clone()}))
    assert as_transformers(sharded) == ""
    change(sharded, second, lambda tensors: tensors[name].add_(1))
    message = refused(sharded)
    assert f"'{name}' is in {first} and in {second}" in message
