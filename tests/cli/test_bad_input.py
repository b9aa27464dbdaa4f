"""Bad input: one clear message with the fix, a non-zero exit, and no half-written file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.cli.main import main

GOOD_ROW = json.dumps({"prompt": "red lamp", "completion": "the lamp is red"})


@dataclass
class Place:
    """A fresh folder with a copy of the tiny base and a good data file."""

    folder: Path
    base: Path
    data: Path

    def out(self) -> Path:
        return self.folder / "out"


@pytest.fixture
def place(tiny_base: Path, tmp_path: Path) -> Place:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    data = tmp_path / "rows.jsonl"
    data.write_text((GOOD_ROW + "\n") * 20, encoding="utf-8")
    return Place(tmp_path, base, data)


def train(place: Place, *words: str) -> list[str]:
    flags = ["--steps", "2", "--batch-size", "2"]
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    defaults = {"--model": place.base, "--data": place.data, "--out": place.out()}
    for flag, value in defaults.items():
        if flag not in given:
            flags += [flag, str(value)]
    return ["train", *flags, *words]


Arrange = Callable[[Place], list[str]]
CASES: dict[str, tuple[Arrange, list[str]]] = {}


def case(*expected: str) -> Callable[[Arrange], Arrange]:
    """Register a case: what it does, and pieces that the message must hold."""

    def register(arrange: Arrange) -> Arrange:
        CASES[arrange.__name__] = (arrange, list(expected))
        return arrange

    return register


@case("no_such_folder", "there is no folder")
def missing_model(place: Place) -> list[str]:
    return train(place, "--model", str(place.folder / "no_such_folder"))


@case("config.json")
def folder_that_is_no_model(place: Place) -> list[str]:
    (place.base / "config.json").unlink()
    return train(place)


@case("config.json", "JSON")
def config_that_is_no_json(place: Place) -> list[str]:
    (place.base / "config.json").write_text("{")
    return train(place)


@case("nothing.jsonl")
def missing_data(place: Place) -> list[str]:
    return train(place, "--data", str(place.folder / "nothing.jsonl"))


@case("empty")
def empty_data(place: Place) -> list[str]:
    place.data.write_text("")
    return train(place)


@case(".xyz", ".jsonl")
def unknown_kind_of_file(place: Place) -> list[str]:
    path = place.folder / "rows.xyz"
    path.write_text(GOOD_ROW)
    return train(place, "--data", str(path))


@case("question", "prompt", "rows.jsonl:1")
def wrong_keys(place: Place) -> list[str]:
    place.data.write_text('{"question": "a", "reply": "b"}\n' * 3)
    return train(place)


@case("rows.jsonl:700")
def one_bad_row_of_a_thousand(place: Place) -> list[str]:
    lines = [GOOD_ROW] * 1000
    lines[699] = '{"prompt": "red", "completion": 7}'
    place.data.write_text("\n".join(lines))
    return train(place)


@case("rows.jsonl:3")
def broken_json_line(place: Place) -> list[str]:
    place.data.write_text(GOOD_ROW + "\n" + GOOD_ROW + "\n{oops\n" + GOOD_ROW)
    return train(place)


@case("UTF-8")
def not_utf8(place: Place) -> list[str]:
    place.data.write_bytes(GOOD_ROW.encode() + b"\n\xff\xfe{}\n")
    return train(place)


@case("2 rows")
def too_few_rows_to_hold_some_out(place: Place) -> list[str]:
    place.data.write_text(GOOD_ROW)
    return train(place)


@case("rows.jsonl:1", "'<|newend|>' has the number", "rows of embeddings", "nothing was started")
def tokens_that_the_model_has_no_embedding_for(place: Place) -> list[str]:
    path = place.base / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"<|end|>"', '"<|newend|>"'))
    return train(place, "--rank", "0")


@case("the prompt", "'<|newend|>' has the number", "rows of embeddings")
def prompt_with_such_a_token(place: Place) -> list[str]:
    path = place.base / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"<|end|>"', '"<|newend|>"'))
    return ["generate", str(place.base), "--prompt", "red <|newend|>"]


@case("rows.jsonl:1", "--max-length")
def rows_without_a_target(place: Place) -> list[str]:
    row = json.dumps({"prompt": "red lamp " * 40, "completion": "chair"})
    place.data.write_text((row + "\n") * 4)
    return train(place, "--max-length", "16")


@case("--max-length 4096", "64")
def max_length_beyond_the_model(place: Place) -> list[str]:
    return train(place, "--max-length", "4096")


@case("truncated")
def truncated_safetensors(place: Place) -> list[str]:
    path = place.base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    return train(place)


@case("shape", "config.json")
def weights_of_another_shape(place: Place) -> list[str]:
    config = json.loads((place.base / "config.json").read_text())
    config["intermediate_size"] = 128
    (place.base / "config.json").write_text(json.dumps(config))
    return train(place)


@case("missing", "model.norm.weight")
def weights_that_are_not_all_there(place: Place) -> list[str]:
    path = place.base / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    return train(place)


@case("pickle", "graft convert")
def pickled_checkpoint(place: Place) -> list[str]:
    tensors = load_file(place.base / "model.safetensors")
    (place.base / "model.safetensors").unlink()
    torch.save(tensors, place.base / "pytorch_model.bin")
    return train(place)


@case("tokenizer")
def model_without_tokenizer(place: Place) -> list[str]:
    for path in place.base.glob("tokenizer*"):
        path.unlink()
    return train(place)


@case("'tpu'")
def unknown_device(place: Place) -> list[str]:
    return train(place, "--device", "tpu")


@case("qllora")
def unknown_method(place: Place) -> list[str]:
    return train(place, "--method", "qllora")


@case("--lerning-rate", "learning-rate")
def unknown_flag(place: Place) -> list[str]:
    return train(place, "--lerning-rate", "1")


@case("--export gguf: group_size is 16", "multiples of 32", "--export mlx: group_size is 16")
def group_size_that_the_targets_cannot_hold(place: Place) -> list[str]:
    return train(place, "--group-size", "16", "--export", "gguf", "mlx")


@case("group_size is 48", "32")
def group_size_that_there_is_not(place: Place) -> list[str]:
    return train(place, "--group-size", "48")


@case("'query'", "q_proj", "v_proj")
def target_that_matches_nothing(place: Place) -> list[str]:
    return train(place, "--targets", "query")


@case("full", "frozen")
def full_training_of_a_quantised_base(place: Place) -> list[str]:
    return train(place, "--method", "full", "--format", "nf4")


@case("--dropout", "qalora")
def dropout_where_it_has_no_form(place: Place) -> list[str]:
    return train(place, "--method", "qalora", "--dropout", "0.1")


@case("--rank", "--batch-size", "--dropout")
def several_problems_at_once(place: Place) -> list[str]:
    return train(place, "--rank", "0", "--batch-size=-1", "--dropout", "2")


@case("--steps and --epochs")
def steps_and_epochs(place: Place) -> list[str]:
    return train(place, "--epochs", "1")


@case("not finite", "--learning-rate")
def loss_that_is_not_a_number(place: Place) -> list[str]:
    return train(place, "--method", "lora", "--learning-rate", "1e30", "--steps", "20")


@case("exists already", "choose another --out")
def out_that_exists(place: Place) -> list[str]:
    place.out().mkdir()
    (place.out() / "precious.txt").write_text("keep me")
    return train(place)


@case("no run folder", "give --model and --data")
def resume_of_nothing(place: Place) -> list[str]:
    return ["train", "--resume", "--out", str(place.out())]


@case("no run folder", "precious.txt")
def resume_of_what_is_no_run(place: Place) -> list[str]:
    place.out().mkdir()
    (place.out() / "precious.txt").write_text("keep me")
    return train(place, "--resume")


@case("cannot be written")
def out_that_cannot_be_written(place: Place) -> list[str]:
    (place.folder / "file").write_text("I am a file")
    return train(place, "--out", str(place.folder / "file" / "run"))


@case("unknown key 'learning_rat'", "learning_rate")
def unknown_key_in_the_configuration(place: Place) -> list[str]:
    path = place.folder / "config.yaml"
    path.write_text(f"model: {place.base}\ndata: {place.data}\nout: x\nlearning_rat: 1\n")
    return ["train", str(path)]


@case("rank", "sixteen")
def value_of_the_wrong_type_in_the_configuration(place: Place) -> list[str]:
    path = place.folder / "config.yaml"
    path.write_text(f"model: {place.base}\ndata: {place.data}\nout: x\nrank: sixteen\n")
    return ["train", str(path)]


@case("YAML")
def configuration_that_is_no_yaml(place: Place) -> list[str]:
    path = place.folder / "config.yaml"
    path.write_text("a: [1,\n")
    return ["train", str(path)]


@case("no run folder")
def merge_of_a_model(place: Place) -> list[str]:
    return ["merge", str(place.base), "--out", str(place.out())]


@case("adapter", "peft")
def export_of_an_adapter_that_is_not_there(place: Place) -> list[str]:
    return ["export", str(place.base), "--to", "peft", "--out", str(place.out())]


@case("--tokenizer")
def gguf_without_its_tokenizer(place: Place) -> list[str]:
    (place.folder / "x.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    return ["eval", str(place.folder / "x.gguf"), "--data", str(place.data)]


@case("--data", "gptq")
def gptq_without_data(place: Place) -> list[str]:
    words = ["--format", "int", "--solver", "gptq"]
    return ["quantize", "--model", str(place.base), *words, "--out", str(place.out())]


@case("--solver gptq", "int8 has not")
def gptq_without_a_grid(place: Place) -> list[str]:
    words = ["--format", "int8", "--solver", "gptq", "--data", str(place.data)]
    return ["quantize", "--model", str(place.base), *words, "--out", str(place.out())]


@case("--solver hqq", "nf4 has none", "--format int")
def hqq_without_offsets(place: Place) -> list[str]:
    return train(place, "--method", "qlora", "--solver", "hqq")


@case("--init loftq", "qalora has none")
def loftq_without_a_low_rank_update(place: Place) -> list[str]:
    return train(place, "--method", "qalora", "--init", "loftq")


@case("--init loftq", "rounds nothing", "needs the whole model")
def loftq_on_dense_weights_and_with_gptq(place: Place) -> list[str]:
    return train(place, "--method", "lora", "--init", "loftq", "--solver", "gptq")


@case("already")
def quantising_what_is_quantised(place: Place) -> list[str]:
    quantised = place.folder / "quantised"
    assert (
        main(["quantize", "--model", str(place.base), "--format", "int", "--out", str(quantised)])
        == 0
    )
    return train(place, "--model", str(quantised), "--bits", "4")


@case("nothing was started", "'query'", "rows.jsonl:2", "group_size is 48")
def problems_of_different_kinds_at_once(place: Place) -> list[str]:
    place.data.write_text(GOOD_ROW + '\n{"prompt": 1, "completion": 2}\n' + GOOD_ROW)
    return train(place, "--targets", "query", "--group-size", "48")


@case("unknown command 'trian'", "train")
def unknown_command(place: Place) -> list[str]:
    return ["trian"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


MAY_LEAVE_ITS_RUN = {"loss_that_is_not_a_number"}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    arrange, expected = CASES[name]
    words = arrange(place)
    before = snapshot(place.folder)
    capsys.readouterr()
    try:
        status = main(words)
    except SystemExit as error:  # wrong flags end in the parser
        status = int(error.code or 0)
    printed = capsys.readouterr()
    told = printed.out + printed.err
    assert status != 0, told
    assert "Traceback" not in told
    flat = " ".join(told.replace("│", " ").split())
    for piece in expected:
        assert piece in flat, told
    after = snapshot(place.folder)
    assert {name: after.get(name) for name in before} == before, "an input was changed"
    left = {path for path in set(after) - set(before) if not path.startswith("out/")}
    assert not left, f"left behind: {left}"
    if name not in MAY_LEAVE_ITS_RUN:
        assert set(after) == set(before), f"left behind: {set(after) - set(before)}"
    assert not any(path.endswith(".part") for path in after)


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 25
