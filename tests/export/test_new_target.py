"""A target that this file adds, one class and one line of the table, goes all the way.

It is checked before training, written after it, found, described, run and verified.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

import graft
from graft.adapters.attach import frozen_layers
from graft.cli.main import main
from graft.errors import raise_problems
from graft.export.base import OnTensor, Origin, RuntimePackage, Target, Usage
from graft.export.layers import Architecture, config_problems, format_problems, layer_problems
from graft.export.registry import TARGETS, target_of
from graft.export.runtimes import FolderRuntime
from graft.files.write import new_folder, write_json
from graft.formats.base import WeightFormat
from graft.model.folder import read_config
from graft.model.load import LoadedModel
from graft.model.save import named_tensors, save_tensors, write_model_files

BITS, GROUP_SIZES = (4,), (32,)


class ToyRuntime(FolderRuntime):
    """Transformers on the weights of toy.safetensors."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._model = AutoModelForCausalLM.from_config(read_config(path)).eval()
        missing, unknown = self._model.load_state_dict(load_file(path / "toy.safetensors"), False)
        assert unknown == [] and missing in ([], ["lm_head.weight"])

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        return self._model(torch.tensor([list(ids)])).logits[0]


class ToyTarget(Target):
    """A folder with toy.safetensors, every weight in float32, and toy.json."""

    name = "toy"
    stage = "writing toys"
    widths = BITS
    holds_new_biases = False
    library = "toys"
    runtime = RuntimePackage("safetensors", "safetensors")

    def problems(self, config: PretrainedConfig, weight_format: WeightFormat) -> list[str]:
        problems = config_problems(config, "Toy", {"llama": Architecture()})
        return problems + format_problems(weight_format, "Toy", BITS, GROUP_SIZES)

    def prompt_problems(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        kind: str | None,
        separator: str,
    ) -> list[str]:
        return ["toys do not chat"] if kind == "messages" else []

    def write(
        self, loaded: LoadedModel, path: Path, origin: Origin, on_tensor: OnTensor
    ) -> tuple[str, ...]:
        raise_problems(layer_problems(loaded.model, "Toy", BITS, GROUP_SIZES), "no toy")
        layers = dict(frozen_layers(loaded.model))
        tensors = {
            name: tensor.float()
            for name, tensor in named_tensors(loaded.model)
            if name.rpartition(".")[0] not in layers
        }
        tensors |= {f"{name}.weight": layer.dense_weight() for name, layer in layers.items()}
        with new_folder(path) as part:
            save_tensors(tensors, part / "toy.safetensors")
            write_json(part / "toy.json", {"separator": origin.separator})
            write_model_files(loaded, part, torch.float32)
        on_tensor(len(tensors), len(tensors))
        return (f"a {origin.kind} toy",)

    def usage(self, file: str, base: str | None) -> Usage:
        return Usage("Wind it up:", "", f"toy {file}")

    def matches(self, path: Path) -> bool:
        return (path / "toy.json").is_file()

    def load(self, path: Path, tokens: int) -> ToyRuntime:
        return ToyRuntime(path)


@pytest.fixture(autouse=True)
def toy() -> Iterator[ToyTarget]:
    target = ToyTarget()
    TARGETS.add("toy", target, "what this test runs")
    yield target
    TARGETS.remove("toy")


def words(tiny_base: Path, rows: Path, out: Path, *more: str) -> list[str]:
    settings = ["--steps", "2", "--batch-size", "4", "--eval-fraction", "0.25", *more]
    model = ["--model", str(tiny_base), "--data", str(rows)]
    return ["train", *model, "--out", str(out), *settings, "--export", "toy"]


def test_it_is_written_described_and_verified(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(words(tiny_base, rows, run)) == 0
    folder = run / "export" / "toy"
    assert json.loads((folder / "toy.json").read_text()) == {"separator": "\n"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "toys" and front["tags"] == ["graft", "qalora", "toy"]
    assert "Wind it up:\n\n```\ntoy toy\n```" in card and "- a prompt toy" in card
    assert target_of(folder).name == "toy"
    assert graft.verify(run, folder).passed
    weights = folder / "toy.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = graft.verify(run, folder)
    assert not found.passed and found.differing_files == ("toy.safetensors",)


def test_the_command_knows_it(
    tiny_base: Path, tmp_path: Path, toy: ToyTarget, capsys: pytest.CaptureFixture
) -> None:
    assert main(["export", str(tiny_base), "--to", "toy", "--out", str(tmp_path / "toy")]) == 0
    assert "note: a text toy" in capsys.readouterr().out
    assert toy.matches(tmp_path / "toy")
    with pytest.raises(graft.GraftError, match="folder of --to .* hf or toy"):
        target_of(tmp_path)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--bits", "3"], "--export toy: bits is 3; Toy holds 4 (--bits 4)"),
        (["--group-size", "64"], "--export toy: group_size is 64; Toy holds 32"),
        (
            ["--method", "lora", "--adapter-bias"],
            "--export toy: --adapter-bias trains a bias for 14 layers",
        ),
    ],
)
def test_what_it_cannot_hold_is_told_before_training(
    more: list[str],
    problem: str,
    tiny_base: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    assert main(words(tiny_base, rows, tmp_path / "run", *more)) == 1
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_it_is_asked_about_rows(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "lamp"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(8 * (json.dumps({"messages": turns}) + "\n"), encoding="utf-8")
    assert main(words(tiny_base, rows, tmp_path / "run")) == 1
    assert "--export toy: toys do not chat" in capsys.readouterr().err


def test_bits_auto_keeps_to_its_widths(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(words(tiny_base, rows, run, "--bits", "auto", "--budget", "5.0")) == 0
    layers = json.loads((run / "base" / "graft.json").read_text())["layers"].values()
    assert {layer["bits"] for layer in layers} == {4}


def test_every_target_says_its_name() -> None:
    """And each of them, where its file or folder lies in a run's export folder."""
    assert [target.name for target in TARGETS.values()] == list(TARGETS)
    names = {target.default_name for target in TARGETS.values()}
    assert names == {"model.gguf", *TARGETS} - {"gguf"}
