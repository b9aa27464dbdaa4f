"""What is recognised from the files, and what is no source at all."""

from __future__ import annotations

import json
import shutil

import pytest

import graft
from graft.convert.base import Reader
from graft.convert.folder import plain_tensors
from graft.convert.registry import READERS
from graft.convert.source import Source
from graft.errors import GraftError
from graft.model.folder import CONVERTIBLE


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
            settings(quantization_config={"quant_method": "fp8"}),
            "quantised by another tool.*fp8.*graft reads GPTQ, AWQ",
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
    graft.load(tmp_path / "out")


def test_whoever_loads_such_a_folder_is_told_of_every_tool_that_is_read():
    assert set(CONVERTIBLE) == {reader.quant_method for reader in READERS.values()}


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_settings_that_are_none_are_refused(key, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "theirs")
    settings(**{key: 0.5})(tmp_path / "theirs")
    with pytest.raises(GraftError, match=f"{key} is 0.5; expected settings by name"):
        graft.convert_model(tmp_path / "theirs", tmp_path / "out")
