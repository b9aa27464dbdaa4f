"""GGUF files that llama.cpp cut into parts: read whole, or refused by name."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from gguf import GGUFValueType as Value
from gguf_written import CONFIGS, Written, parts_of, rewritten

import graft
from graft.errors import GraftError


@pytest.fixture
def written(tmp_path):
    return Written(tmp_path / "m.gguf", CONFIGS["llama"])


def by_block(name):
    return {"blk.0": 0, "blk.1": 1}.get(name[:5], 2)


def head_alone(name):
    """A cut after which every block still begins in the first file."""
    return int(name == "output.weight")


@pytest.mark.parametrize(("place", "count"), [(by_block, 3), (head_alone, 2)])
def test_a_file_in_parts_is_the_whole_file(place, count, written, tiny_base, tmp_path):
    files = parts_of(written.path, tmp_path / "part", count, place)
    graft.convert_model(written.path, tmp_path / "whole", tokenizer=tiny_base)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for number, file in enumerate(files):  # whichever of them is given
        out = tmp_path / f"out{number}"
        graft.convert_model(file, out, tokenizer=tiny_base)
        assert (out / "model.safetensors").read_bytes() == expected


def test_parts_that_all_have_the_metadata(written, tiny_base, tmp_path):
    files = parts_of(written.path, tmp_path / "part", 2, head_alone)
    total = len(written.model.state_dict())
    add = [
        ("split.no", 1, Value.UINT16),
        ("split.count", 2, Value.UINT16),
        ("split.tensors.count", total, Value.INT32),
    ]
    rewritten(written.path, files[1], add=add, keep=lambda name: name == "output.weight")
    graft.convert_model(files[0], tmp_path / "out", tokenizer=tiny_base)
    model, _ = graft.load(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, written.model.lm_head.weight)


def test_a_single_part_is_a_whole_file(written, tiny_base, tmp_path):
    (file,) = parts_of(written.path, tmp_path / "one", 1, lambda name: 0)
    graft.convert_model(file, tmp_path / "out", tokenizer=tiny_base)


def test_a_folder_that_holds_one_file_is_that_file(written, tiny_base, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    files = parts_of(written.path, folder / "part", 3, by_block)
    graft.convert_model(folder, tmp_path / "out", tokenizer=tiny_base)
    shutil.copy(files[0], folder / "mmproj.gguf")
    words = "holds several GGUF files; name one of them: mmproj.gguf, part-00001-of-00003.gguf"
    with pytest.raises(GraftError, match=re.escape(words)):
        graft.convert_model(folder, tmp_path / "again", tokenizer=tiny_base)


def test_a_tensor_that_is_there_twice(written, tiny_base, tmp_path):
    data = written.path.read_bytes()
    assert data.count(b"blk.1.attn_q.weight") == 1
    twice = tmp_path / "twice.gguf"
    twice.write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"))
    with pytest.raises(GraftError, match=r"the name 'blk.0.attn_q.weight' stands there twice"):
        graft.convert_model(twice, tmp_path / "out", tokenizer=tiny_base)


def lost(files, source):
    files[0].unlink()
    files[1].unlink()
    return files[2]


def renamed(files, source):
    return files[0].rename(files[0].with_name("model.gguf"))


def misnumbered(files, source):
    files[2].unlink()
    shutil.copy(files[1], files[2])
    return files[0]


def of_another(files, source):
    change(files[1], source, [("llama.rope.freq_base", 5000.0, Value.FLOAT32)])
    return files[0]


def of_other_counts(files, source):
    change(files[1], source, [("split.tensors.count", 3, Value.INT32)])
    return files[0]


def with_less(files, source):
    change(files[2], source, (), lambda name: name == "output.weight")
    return files[0]


def with_more(files, source):
    change(files[2], source, (), lambda name: by_block(name) != 0)
    return files[0]


def without_count(files, source):
    change(files[0], source, (), drop=("split.count",))
    return files[0]


def without_keys_or_name(files, source):
    change(files[0], source, (), drop=("split.count", "split.no"))
    return files[0].rename(files[0].with_name("model.gguf"))


def cut_short(files, source):
    files[2].write_bytes(files[2].read_bytes()[:-50])
    return files[0]


def change(file, source, add, keep=None, drop=()):
    """Write a part again, from the whole file."""
    number = int(file.name[5:10]) - 1
    total = 21
    split = {
        "split.no": (number, Value.UINT16),
        "split.count": (3, Value.UINT16),
        "split.tensors.count": (total, Value.INT32),
    }
    added = [(key, *value) for key, value in split.items() if key not in drop]
    added = [one for one in added if one[0] not in {key for key, *_ in add}]
    kept = keep or (lambda name: by_block(name) == number)
    rewritten(source, file, add=[*added, *add], keep=kept, bare=number > 0)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lost,
            "is part 3 of 3 of a file, and not all are beside it: part-00001-of-00003.gguf, "
            "part-00002-of-00003.gguf are missing; download them too",
        ),
        (renamed, "is part 1 of 3 of a file; expected a name that ends with -00001-of-00003.gguf"),
        (misnumbered, "part-00003-of-00003.gguf: split.no is 1; expected 2"),
        (
            of_another,
            "part-00002-of-00003.gguf has other metadata than part-00001-of-00003.gguf "
            "(llama.rope.freq_base): it is a part of another model",
        ),
        (of_other_counts, "part-00002-of-00003.gguf: split.tensors.count is 3; expected 21"),
        (with_less, "split.tensors.count is 21, and the 3 parts hold 19"),
        (with_more, "9 tensors are in two parts: "),
        (without_count, "its name makes it one of 3 parts, and its metadata have no split.count"),
        (without_keys_or_name, "split.tensors.count is 21, and it holds 9"),
        (cut_short, "part-00003-of-00003.gguf: not a complete GGUF file"),
    ],
)
def test_what_is_not_whole_is_refused_by_name(damage, words, written, tiny_base, tmp_path):
    files = parts_of(written.path, tmp_path / "part", 3, by_block)
    file = damage(files, written.path)
    with pytest.raises(GraftError, match=re.escape(words)):
        graft.convert_model(file, tmp_path / "out", tokenizer=tiny_base)
    assert not (tmp_path / "out").exists()
