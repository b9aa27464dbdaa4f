"""What other libraries are given to read: bounded before, and one error for all that they raise."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.data.encode import encode_prompt
from graft.errors import GraftError
from graft.model.folder import read_config, read_generation_config, read_tokenizer
from graft.model.load import load_model
from graft.model.subject import open_subject
from graft.model.tokenizer_file import check_growth
from graft.understood import understood


class PanicException(BaseException):  # noqa: N818  (its name in Rust's bindings)
    __module__ = "pyo3_runtime"


@pytest.mark.parametrize(
    "kind", [ZeroDivisionError, RecursionError, AttributeError, PanicException]
)
def test_whatever_a_library_raises_is_one_error(kind) -> None:
    words = r"^FILE is not understood: it \\x1b\[31m fell$"
    with pytest.raises(GraftError, match=words), understood("FILE"):
        raise kind("it \x1b[31m fell\n")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_who_ends_the_process_is_not_kept_from_it(kind) -> None:
    with pytest.raises(kind), understood("FILE"):
        raise kind


@pytest.fixture
def folder(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


def change(file, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000; at most 10,000"),
        ({"num_hidden_layers": 9000}, "more than 20,000 modules, and the files hold 20 tensors"),
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_theta is 1000000.0, and in rope_parameters 10000.0",
        ),
        ({"num_attention_heads": -4}, "num_attention_heads is -4, and it is a count"),
        ({"text_config": [{"n_layer": 1e15}]}, "n_layer is 1,000,000,000,000,000.0; at most"),
        ({"num_attention_heads": 0}, "not understood|cannot be built|can be built"),
        ({"vocab_size": -1}, "makes no causal language model that can be built"),
        ({"dtype": "1"}, "config.json is not understood"),
        ({"rope_parameters": 3}, "not understood|can be built"),
    ],
)
def test_a_configuration_asks_for_no_more_than_the_files_hold(values, words, folder) -> None:
    change(folder / "config.json", **values)
    with pytest.raises(GraftError, match=words):
        _ = open_subject(folder).skeleton


def test_bounds_can_be_widened(folder, monkeypatch) -> None:
    change(folder / "config.json", num_hidden_layers=10_001)
    monkeypatch.setenv("GRAFT_BOUNDS", "2")
    assert read_config(folder).num_hidden_layers == 10_001


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokenizer_config.json", {"tokenizer_class": True}),
        ("tokenizer_config.json", {"eos_token": 3}),
        ("tokenizer_config.json", {"extra_special_tokens": {"a": ["\ud800"]}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
        ("tokenizer.json", {"model": None}),
    ],
)
def test_odd_tokenizers_are_refused(name, values, folder) -> None:
    change(folder / name, **values)
    with pytest.raises(GraftError, match=r"base"):
        read_tokenizer(folder)


def test_deep_nesting_is_refused(folder) -> None:
    text = (folder / "tokenizer.json").read_text().rstrip()[:-1]
    (folder / "tokenizer.json").write_text(text + ',"x":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(GraftError, match="has no tokenizer that can be loaded"):
        read_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json", "chat_template.jinja"])
def test_nobody_waits_for_a_pipe(name, folder) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(GraftError, match=f"{name} is no regular file"):
        read_tokenizer(folder)
    with pytest.raises(GraftError, match=f"{name} is no regular file"):
        read_config(folder)


def test_a_file_of_settings_has_a_largest_size(folder) -> None:
    os.truncate(folder / "tokenizer.json", 2**40)  # takes no room on the disk
    with pytest.raises(GraftError, match=r"1,099,511,627,776 bytes; at most 268,435,456"):
        read_tokenizer(folder)


def test_odd_defaults_of_generation_are_refused(folder) -> None:
    change(folder / "generation_config.json", watermarking_config=3)
    with pytest.raises(GraftError, match="generation_config.json is not understood"):
        read_generation_config(folder)


def test_integers_are_no_dense_weights(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].view(torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(GraftError, match=f"{name} holds torch.int32; expected torch.float32"):
        load_model(folder)


def test_a_token_without_an_embedding_is_told_by_name(folder, rows) -> None:
    change(folder / "tokenizer_config.json", eos_token="<|new|>")
    words = r"token '<\|new\|>' has the number"
    with pytest.raises(GraftError, match=words):
        graft.evaluate_model(folder, str(rows), max_length=48)
    with pytest.raises(GraftError, match=words):
        graft.generate(folder, "red <|new|>")


@pytest.mark.parametrize("tokens", ["2", 1e400, 10**30, True, [2, "3"], {"a": 1}, 2.0])
def test_tokens_that_end_a_text_are_numbers(folder, tokens) -> None:
    change(folder / "generation_config.json", eos_token_id=tokens)
    with pytest.raises(GraftError, match="eos_token_id is .*; expected the number of a token"):
        read_generation_config(folder)
    change(folder / "generation_config.json", eos_token_id=[1, 2], pad_token_id=-1)
    assert read_generation_config(folder).eos_token_id == [1, 2]


def test_a_pattern_that_fails_on_some_texts_is_one_error(folder) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated"}
    change(folder / "tokenizer.json", pre_tokenizer=split | {"invert": False})
    tokenizer = read_tokenizer(folder)
    with pytest.raises(GraftError, match=r"tokenizer\.json makes a tokenizer that fails on a text"):
        encode_prompt("text", "a" * 40, tokenizer, "\n")


def replace(pattern, content) -> dict:
    kind = {"String": pattern} if isinstance(pattern, str) else {"Regex": pattern.pattern}
    return {"type": "Replace", "pattern": kind, "content": content}


@pytest.mark.parametrize(
    ("steps", "becomes"),
    [
        ([replace("a", "aa")] * 25, "33,554,432"),
        ([replace("a", "b" * 10), replace("b", "a" * 10), replace("a", "cc")], "200"),
        ([replace(re.compile("a*"), "aaa")] * 4, "256"),
        ([{"type": "Sequence", "normalizers": [replace("", "aa")] * 4}], "81"),
        ([{"type": "Prepend", "prepend": "x" * 100}], "101"),
        ([replace("ab", "ab" * 65)], "65"),
    ],
)
@pytest.mark.parametrize(
    ("part", "inside"), [("normalizer", "normalizers"), ("decoder", "decoders")]
)
def test_a_tokenizer_makes_no_more_of_a_text_than_the_bound(
    part, inside, steps, becomes, folder
) -> None:
    change(folder / "tokenizer.json", **{part: {"type": "Sequence", inside: steps}})
    with pytest.raises(GraftError, match=f"{part} may make {becomes} characters of one; at most"):
        check_growth(folder / "tokenizer.json")


def test_no_tokenizer_is_loaded_whose_texts_grow(folder) -> None:
    steps = {"type": "Sequence", "normalizers": [replace("a", "aa")] * 25}
    change(folder / "tokenizer.json", normalizer=steps)
    with pytest.raises(GraftError, match="33,554,432 characters of one"):
        read_tokenizer(folder)
    text = (folder / "tokenizer.json").read_text().replace('"pattern"', '"p\\u0061ttern"')
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(GraftError, match="33,554,432 characters of one"):
        read_tokenizer(folder)
    (folder / "tokenizer.json").write_text(text.rstrip()[:-1] + ', "normalizer": null}')
    with pytest.raises(GraftError, match="names a key twice"):
        read_tokenizer(folder)
    listed = [[{"String": "a"}, "aa"]] * 25  # which tokenizers takes for the same
    (folder / "tokenizer.json").write_text(json.dumps({"normalizer": {"normalizers": listed}}))
    with pytest.raises(GraftError, match="expected an object with its type"):
        read_tokenizer(folder)


def test_replacements_that_do_not_feed_each_other_may_be_many(folder) -> None:
    steps = [replace(letter, letter.upper() + " ") for letter in "bcdefghijklm"]
    steps += [replace(re.compile(r"\s+"), " "), {"type": "Prepend", "prepend": "_"}]
    change(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    assert read_tokenizer(folder)
