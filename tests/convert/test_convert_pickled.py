from __future__ import annotations

import copy
import json
import os
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft.errors import GraftError


@pytest.fixture
def tensors(tiny_base):
    return load_file(tiny_base / "model.safetensors")


@pytest.fixture
def bare(tiny_base, tmp_path):
    """The base without its weights."""
    shutil.copytree(tiny_base, tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").rename(tmp_path / "base.safetensors")
    return tmp_path / "theirs"


@pytest.fixture
def check(tensors, tiny_base, tmp_path, logits):
    def run(source):
        report = graft.convert_model(source, tmp_path / "out")
        assert report.layers == {} and report.bits_per_weight is None
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        expected = logits(graft.load(tiny_base)[0])
        assert torch.equal(logits(graft.load(tmp_path / "out")[0]), expected)
        return report

    return run


def test_one_file(tensors, bare, check):
    torch.save(tensors, bare / "pytorch_model.bin")
    assert check(bare).kind == "PyTorch, pickled"


@pytest.mark.parametrize("zipped", [True, False])
def test_shards_by_an_index(zipped, tensors, bare, check):
    names = list(tensors)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in shards.items():
        state = {name: tensors[name].clone() for name in part}
        torch.save(state, bare / file, _use_new_zipfile_serialization=zipped)
    places = {name: file for file, part in shards.items() for name in part}
    (bare / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    check(bare)


@pytest.mark.parametrize("name", ["weights.pth", "model.pt"])
def test_a_file_of_any_name_beside_the_configuration(name, tensors, bare, check):
    torch.save({"state_dict": tensors, "epoch": 3}, bare / name)
    torch.save({"state": {}}, bare / "optimizer.pt")
    check(bare)


def test_the_file_itself_may_be_named(tensors, bare, check):
    torch.save(tensors, bare / "a.pth")
    torch.save({}, bare / "b.pth")
    with pytest.raises(GraftError, match="holds 2 pickled files"):
        graft.convert_model(bare, bare.parent / "out")
    check(bare / "a.pth")


def test_tied_tensors_are_written_once_and_prefixes_do_not_matter(tensors, bare, check):
    tied = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tied["lm_head.weight"] = tied["embed_tokens.weight"]
    torch.save(tied, bare / "pytorch_model.bin")
    check(bare)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept(dtype, tensors, bare, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    torch.save(state, bare / "pytorch_model.bin")
    graft.convert_model(bare, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in state)
    graft.load(tmp_path / "out")


class Runs:
    def __reduce__(self):
        return os.mkdir, ("/tmp/graft-must-not-run",)


def broken(bare):
    (bare / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(100))


def with_code(bare):
    torch.save({"a": torch.ones(2), "b": Runs()}, bare / "pytorch_model.bin")


def a_module(bare):
    torch.save(torch.nn.Linear(2, 2), bare / "pytorch_model.bin")


def saving(value):
    return lambda bare: torch.save(value, bare / "pytorch_model.bin")


def exotic(bare):
    state = load_file(bare.parent / "base.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.float8_e4m3fn)
    torch.save(state, bare / "pytorch_model.bin")


def index(weight_map):
    def write(bare):
        torch.save({}, bare / "a.bin")
        path = bare / "pytorch_model.bin.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))

    return write


def quantised(bare):
    torch.save({"a": torch.ones(1)}, bare / "pytorch_model.bin")
    config = json.loads((bare / "config.json").read_text())
    settings = {"quantization_config": {"quant_method": "gptq"}}
    (bare / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (with_code, "is refused: it holds more than tensors.*mkdir"),
        (a_module, "is refused: it holds more than tensors.*Linear"),
        (broken, "pytorch_model.bin is (refused|no readable PyTorch file)"),
        (saving([1, 2]), "holds a list; expected tensors by name"),
        (saving({"a": 1}), "holds no tensors by name"),
        (exotic, "norm.weight is torch.float8_e4m3fn; graft keeps"),
        (saving({"a": torch.ones(1)}), "tensor model.embed_tokens.weight is missing"),
        (index({"a": "../a.bin"}), r"\.\./a.bin' is named there but not in the folder"),
        (index({"a": "gone.bin"}), "'gone.bin' is named there but not in the folder"),
        (index([]), r"weight_map is \[\]"),
        (quantised, "quantised by another tool and pickled"),
    ],
)
def test_what_cannot_be_read_is_refused_and_runs_nothing(write, words, bare, tmp_path):
    write(bare)
    with pytest.raises(GraftError, match=words):
        graft.convert_model(bare, tmp_path / "out")
    assert not os.path.exists("/tmp/graft-must-not-run")
    assert not (tmp_path / "out").exists()


def test_nobody_waits_for_a_pipe(bare, tmp_path):
    os.mkfifo(bare / "pytorch_model.bin")
    with pytest.raises(GraftError, match="pytorch_model.bin is no regular file"):
        graft.convert_model(bare, tmp_path / "out")


def test_integers_are_no_weights(tensors, bare, tmp_path):
    name = "model.norm.weight"
    torch.save(tensors | {name: tensors[name].int()}, bare / "pytorch_model.bin")
    with pytest.raises(GraftError, match=f"{name} is torch.int32; graft keeps"):
        graft.convert_model(bare, tmp_path / "out")


def repacked(source, target, change) -> None:
    """Write an archive again, compressed, or with entries that lie in the same bytes."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), **change(entry.filename))


def test_an_archive_holds_no_more_than_its_size(tensors, bare) -> None:
    file = bare / "pytorch_model.bin"
    torch.save(tensors, bare.parent / "plain.bin")
    is_pickle = {"compress_type": zipfile.ZIP_DEFLATED}
    repacked(bare.parent / "plain.bin", file, lambda n: is_pickle if n.endswith(".pkl") else {})
    with pytest.raises(GraftError, match=r"data\.pkl' in it is compressed, which torch.save never"):
        graft.convert_model(bare, bare.parent / "out")
    repacked(bare.parent / "plain.bin", file, lambda _: {})
    with zipfile.ZipFile(file, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for number in range(20):
            again = copy.copy(largest)
            again.filename = again.orig_filename = f"again/{number}"
            archive.filelist.append(again)
        archive._didModify = True
    with pytest.raises(GraftError, match="bytes and says that .* are in it"):
        graft.convert_model(bare, bare.parent / "out")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_wrapper_before_every_name_is_taken_off(prefix, tensors, bare, check):
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
    torch.save(wrapped, bare / "pytorch_model.bin")
    check(bare)


@pytest.mark.parametrize(
    ("change", "kind"),
    [(lambda t: t.to_sparse(), "sparse_coo"), (lambda t: t.to("meta"), "without data")],
)
def test_tensors_that_are_no_arrays_are_refused(change, kind, tensors, bare, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    torch.save(tensors | {name: change(tensors[name])}, bare / "pytorch_model.bin")
    with pytest.raises(GraftError, match=f"'{name}' is {kind}; expected a dense tensor"):
        graft.convert_model(bare, tmp_path / "out")
