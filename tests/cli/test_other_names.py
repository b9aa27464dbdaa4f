"""What a newcomer types: names of other tools, words that are no flags, values of another type."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from graft.api.config import PlanConfig, TrainConfig
from graft.api.other_names import INSTEAD, SAME, answer, flags_named
from graft.cli.commands import COMMANDS, every_command
from graft.cli.fields import flags_of
from graft.cli.flags import UsageError, parse
from graft.cli.main import main
from graft.errors import GraftError

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
NEEDED = {"model": "m", "data": "d.jsonl", "out": "o"}
VALUES = {
    **NEEDED,
    **{"eval_data": "e.jsonl", "max_length": "64", "rank": "8", "alpha": "16", "dropout": "0.1"},
    **{"rslora": "true", "dora": "true", "targets": "q_proj", "double_quant": "true"},
    **{"epochs": "2", "steps": "7", "batch_size": "4", "grad_accum": "2", "learning_rate": "1e-4"},
    **{"warmup_fraction": "0.1", "max_grad_norm": "1.0", "eval_every": "5", "save_every": "6"},
    **{"patience": "3", "min_improvement": "0.5"},
}
"""A value of each setting that another tool has by another name."""
NEVER_OURS = {
    **{"warmup_steps": "--warmup-fraction", "num_warmup_steps": "--warmup-fraction"},
    **{"iters": "--steps", "lora_layers": "--targets", "num_layers": "--targets"},
    **{"load_in_4bit": "--method qlora", "load_in_8bit": "--format int8", "bias": "--adapter-bias"},
    **{"val_set_size": "--eval-fraction", "validation_split_percentage": "--eval-fraction"},
    **{"bf16": "--dtype", "fp16": "--dtype", "torch_dtype": "--dtype", "optim": "--optimizer"},
    **{"lora_scale": "--alpha", "eval_strategy": "--eval-every", "block_size": "--max-length"},
    **{"resume_from_checkpoint": "--resume", "gradient_checkpointing": "--checkpointing"},
    **{"evals_per_epoch": "--eval-epochs", "steps_per_eval": "--eval-every"},
    **{"lr_scheduler_type": "--warmup-fraction", "init_lora_weights": "--init"},
}
"""Names whose values mean something else here, and what their answer must name."""


def given(*words: str) -> TrainConfig:
    return parse(COMMANDS["train"], words, "train")


def words_of(settings: dict[str, str], first: str = "") -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{first}{name}", value)]


def told(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["train", *words]) == 2
    return capsys.readouterr().err.splitlines()


def test_every_name_leads_to_settings_that_there_are() -> None:
    assert set(SAME.values()) <= set(FIELDS)
    for name, advice in INSTEAD.items():
        assert set(flags_named(advice)) <= set(FIELDS), name
        assert len(advice) < 130 and "\n" not in advice and advice[-1] not in ".!", name
    assert not set(SAME) & set(INSTEAD)


def test_no_name_of_ours_is_taken_for_another_tools() -> None:
    for name, command in every_command().items():
        ours = {flag.name for flag in flags_of(command.arguments) if not flag.positional}
        # A command's own flag is taken first: axolotl's `adapter` is asked of `train` alone.
        allowed = {"adapter"} if name in ("generate", "chat", "eval") else set()
        assert ours & {*SAME, *INSTEAD} <= allowed


@pytest.mark.parametrize(("name", "named"), NEVER_OURS.items())
def test_a_name_of_another_meaning_is_answered_and_never_taken(name: str, named: str) -> None:
    found = answer(name, FIELDS)
    assert found is not None and found.ours is None and named in found.advice
    with pytest.raises(UsageError, match=named):
        given(*words_of(NEEDED), f"--{name}", "1")


@pytest.mark.parametrize("name", SAME)
def test_a_name_of_the_same_meaning_gives_the_same_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = SAME[name]
    rest = {key: value for key, value in NEEDED.items() if key != ours}
    expected = given(*words_of({**rest, ours: VALUES[ours]}))
    assert capsys.readouterr().err == ""
    for typed in (name, name.replace("_", "-")):
        assert given(*words_of(rest), f"--{typed}", VALUES[ours]) == expected
        flag = ours.replace("_", "-")
        assert capsys.readouterr().err == f"--{typed} is --{flag} here\n"
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**rest, name: yaml.safe_load(VALUES[ours])}))
    assert given(str(file)) == expected
    assert capsys.readouterr().err == f"{name} is {ours} here\n"


def test_a_command_understands_what_it_has_settings_for(tmp_path: Path) -> None:
    plan = parse(COMMANDS["plan"], ["--base_model", "m", "--lora_r", "4"], "plan")
    assert isinstance(plan, PlanConfig) and (plan.model, plan.rank) == ("m", 4)
    with pytest.raises(UsageError, match="unknown flag --num_train_epochs"):
        parse(COMMANDS["plan"], ["--model", "m", "--num_train_epochs", "3"], "plan")
    with pytest.raises(UsageError, match="graft uploads nothing"):
        parse(COMMANDS["export"], ["r", "--to", "gguf", "--out", "o", "--push_to_hub"], "export")


@pytest.mark.parametrize(
    "words", ["q_proj,v_proj", "[q_proj,v_proj]", "['q_proj', \"v_proj\"]", "q_proj v_proj"]
)
def test_target_modules_as_any_tool_writes_them(words: str) -> None:
    typed = words.split() if "'" not in words else [words]
    config = given(*words_of(NEEDED), "--target_modules", *typed)
    assert config.targets == ("q_proj", "v_proj")


def test_a_data_set_without_a_file_is_one_of_the_hub(tmp_path: Path) -> None:
    rest = {"model": "m", "out": "o"}
    for name in ("dataset", "dataset-name"):
        assert given(*words_of(rest), f"--{name}", "openai/gsm8k").data == "hub:openai/gsm8k"
        assert given(*words_of(rest), f"--{name}=rows.jsonl").data == "rows.jsonl"
        assert given(*words_of(rest), f"--{name}", str(tmp_path)).data == str(tmp_path)
        assert given(*words_of(rest), f"--{name}", "hub:x").data == "hub:x"
    file = tmp_path / "run.yaml"
    file.write_text("dataset_name: openai/gsm8k\nmodel: m\nout: o\n")
    assert given(str(file)).data == "hub:openai/gsm8k"
    assert given(*words_of(rest), "--train_file", "rows").data == "rows"


def test_values_that_mean_something_special_elsewhere() -> None:
    for words in (["--target_modules", "all-linear"], ["--max_steps", "-1"]):
        with pytest.raises(UsageError, match="leave it out"):
            given(*words_of(NEEDED), *words)
    pattern = r".*layers\.(0|1)\.(q|v)_proj{1,1}"
    assert given(*words_of(NEEDED), "--target_modules", pattern).targets == (pattern,)


def test_switches_as_trainer_writes_them() -> None:
    config = given(*words_of(NEEDED), "--use_dora", "True", "--use_rslora", "False", "--no_eos")
    assert config.dora and not config.rslora and not config.eos
    assert given(*words_of(NEEDED), "--eos=false", "--no-dora=no").dora
    with pytest.raises(UsageError, match="--use_dora='maybe': expected true or false"):
        given(*words_of(NEEDED), "--use_dora=maybe")


def test_all_mistakes_are_told_at_once_each_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--steps", "abc", "--lerning-rate", "1", "--batch-size", "2.5", "--eval-every"]
    words += ["--warmup_steps", "10", "--completely-else", "x", "y", "--rank=", "--alpha", "tall"]
    lines = told(capsys, *words)
    assert lines[0].startswith("graft train: error: 11 mistakes")
    assert len(lines) == 12 and all(len(line) < 140 for line in lines)
    for expected in (
        "--steps 'abc': expected a whole number",
        "unknown flag --lerning-rate; did you mean --learning-rate?",
        "--batch-size '2.5': expected a whole number",
        "--eval-every: its value is missing; expected a whole number",
        "--warmup_steps: give a share",
        "unknown flag --completely-else",
        "--rank '': expected a whole number",
        "--alpha 'tall': expected a number",
        *("--model is missing", "--data is missing", "--out is missing"),
    ):
        assert sum(expected in line for line in lines) == 1, expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gpt2", "rows.jsonl"], ["--model gpt2?", "--data rows.jsonl?"]),
        (["owner/name"], ["--model owner/name?"]),
        (["--rank", "8", "run.yaml"], ["a configuration file stands before every flag"]),
        (["epochs=3"], ["did you mean --epochs 3?"]),
        (["num_train_epochs=3"], ["did you mean --num-train-epochs 3?"]),
        (["steps"], ["did you mean --steps?"]),
        (["--model", "m", "stepz"], ["--model takes one value"]),
        (["--model", "m", "--data", "a", "--eos", "stepz"], ["did you mean --steps?"]),
        (["-model", "m"], ["unknown flag -model; did you mean --model?"]),
    ],
)
def test_a_word_that_is_no_flag_is_told_what_was_meant(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = told(capsys, *words)
    for piece in expected:
        assert sum(piece in line for line in lines) == 1, lines
    for name in ("model", "data"):
        if any(f"did you mean --{name} " in line for line in lines):
            assert not any(f"--{name} is missing" in line for line in lines)


def test_dashes_of_a_word_processor() -> None:
    assert given(*words_of(NEEDED), "–rank", "8", "—seed=3").rank == 8


def test_flags_as_they_are_usually_given() -> None:
    words = [*words_of(NEEDED), "--separator", "- a list", "--export", "gguf", "mlx", "--seed=-1"]
    config = given(*words, "--export", "hf", "--rank", "4", "--rank", "8", "--bits", "auto")
    assert config.separator == "- a list" and config.export == ("gguf", "mlx", "hf")
    assert (config.rank, config.seed, config.bits) == (8, -1, "auto")
    with pytest.raises(UsageError, match="given as --separator=VALUE"):
        given(*words_of(NEEDED), "--separator", "--rank")
    assert given(*words_of(NEEDED), "--separator=--").separator == "--"


def test_a_setting_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--rank and --lora_r are the same setting"):
        given(*words_of(NEEDED), "--rank", "8", "--lora_r", "4")
    file = tmp_path / "run.yaml"
    file.write_text("rank: 8\nlora_r: 4\n")
    with pytest.raises(GraftError, match="rank and lora_r are the same setting"):
        given(str(file), *words_of(NEEDED))


def test_a_file_for_another_tool_is_answered_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yml"
    settings = {
        **{"base_model": "m", "adapter": "lora", "lora_r": 8, "sequence_len": 64, "num_epochs": 2},
        **{"micro_batch_size": 4, "load_in_8bit": True, "lora_target_modules": ["q_proj"]},
        **{"datasets": [{"path": "x"}], "warmup_steps": 10, "val_set_size": 0.1, "qwertz": 1},
        **{"learning_rate": "fast", "max_steps": -1},
    }
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(GraftError) as error:
        given(str(file), "--data", "d", "--out", "o")
    lines = str(error.value).splitlines()
    assert lines[0].startswith("8 mistakes")
    names = ["adapter", "datasets", "learning_rate", "load_in_8bit", "max_steps"]
    for name in [*names, "unknown key 'qwertz'", "val_set_size", "warmup_steps"]:
        assert sum(line.startswith(f"  - {file}: {name}") for line in lines) == 1, name
    assert not any("known: " in line for line in lines)


def test_a_flag_takes_the_place_of_its_other_half_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 3\neval_every: 5\nmodel: m\ndata: d\nout: o\n")
    config = given(str(file), "--max_steps", "7", "--eval-epochs", "0.5")
    assert (config.steps, config.epochs) == (7, None)
    assert (config.eval_every, config.eval_epochs) == (None, 0.5)
    both = given(str(file), "--steps", "7", "--epochs", "2")
    assert (both.steps, both.epochs) == (7, 2.0), "which the check of settings refuses"


def test_the_page_says_of_other_names_what_the_table_does() -> None:
    page = (Path(__file__).parents[2] / "docs" / "first-steps.md").read_text(encoding="utf-8")
    lines = page.partition("| theirs | here |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(lines) > 12
    for line in lines:
        theirs, ours = (re.findall(r"--([\w-]+)", cell) for cell in line.split("|")[1:3])
        assert list(dict.fromkeys(SAME[name] for name in theirs)) == [
            name.replace("-", "_") for name in ours
        ]


def test_what_stands_by_its_place_is_told_when_it_is_given_as_a_flag() -> None:
    with pytest.raises(UsageError) as error:
        parse(COMMANDS["data"], ["--model", "m", "--data", "d.jsonl"], "data")
    assert str(error.value).splitlines() == [
        "2 mistakes",
        "  - --model: give MODEL by itself, without a flag",
        "  - --data: give DATA by itself, without a flag",
    ]


def test_a_word_behind_a_flag_of_yes_or_no_is_told_what_may_stand_there() -> None:
    with pytest.raises(UsageError, match="'maybe' is no flag; --cache takes true or false"):
        given(*words_of(NEEDED), "--cache", "maybe")


def test_resume_alone_asks_for_the_folder_alone() -> None:
    with pytest.raises(GraftError, match=r"^--resume: give --out, the folder of the run"):
        given("--resume")
