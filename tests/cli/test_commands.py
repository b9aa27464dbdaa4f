"""The command line: help is quick, flags and YAML are one schema, each command does its work."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from graft.cli.main import main


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["export", "--help"], ["compare", "--help"]]
)
def test_help_imports_nothing_slow(words: list[str]) -> None:
    program = (
        "import sys\nfrom graft.cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "slow = {'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "graft" in done.stdout


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    from graft.cli.commands import COMMANDS, every_command

    assert run("--help") == 0
    overview = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in overview and COMMANDS.summary(name) in overview
    for name in every_command():
        with pytest.raises(SystemExit) as ended:
            run(*name.split(), "--help")
        assert ended.value.code == 0
        assert f"graft {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0 and run("-V") == 0
    assert capsys.readouterr().out == f"graft {version('graft-llm')}\n" * 2


def test_a_whole_job(
    tiny_base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    settings = {
        "model": str(tiny_base),
        "data": str(rows),
        "method": "qalora",
        "steps": 9,
        "batch-size": 4,
        "targets": "q_proj",
        "out": str(tmp_path / "run"),
    }
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert run("train", config, "--steps", 3, "--save-every", 2) == 0
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert resolved["steps"] == 3, "a flag overrides the file"
    assert resolved["batch_size"] == 4
    assert resolved["targets"] == ["q_proj"]
    assert resolved["bits"] == 4, "defaults are written out"
    assert "held-out loss" in capsys.readouterr().out

    assert run("eval", tmp_path / "run", "--data", rows, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert set(scores) >= {"loss", "perplexity", "target_tokens"}
    assert run("merge", tmp_path / "run", "--out", tmp_path / "merged") == 0
    assert "exact, logits equal bit for bit" in capsys.readouterr().out
    file = tmp_path / "model.gguf"
    assert run("export", tmp_path / "run", "--to", "gguf", "--out", file) == 0
    capsys.readouterr()
    words = ["--data", rows, "--json", "--tokenizer", tmp_path / "merged"]
    assert run("eval", file, *words) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == scores["loss"]
    assert run("generate", tmp_path / "run", "--prompt", "red lamp", "--max-new-tokens", 4) == 0
    assert capsys.readouterr().out.strip("\n") != ""


def test_resume_needs_only_the_folder(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--model", tiny_base, "--data", rows, "--steps", 4, "--save-every", 2, "--out", out]
    assert run("train", *words) == 0
    weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    shutil.rmtree(out / "adapter")
    assert run("train", "--resume", "--out", out) == 0
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert run("train", "--resume", "--out", out, "--rank", 8) == 1


def test_a_flag_that_is_given_counts_and_one_that_is_not_does_not(
    tiny_base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "run", tmp_path / "run.yaml"
    given = {"model": str(tiny_base), "data": str(rows), "steps": 2, "out": str(out)}
    file.write_text(yaml.safe_dump(given), encoding="utf-8")
    assert run("train", file, "--seed", 3, "--batch-size", 4) == 0
    shutil.rmtree(out / "adapter")
    assert run("train", "--resume", "--out", out, "--seed", 0, "--no-eos") == 1
    told = capsys.readouterr().err
    assert "seed is 0, the run was begun with 3" in told and "eos is False" in told
    assert run("train", file, "--resume", "--batch-size", 16) == 1
    assert "batch_size is 16, the run was begun with 4" in capsys.readouterr().err
    assert run("train", file, "--resume") == 0, "the file says what the run was begun with"
    assert run("train", file, "--resume", "--steps", 3) == 0
    assert yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["steps"] == 3


def test_quantize_and_plan_agree_on_the_bytes(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "int3"
    assert run("quantize", "--model", tiny_base, "--format", "int", "--bits", 3, "--out", out) == 0
    capsys.readouterr()
    words = ["--method", "qalora", "--bits", 3, "--max-length", 64, "--json"]
    assert run("plan", "--model", tiny_base, *words) == 0
    plan = json.loads(capsys.readouterr().out)
    content = (out / "model.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert plan["weight_file_bytes"] == len(content) - 8 - header
    assert run("plan", "--model", tiny_base, "--method", "lora") == 0
    assert "MiB" in capsys.readouterr().out


def test_solvers_from_the_command_line(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--model", tiny_base, "--data", rows, "--solver", "gptq", "--bits", 3, "--steps", 2]
    assert run("train", *words, "--out", out) == 0
    quantised = tmp_path / "nf4"
    words = ["--model", tiny_base, "--data", rows, "--solver", "gptq", "--format", "nf4"]
    assert run("quantize", *words, "--out", quantised) == 0
    assert run("eval", quantised, "--data", rows) == 0
    words = ["--model", tiny_base, "--solver", "hqq", "--format", "int", "--bits", 3]
    assert run("quantize", *words, "--out", tmp_path / "int") == 0
    assert run("eval", tmp_path / "int", "--data", rows) == 0


def test_chat(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "lamp"}]
    data.write_text((json.dumps({"messages": messages}) + "\n") * 8, encoding="utf-8")
    out = tmp_path / "run"
    words = ["--model", tiny_base, "--data", data, "--steps", 2, "--batch-size", 2]
    assert run("train", *words, "--out", out) == 0
    lines = iter(["red", "blue", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    capsys.readouterr()
    assert run("chat", out, "--max-new-tokens", 4) == 0
    assert "no chat template" not in capsys.readouterr().err
    assert run("generate", out, "--prompt", "red \udcff") == 1
    assert "holds half of a surrogate pair" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"red \xff\n"), encoding="utf-8"))
    assert run("chat", out, "--max-new-tokens", 4) == 0


def test_a_name_that_no_file_can_have_is_told(capsys) -> None:
    assert main(["generate", "x" * 5000, "--prompt", "a"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("graft generate: error: File name too long: 'xxx")
    assert len(error) < 300


@pytest.mark.parametrize("flag", ["--rank", "--batch-size", "--max-length"])
@pytest.mark.parametrize("value", ["0", str(2**63)])
def test_a_plan_of_no_size_is_refused(flag, value, tiny_base, capsys) -> None:
    assert main(["plan", "--model", str(tiny_base), flag, value]) == 1
    assert f"{flag} is " in capsys.readouterr().err
