"""Folders that do not fit: each is refused with one message that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.errors import GraftError
from graft.files.read import read_json
from graft.formats.registry import make_format
from graft.model.folder import find_folder
from graft.model.load import load_model
from graft.model.save import save_model
from graft.model.weight_files import WeightFiles

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0.mlp.up_proj"

Damage = Callable[[Path], object]


def change_json(file: str, **values: Any) -> Damage:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | values))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        # Copies: the file that is mapped must not be written over.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def cut(length: int) -> Damage:
    def truncate(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[:length])

    return truncate


def index(weight_map: object) -> Damage:
    def write(folder: Path) -> None:
        shutil.move(folder / WEIGHTS, folder / "part.safetensors")
        shutil.copy(folder / "part.safetensors", folder.parent / "outside.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return write


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")


def without(*files: str) -> Damage:
    return lambda folder: [(folder / file).unlink() for file in files]


def write(file: str, content: str) -> Damage:
    return lambda folder: (folder / file).write_text(content)


PLAIN: dict[str, tuple[Damage, list[str]]] = {
    "missing tensor": (
        change_tensors(lambda t: t.pop(f"{LAYER}.weight")),
        [f"tensor {LAYER}.weight is missing"],
    ),
    "wrong shape": (
        change_tensors(lambda t: t.update({f"{LAYER}.weight": torch.ones(3, 80)})),
        [f"{LAYER}.weight has shape [3, 80]; config.json makes it [88, 80]"],
    ),
    "two problems": (
        change_tensors(
            lambda t: (t.pop("model.norm.weight"), t.update({"lm_head.weight": torch.ones(1)}))
        ),
        ["2 problems", "tensor model.norm.weight is missing", "lm_head.weight has shape [1]"],
    ),
    "config of another size": (
        change_json("config.json", hidden_size=40),
        ["do not fit config.json", "model.embed_tokens.weight has shape [320, 80]", "[320, 40]"],
    ),
    "more layers than weights": (
        change_json("config.json", num_hidden_layers=3),
        ["tensor model.layers.2.self_attn.q_proj.weight is missing"],
    ),
    "header cut off": (cut(50), [WEIGHTS, "truncated", "download it again"]),
    "data cut off": (cut(-1), [WEIGHTS, "truncated", "download it again"]),
    "empty file": (cut(0), [WEIGHTS, "truncated"]),
    "only pickled weights": (
        pickled,
        ["pytorch_model.bin", "can run code", "graft convert"],
    ),
    "no weights": (without(WEIGHTS), [f"has no {WEIGHTS}"]),
    "no config": (without("config.json"), ["has no config.json"]),
    "broken config": (write("config.json", '{"model_type": '), ["config.json is no valid JSON"]),
    "config that is a list": (write("config.json", "[]"), ["holds a list", "JSON object"]),
    "unknown family": (
        change_json("config.json", model_type="nonsense"),
        ["config.json is not understood", "nonsense"],
    ),
    "not a causal model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
        ["no causal language model", "ForCausalLM"],
    ),
    "wrong type in config": (
        change_json("config.json", hidden_size="large"),
        ["config.json is not understood", "hidden_size"],
    ),
    "no heads": (
        change_json("config.json", num_attention_heads=0),
        ["config.json is not understood"],
    ),
    "quantised by another tool": (
        change_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ["quantised by another tool", "gptq", "graft convert"],
    ),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), ["has no tokenizer"]),
    "broken tokenizer": (write("tokenizer.json", "{"), ["has no tokenizer that can be loaded"]),
    "damaged vocabulary": (
        change_json("tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}),
        ["has no tokenizer that can be loaded"],
    ),
    "broken generation settings": (
        write("generation_config.json", "{"),
        ["generation_config.json is no valid JSON"],
    ),
    "index into the parent folder": (
        index({"lm_head.weight": "../outside.safetensors"}),
        [INDEX, "../outside.safetensors", "not in the folder"],
    ),
    "index to an absolute path": (index({"a": "/etc/hostname"}), [INDEX, "/etc/hostname"]),
    "index to a missing file": (
        index({"a": "part.safetensors", "b": "gone.safetensors"}),
        [INDEX, "'gone.safetensors' is named there but not in the folder"],
    ),
    "index that holds a list": (index([]), [INDEX, "weight_map is []"]),
    "broken index": (write(INDEX, "{"), [INDEX, "no valid JSON"]),
    "exotic dtype": (
        change_tensors(lambda t: t.update({"x": torch.ones(1, dtype=torch.complex64)})),
        ["tensor 'x' is C64, which is not read"],
    ),
}

QUANTISED: dict[str, tuple[Damage, list[str]]] = {
    "a later container": (
        change_json("graft.json", format_version=99),
        ["format_version 99", "reads 1", "update graft"],
    ),
    "no version": (write("graft.json", "{}"), ["format_version None"]),
    "no layers": (write("graft.json", '{"format_version": 1}'), ["layers is missing"]),
    "unknown format": (
        change_json("graft.json", layers={LAYER: {"format": "nf5"}}),
        ["graft.json", LAYER, "unknown weight format 'nf5'; did you mean 'nf4'?"],
    ),
    "unknown option": (
        change_json("graft.json", layers={LAYER: {"format": "int", "bits": 5}}),
        [LAYER, "bits is 5; expected 2, 3, 4 or 8"],
    ),
    "three bad layers": (
        change_json("graft.json", layers={LAYER: "int", "model.x": {}, "lm_head": {}}),
        ["3 problems", f"{LAYER}' names no format", "'model.x' is no linear layer", "lm_head"],
    ),
    "grid that is no format": (
        change_json("graft.json", layers={LAYER: {"format": "latent", "grid": "nf4"}}),
        [LAYER, "grid is 'nf4'"],
    ),
    "grid and options of another": (
        change_json(
            "graft.json", layers={LAYER: {"format": "latent", "grid": {"format": "nf4"}, "bits": 2}}
        ),
        [LAYER, "expected a format with all its options"],
    ),
    "container file lost": (without("graft.json"), ["quantised folder without its graft.json"]),
    "packed tensor missing": (
        change_tensors(lambda t: t.pop(f"{LAYER}.scales")),
        [f"tensor {LAYER}.scales is missing"],
    ),
    "packed tensor of another shape": (
        change_tensors(lambda t: t.update({f"{LAYER}.codes": torch.ones(8, 8, dtype=torch.uint8)})),
        [f"{LAYER}.codes is torch.uint8 [8, 8]; its format makes it torch.uint8 [88, 48]"],
    ),
    "packed tensor of another dtype": (
        change_tensors(lambda t: t.update({f"{LAYER}.scales": torch.ones(88, 3)})),
        [f"{LAYER}.scales is torch.float32 [88, 3]", "torch.float16 [88, 3]"],
    ),
    "another format than the tensors'": (
        change_json("graft.json", layers={LAYER: {"format": "int8"}}),
        ["do not fit", f"{LAYER}.codes is torch.uint8"],
    ),
    "truncated": (cut(-10), ["truncated"]),
}


def refused(folder: Path) -> str:
    with pytest.raises(GraftError) as raised:
        load_model(str(folder), device="cpu")
    return str(raised.value)


@pytest.mark.parametrize("case", PLAIN)
def test_a_folder_that_does_not_fit(case, copied, monkeypatch) -> None:
    folder = copied("llama")
    damage, pieces = PLAIN[case]
    damage(folder)
    # Whatever is wrong is found before any weight is read.
    monkeypatch.delattr(WeightFiles, "read")
    monkeypatch.delattr(WeightFiles, "read_once")
    message = refused(folder)
    for piece in pieces:
        assert piece in message
    assert str(folder) in message


@pytest.mark.parametrize("case", QUANTISED)
def test_a_quantised_folder_that_does_not_fit(case, load, tmp_path) -> None:
    folder = tmp_path / "q"
    save_model(load("llama", weight_format=make_format("int")), folder)
    damage, pieces = QUANTISED[case]
    damage(folder)
    message = refused(folder)
    for piece in pieces:
        assert piece in message
    assert str(folder) in message


@pytest.mark.parametrize(
    ("model", "piece"),
    [
        ("no_such_folder", "there is no folder 'no_such_folder'"),
        ("./no/such", "there is no folder './no/such'"),
        ("/no/such", "there is no folder '/no/such'"),
        ("a/b/c", "no hub id of form owner/name"),
        ("owner/no-such-model", "the hub has it not or cannot be reached"),
        ("owner/", "there is no folder"),
        ("", "has no config.json"),
    ],
)
def test_a_name_that_is_neither_folder_nor_hub_id(model, piece, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GraftError) as raised:
        find_folder(model)
    assert piece in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_device_or_target_stops_before_the_weights(checkpoint, monkeypatch) -> None:
    monkeypatch.delattr(WeightFiles, "read_once")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = str(checkpoint("llama"))
    with pytest.raises(GraftError, match="'cuda' is not available"):
        load_model(folder, device="cuda")
    with pytest.raises(GraftError, match="'nope' matches none of the 14 linear layers"):
        load_model(folder, weight_format=make_format("int"), targets=("nope",), device="cpu")


def test_a_weight_that_is_not_finite(copied) -> None:
    folder = copied("llama")
    change_tensors(lambda t: t[f"{LAYER}.weight"].fill_(float("nan")))(folder)
    with pytest.raises(GraftError, match=f"{LAYER}: the scales or offsets are not finite"):
        load_model(str(folder), weight_format=make_format("int"), device="cpu")


def test_json_that_is_no_text(tmp_path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(GraftError, match="a.json is no UTF-8 text"):
        read_json(tmp_path / "a.json")
    with pytest.raises(GraftError, match="b.json cannot be read: No such file"):
        read_json(tmp_path / "b.json")
