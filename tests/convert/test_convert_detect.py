"""What is recognised from the files, and what is no source at all."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import graft
from graft.convert.base import Reader
from graft.convert.config import ConvertConfig
from graft.convert.folder import plain_tensors
from graft.convert.registry import READERS
from graft.convert.source import DenseLayer, Source
from graft.errors import GraftError
from graft.model.folder import read_config


def settings(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def our_own(folder):
    (folder / "graft.json").write_text("{}")


def empty(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: None, "holds nothing to convert: its weights are not quantised"),
        (our_own, "is in graft's own format already"),
        (empty, "holds no weights; graft reads GPTQ"),
        (
            settings(quantization_config={"quant_method": "other"}),
            "quantised by another tool.*other.*graft reads GPTQ, AWQ",
        ),
        (settings(quantization_config={"packed_by": "x"}), "quantised by another tool"),
        (settings(model_type="none", quantization={"group_size": 64, "bits": 4}), "'none'"),
    ],
)
def test_other_folders_are_refused(change, words, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "theirs")
    change(tmp_path / "theirs")
    with pytest.raises(GraftError, match=words):
        graft.convert_model(tmp_path / "theirs", tmp_path / "out")


def test_other_paths_are_refused(tiny_base, tmp_path):
    with pytest.raises(GraftError, match="there is no folder"):
        graft.convert_model(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(GraftError, match="no folder, .gguf file or PyTorch file"):
        graft.convert_model(tiny_base / "config.json", tmp_path / "out")
    with pytest.raises(GraftError, match="absent.gguf: no such file"):
        graft.convert_model(tmp_path / "absent.gguf", tmp_path / "out", tokenizer=tiny_base)
    with pytest.raises(GraftError, match="exists already"):
        graft.convert_model(tiny_base, tiny_base)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(GraftError, match="is an adapter .*graft adopt .*adapter --out RUN"):
        graft.convert_model(tmp_path / "adapter", tmp_path / "out")


class RawReader(Reader):
    """A tool that writes plain safetensors and its own name into config.json."""

    quant_method = "raw"

    def open_folder(self, folder):
        files = folder.weights()
        return Source("raw", folder.skeleton(), {}, plain_tensors(files, ()))


def test_a_tool_is_an_entry(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "theirs")
    settings(quantization_config={"quant_method": "raw"})(tmp_path / "theirs")
    READERS.add("raw", RawReader(), "raw files")
    try:
        report = graft.convert_model(tmp_path / "theirs", tmp_path / "out")
        with pytest.raises(GraftError, match="pickled PyTorch weights and raw files"):
            graft.convert_model(tiny_base / "config.json", tmp_path / "other")
    finally:
        READERS.remove("raw")
    assert report.kind == "raw" and not report.layers
    assert report.notes == (
        "config.json says raw, and no tensor is quantised: the weights are as they are",
    )
    graft.load(tmp_path / "out")


class RawlyQuantisedReader(RawReader):
    """The same tool, whose layers' weights no format of graft holds."""

    def open_folder(self, folder):
        files = folder.weights()
        names = [key.removesuffix(".weight") for key in files if key.endswith("proj.weight")]
        tensors = plain_tensors(files, (f"{name}.weight" for name in names))

        def read(name):
            weight = files.read_once(f"{name}.weight").float()
            return weight.T if folder.config["model_type"] == "gpt2" else weight

        def layer(name, out_features, in_features):
            return DenseLayer("raw codes", partial(read, name))

        layers = {name: partial(layer, name) for name in names}
        return Source("raw", folder.skeleton(), layers, tensors, notes=["it is raw"])


@pytest.fixture
def gpt2(tiny_base, tmp_path):
    config = GPT2Config(
        vocab_size=400, n_embd=64, n_inner=96, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for file in tiny_base.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("family", ["tiny_base", "gpt2"])
def test_what_no_format_holds_comes_in_as_floats_where_that_is_asked(family, request, tmp_path):
    base = request.getfixturevalue(family)
    shutil.copytree(base, tmp_path / "theirs")
    settings(quantization_config={"quant_method": "raw"})(tmp_path / "theirs")
    READERS.add("raw", RawlyQuantisedReader(), "raw files")
    try:
        with pytest.raises(GraftError, match=r"weights are raw codes .* add --dequantise"):
            graft.convert_model(tmp_path / "theirs", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        asked = ConvertConfig(dequantise=True)
        report = graft.convert_model(tmp_path / "theirs", tmp_path / "out", config=asked)
    finally:
        READERS.remove("raw")
    assert set(report.dense) == {"raw codes"} and report.notes[0] == "it is raw"
    plain = [note for note in report.notes if "linear layers are not quantised" in note]
    assert len(plain) == (family == "gpt2"), "of which the file quantises half"
    ids = torch.arange(5, 15)[None]
    expected, found = graft.load(base)[0], graft.load(tmp_path / "out")[0]
    assert torch.equal(expected(input_ids=ids).logits, found(input_ids=ids).logits)


def test_whoever_loads_such_a_folder_is_told_how_to_bring_it_in(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "theirs")
    settings(quantization_config={"quant_method": "gptq"})(tmp_path / "theirs")
    with pytest.raises(GraftError, match=r"quantised by another tool .*graft convert .*theirs"):
        read_config(tmp_path / "theirs")


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_settings_that_are_none_are_refused(key, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "theirs")
    settings(**{key: 0.5})(tmp_path / "theirs")
    with pytest.raises(GraftError, match=f"{key} is 0.5; expected settings by name"):
        graft.convert_model(tmp_path / "theirs", tmp_path / "out")
