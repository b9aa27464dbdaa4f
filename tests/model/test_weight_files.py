"""Weight files are mapped, not read: in any size, in several files, at any place in a file."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.adapters.attach import frozen_layers
from graft.formats.registry import make_format
from graft.model.load import load_model
from graft.model.save import save_model
from graft.model.weight_files import WeightFiles

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
FORMATS = [("nf4", {"double_quant": True}), ("int", {"bits": 3}), ("int8", {})]


def write_header(path: Path, header: dict[str, Any], data: bytes = b"", size: int = 0) -> None:
    """Write a safetensors file by hand: the header as it comes, unaligned; a hole up to `size`."""
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
        if size:
            file.truncate(8 + len(text) + size)


def mapping(file: Path) -> tuple[range, int]:
    """The addresses of this process's mapping of a file, and how much of it was touched."""
    inside, span = False, range(0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            inside = line.endswith(str(file))
            if inside:
                span = range(*(int(part, 16) for part in first.split("-")))
        elif inside and first == "Rss:":
            return span, int(line.split()[1]) * 1024
    raise AssertionError(f"{file} is not mapped")


@LINUX
def test_a_file_larger_than_the_memory_is_mapped(tmp_path) -> None:
    size = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    header = {
        "a": {"dtype": "U8", "shape": [size - 4], "data_offsets": [0, size - 4]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [size - 4, size]},
    }
    write_header(tmp_path / "model.safetensors", header, size=size)
    with WeightFiles(tmp_path) as files:
        assert files.shape("a") == (size - 4,)
        assert files.read("a")[[0, -1]].tolist() == [0, 0]
        for read in (files.read, files.read_once):
            assert read("b").tolist() == [0, 0, 0, 0]


def test_tensors_at_unaligned_places_are_copied(tmp_path) -> None:
    values = torch.tensor([1.5, -2.25, 3.0])
    half, whole = values.half().numpy().tobytes(), values.numpy().tobytes()
    for shift in range(4):  # of all data in the file
        header = {
            "__metadata__": {"pad": " " * shift},
            "codes": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "half": {"dtype": "F16", "shape": [3], "data_offsets": [3, 9]},
            "whole": {"dtype": "F32", "shape": [3, 1], "data_offsets": [9, 21]},
            "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [21, 21]},
        }
        write_header(tmp_path / "model.safetensors", header, b"\1\2\3" + half + whole)
        with WeightFiles(tmp_path) as files:
            for read in (files.read, files.read_once):
                assert read("codes").tolist() == [1, 2, 3]
                assert torch.equal(read("half"), values.half())
                assert torch.equal(read("whole"), values[:, None])
                assert read("none").shape == (0, 4)
                for name in ("half", "whole"):
                    assert read(name).data_ptr() % read(name).element_size() == 0


def test_writing_to_a_tensor_leaves_the_file_as_it_is(tmp_path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(4.0)}, file)
    before = file.read_bytes()
    with WeightFiles(tmp_path) as files:
        tensor = files.read("a")
    assert tensor.add_(1).tolist() == [1, 2, 3, 4]  # the mapping outlives `files`
    assert file.read_bytes() == before


@pytest.fixture
def quantised(load, tmp_path) -> Callable[..., Path]:
    """A function of a format that returns a quantised folder of its own."""

    def make(name: str, options: dict[str, Any]) -> Path:
        folder = tmp_path / "q"
        save_model(load("llama", weight_format=make_format(name, options)), folder)
        return folder

    return make


@LINUX
@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_loading_a_quantised_folder_maps_all_and_touches_nothing(name, options, quantised) -> None:
    folder = quantised(name, options)
    model = load_model(str(folder), dtype="float32", device="cpu").model
    span, touched = mapping(folder / "model.safetensors")
    assert touched == 0
    packed = {id(tensor) for _, layer in frozen_layers(model) for tensor in layer.packed.values()}
    parameters = list(model.parameters())  # embeddings, norms and head too
    assert len(parameters) > len(packed) > 0
    for parameter in parameters:
        assert parameter.data_ptr() in span
        assert parameter.data_ptr() % parameter.element_size() == 0


def test_what_is_written_lies_at_aligned_places(quantised) -> None:
    for name, options in FORMATS:
        folder = quantised(name, options)
        content = (folder / "model.safetensors").read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        sizes = {"F32": 4, "F16": 2, "U8": 1, "I8": 1}
        for key, entry in json.loads(content[8:begin]).items():
            if key != "__metadata__":
                assert (begin + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0, key
        shutil.rmtree(folder)


@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_a_quantised_folder_in_several_files(name, options, quantised, logits, tmp_path) -> None:
    folder = quantised(name, options)
    expected = logits(load_model(str(folder), dtype="float32", device="cpu").model)
    tensors = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for part in range(3):
        file = f"model-{part + 1:05}-of-00003.safetensors"
        chosen = dict(list(tensors.items())[part::3])  # a layer's tensors in different files
        save_file(chosen, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    assert torch.equal(logits(loaded.model), expected)
