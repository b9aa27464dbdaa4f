"""A folder that comes from elsewhere runs no code, and is what its writer wrote, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from graft.cli.main import main


@pytest.fixture(scope="module")
def runs(tiny_base, rows, tmp_path_factory) -> Path:
    """lora (its base elsewhere) and qalora (its base inside), trained for two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny_base, folder / "base-of-lora")
    for method in ("lora", "qalora"):
        words = ["train", "--model", str(folder / "base-of-lora"), "--data", str(rows)]
        words += ["--method", method, "--steps", "2", "--batch-size", "2"]
        assert main([*words, "--max-length", "32", "--out", str(folder / method)]) == 0
    return folder


@pytest.fixture
def mine(runs, tmp_path) -> Path:
    shutil.copytree(runs, tmp_path / "runs")
    for file in (tmp_path / "runs").rglob("*"):
        if file.name in ("config.yaml", "base.json"):
            file.write_text(file.read_text().replace(str(runs), str(tmp_path / "runs")))
    return tmp_path / "runs"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def plant(base: Path) -> Path:
    """Give a model folder code of its own; return the file that it would make."""
    mark = base.parent / "the code was run"
    (base / "planted.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class PlantedConfig(LlamaConfig):\n    model_type = 'planted'\n"
        "class Planted(LlamaForCausalLM):\n    config_class = PlantedConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "planted.PlantedConfig",
        "AutoModelForCausalLM": "planted.Planted",
    }
    config["model_type"] = "planted"
    (base / "config.json").write_text(json.dumps(config))
    return mark


COMMANDS = {
    "generate": ["--prompt", "the lamp", "--max-new-tokens", "2"],
    "eval": ["--data", "{rows}"],
    "merge": ["--out", "{out}"],
    "export": ["--to", "gguf", "--out", "{out}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_strangers_run_runs_no_code(command, mine, rows, tmp_path, capsys) -> None:
    run = mine / "qalora"
    mark = plant(run / "base")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, "trust_remote_code": True}))
    words = [word.format(rows=rows, out=tmp_path / "out") for word in COMMANDS[command]]
    assert main([command, str(run), *words]) == 1
    assert "--trust-remote-code alone" in capsys.readouterr().err
    assert not mark.exists()
    assert main([command, str(run), *words, "--trust-remote-code"]) in (0, 1)
    assert mark.exists()  # and so the flag is what keeps it out


def test_a_strangers_settings_run_no_code(mine, rows, tmp_path, capsys) -> None:
    mark = plant(mine / "base-of-lora")
    settings = {"model": str(mine / "base-of-lora"), "data": str(rows), "steps": 1}
    settings |= {"out": str(tmp_path / "out"), "trust_remote_code": True}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", str(tmp_path / "settings.yaml")]) == 1
    assert "give --trust-remote-code" in capsys.readouterr().err
    assert not mark.exists()


def test_no_trust_is_written(mine) -> None:
    for run in ("lora", "qalora"):
        assert "trust_remote_code" not in yaml.safe_load((mine / run / "config.yaml").read_text())


@pytest.mark.parametrize("place", [-5000, -1, 3000])
def test_a_bit_of_the_base_that_flipped_is_told(place, mine, capsys) -> None:
    words = ["--prompt", "the", "--max-new-tokens", "1"]
    assert main(["generate", str(mine / "qalora"), *words]) == 0
    flip(mine / "qalora" / "base" / "model.safetensors", place)
    assert main(["generate", str(mine / "qalora"), *words]) == 1
    assert "is damaged or was changed since it was written" in capsys.readouterr().err
    flip(mine / "base-of-lora" / "model.safetensors", place)
    assert main(["generate", str(mine / "lora"), *words]) == 1
    assert "has other weights now" in capsys.readouterr().err


def test_a_bit_of_the_adapter_that_flipped_is_told(mine, tmp_path, capsys) -> None:
    flip(mine / "lora" / "adapter" / "adapter_model.safetensors", -1)
    assert main(["merge", str(mine / "lora"), "--out", str(tmp_path / "out")]) == 1
    assert "is damaged or was changed since it was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("prompt.json", '{"kind": 3, "separator": "x"}', "kind is 3"),
        ("prompt.json", '{"kind": "chat", "separator": ["x"]}', "separator is ['x']"),
        ("prompt.json", '{"kind": "../x", "separator": ""}', "kind is '../x'"),
        ("base.json", '{"path": 7, "sha256": "0"}', "path is 7"),
        ("base.json", '{"path": "/nowhere", "sha256": "0"}', "there is no folder /nowhere"),
        ("base.json", "{}", "path is missing"),
        ("config.yaml", "model: [1, 2]\n", "model is [1, 2]"),
        ("config.yaml", "", "holds no settings"),
    ],
)
def test_every_field_of_a_run_is_checked(file, text, said, mine, capsys) -> None:
    (mine / "lora" / file).write_text(text)
    assert main(["generate", str(mine / "lora"), "--prompt", "the"]) == 1
    assert said in capsys.readouterr().err
