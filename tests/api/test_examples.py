"""Every file in examples/ is a run, every method has one, and --dry-run says what it would do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from graft.adapters.registry import METHODS, method_of
from graft.api.checks import check_train_config
from graft.api.config import TrainConfig
from graft.api.settings import checked_settings
from graft.cli.main import main
from graft.demo.run import BASE, TRAINING
from graft.files.read import read_yaml
from graft.objectives.registry import DEFAULT_OBJECTIVE

FILES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))
NEEDED = {"model": str(BASE), "data": str(TRAINING), "out": "run"}


def config_of(file: Path) -> TrainConfig:
    return TrainConfig(**NEEDED, **checked_settings(read_yaml(file), TrainConfig, str(file)))


def words_of(file: Path, folder: Path) -> list[str]:
    """Return what runs an example on a few of the bundled rows, in a folder's `run`."""
    data = folder / "few.jsonl"
    lines = TRAINING.read_text(encoding="utf-8").splitlines(True)[:40]
    if config_of(file).objective != DEFAULT_OBJECTIVE:
        rows = [json.loads(line) for line in lines]
        lines = [
            json.dumps(
                {
                    "prompt": row["prompt"],
                    "chosen": row["completion"],
                    "rejected": f"not {row['completion']}",
                }
            )
            + "\n"
            for row in rows
        ]
    data.write_text("".join(lines))
    return [str(file), "--model", str(BASE), "--data", str(data), "--out", str(folder / "run")]


def test_every_method_has_an_example_of_its_name() -> None:
    configs = {file.stem: config_of(file) for file in FILES}
    ours = {name: one for name, one in configs.items() if one.objective == DEFAULT_OBJECTIVE}
    assert {name: method_of(one).name for name, one in ours.items()} == {
        name: name for name in METHODS
    }
    others = configs.keys() - ours.keys()
    assert all(configs[name].objective == name for name in others)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_a_run_that_could_begin(file: Path, tmp_path: Path, capsys) -> None:
    check_train_config(config_of(file))
    text = file.read_text(encoding="utf-8")
    assert f"graft train examples/{file.name} --model" in text
    commented = [line[2:].split(" #")[0] for line in text.splitlines() if line[:2] == "# "]
    keys = [line for line in commented if line.partition(":")[0].replace("_", "").isalnum()]
    offered = yaml.safe_load("\n".join(keys[1:])) or {}  # after the title
    checked_settings(offered, TrainConfig, "what is commented out")
    assert main(["train", *words_of(file, tmp_path), "--dry-run"]) == 0
    printed = capsys.readouterr()
    resolved = yaml.safe_load(printed.out)
    given = read_yaml(file)
    assert {key: resolved[key] for key in given if key not in ("epochs", "checkpointing")} == {
        key: value for key, value in given.items() if key not in ("epochs", "checkpointing")
    }
    assert resolved["learning_rate"] > 0 and resolved["steps"] > 0
    for expected in ("# planned memory", "peak of training", "first training row", "⟩]"):
        assert expected in printed.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["qalora", "dora"])
def test_an_example_trains(name: str, tmp_path: Path) -> None:
    (file,) = [file for file in FILES if file.stem == name]
    small = ["--steps", "1", "--batch-size", "2", "--no-checkpoints", "--max-length", "64"]
    assert main(["train", *words_of(file, tmp_path), *small]) == 0
    assert list((tmp_path / "run" / "export").iterdir())


def test_what_a_dry_run_prints_is_the_run(
    tiny_base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["--model", tiny_base, "--data", rows, "--separator", " #\t: \u202e'", "--out", out]
    given = [str(word) for word in words]
    assert main(["train", *given, "--epochs", "1", "--lora_r", "4", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "again.yaml"
    file.write_text(printed, encoding="utf-8")
    assert main(["train", str(file), "--dry-run"]) == 0
    assert capsys.readouterr().out == printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.yaml"]
    assert main(["train", str(file)]) == 0
    written = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert written == yaml.safe_load(printed)
    assert "the first training row" in capsys.readouterr().err


def test_a_dry_run_ends_as_the_run_would(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "rows.jsonl"
    bad.write_text('{"prompt": 1, "completion": "x"}\n')
    words = ["--model", str(tiny_base), "--data", str(bad), "--out", str(tmp_path / "run")]
    errors = []
    for more in ([], ["--dry-run"]):
        assert main(["train", *words, "--targets", "query", *more]) == 1
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1] and "rows.jsonl:1" in errors[0] and "'query'" in errors[0]
    assert main(["train", *words, "--resume", "--dry-run"]) == 1
    assert "leave --resume out" in capsys.readouterr().err
