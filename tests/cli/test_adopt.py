"""`graft adopt`: a run from a PEFT adapter's folder, and what it refuses before it writes.

tests/peers has adapters that PEFT itself trained; here the folders are made without it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import graft
from graft.adapters.attach import adapted_layers, adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.cli.main import main
from graft.formats.registry import make_format
from graft.model.adapter_files import save_adapter
from graft.model.load import load_model
from graft.model.targets import freeze_layers, select_targets

WEIGHTS = "adapter_model.safetensors"


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def peft_folder(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function of an adapter's options that returns a folder as PEFT writes it."""

    def make(base: Path = tiny_base, **options: Any) -> Path:
        model = load_model(str(base), dtype="float32").model
        names = select_targets(model, options.get("targets", ()))
        freeze_layers(model, names)
        attach_adapter(model, names, AdapterConfig(**{"method": "lora", "rank": 4} | options))
        with torch.no_grad():
            for parameter in adapter_parameters(model, "default").values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path / "adapter"
        save_adapter(model, folder, base=str(base))
        (folder / "graft_adapter.json").unlink()
        return folder

    return make


def changed(folder: Path, **values: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def logits(path: Path) -> torch.Tensor:
    model, _ = graft.load(path)
    with torch.no_grad():
        return model(input_ids=torch.arange(60).reshape(2, 30) + 5).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_a_dora_on_the_base_that_it_names(tiny_base, peft_folder, rows, tmp_path, capsys) -> None:
    adapter, out = peft_folder(dora=True, alpha=6.0), tmp_path / "run"
    assert run("adopt", adapter, "--out", out) == 0
    count = sum(tensor.numel() for tensor in load_file(adapter / WEIGHTS).values())
    assert f"lora with DoRA, {count:,} parameters in 14 layers" in capsys.readouterr().out
    settings = yaml.safe_load((out / "config.yaml").read_text())
    wanted = {"method": "lora", "dora": True, "rank": 4, "alpha": 6.0, "rslora": False}
    assert settings.items() >= (wanted | {"model": str(tiny_base), "data": ""}).items()
    assert len(settings["targets"]) == 14
    report = json.loads((out / "report.json").read_text())
    assert report["adopted_from"] == str(adapter) and report["layers"] == 14
    assert "graft did not train this adapter" in (out / "report.md").read_text()
    tensors, kept = (load_file(folder / WEIGHTS) for folder in (adapter, out / "adapter"))
    assert all(torch.equal(tensors[key], kept[key]) for key in tensors | kept)

    assert run("merge", out, "--out", tmp_path / "merged") == 0
    assert run("export", out, "--to", "gguf", "--out", tmp_path / "m.gguf") == 0
    assert run("export", out, "--to", "peft", "--out", tmp_path / "peft") == 0
    assert run("eval", out, "--data", rows) == 0
    assert run("generate", out, "--prompt", "red lamp", "--max-new-tokens", 3) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(60).reshape(2, 30) + 5
    assert distance(plain(input_ids=ids).logits, logits(out)) < 1e-5
    assert distance(logits(out), logits(tiny_base)) > 0.05
    assert run("export", out, "--to", "hf", "--out", tmp_path / "hf") == 0
    capsys.readouterr()
    assert run("verify", out, tmp_path / "hf") == 1
    assert "give --data" in capsys.readouterr().err
    assert run("verify", out, tmp_path / "hf", "--data", rows) == 0
    assert run("train", "--resume", "--out", out) == 1
    assert "was adopted, not trained" in capsys.readouterr().err
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "graft brought the adapter in and did not train it" in card
    assert report["base_fingerprint"] in card and "| seed |" not in card


def test_a_base_with_a_chat_template_keeps_it(tiny_base, peft_folder, tmp_path) -> None:
    base = tmp_path / "chat"
    shutil.copytree(tiny_base, base)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    (base / "chat_template.jinja").write_text(template)
    assert run("adopt", peft_folder(), "--model", base, "--out", tmp_path / "run") == 0
    out = tmp_path / "ollama"
    assert run("export", tmp_path / "run", "--to", "ollama", "--out", out) == 0
    modelfile = (out / "Modelfile").read_text()
    assert "[assistant] " in modelfile and "range .Messages" in modelfile


@pytest.mark.parametrize("into", ["trained", "original"])
def test_some_layers_on_nf4_merge_into_a_plain_folder(
    into, tiny_base, peft_folder, tmp_path
) -> None:
    """bitsandbytes rounds every linear layer, so those without an adapter are rounded here too."""
    adapter, out = peft_folder(targets=("q_proj", "v_proj")), tmp_path / "run"
    words = ["--format", "nf4", "--double-quant", "--model", tiny_base]
    assert run("adopt", adapter, "--out", out, *words) == 0
    formats = json.loads((out / "base" / "graft.json").read_text())["layers"]
    assert len(formats) == 14
    assert {entry["format"] for entry in formats.values()} == {"nf4"}
    assert run("merge", out, "--into", into, "--out", tmp_path / "merged") == 0
    assert not (tmp_path / "merged" / "graft.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    dense = AutoModelForCausalLM.from_pretrained(tiny_base)
    trained, _ = graft.load(out)
    adapted = dict(adapted_layers(trained))
    assert len(adapted) == 4
    nf4 = make_format("nf4", {"double_quant": True})
    for name in formats:
        base = dense.get_submodule(name).weight.detach()
        if into == "trained":
            base = nf4.unpack(nf4.pack(base), *base.shape, torch.float32)
        if name in adapted:
            base = base + adapted[name].adapter("default").delta(adapted[name].base)
        found = merged.get_submodule(name).weight.double()
        torch.testing.assert_close(found, base.double(), rtol=0, atol=1e-6)
    assert run("export", out, "--to", "gguf", "--out", tmp_path / "m.gguf") == 0


def test_qalora_on_a_folder_of_integers(tiny_base, tmp_path, capsys) -> None:
    base, run_folder = tmp_path / "int4", tmp_path / "run"
    assert run("quantize", "--model", tiny_base, "--format", "int", "--out", base) == 0
    model = load_model(str(base), dtype="float32").model
    config = AdapterConfig(method="qalora", rank=2, alpha=3.0)
    attach_adapter(model, select_targets(model, ("up_proj",)), config)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "default").values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = model(input_ids=torch.arange(60).reshape(2, 30) + 5).logits
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "graft_adapter.json").unlink()
    assert run("adopt", tmp_path / "adapter", "--out", run_folder) == 1
    assert "names no base; give --model" in capsys.readouterr().err
    assert run("adopt", tmp_path / "adapter", "--out", run_folder, "--model", base) == 0
    assert yaml.safe_load((run_folder / "config.yaml").read_text())["grid_rank"] == 0
    assert distance(logits(run_folder), expected) < 1e-5  # the factor of PEFT's pooling, rounded
    report = graft.merge(run_folder, tmp_path / "merged")
    assert report.exact and report.max_logit_difference == 0.0
    assert torch.equal(logits(tmp_path / "merged"), logits(run_folder))
    assert run("export", run_folder, "--to", "gguf", "--out", tmp_path / "m.gguf") == 0
    assert run("adopt", tmp_path / "adapter", "--out", tmp_path / "x", "--model", tiny_base) == 1
    assert "qalora needs the int format, found 'dense'" in capsys.readouterr().err
    words = ["--format", "nf4", "--model", base]
    assert run("adopt", tmp_path / "adapter", "--out", tmp_path / "x", *words) == 1
    assert "is quantised already" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_bias_for_layers_without_one_goes_where_there_is_a_place(
    peft_folder, tiny_base, rows, tmp_path, capsys
) -> None:
    adapter, out = peft_folder(adapter_bias=True), tmp_path / "run"
    assert run("adopt", adapter, "--out", out) == 0
    for words in (["merge"], ["export", "--to", "hf"], ["export", "--to", "mlx"]):
        assert run(words[0], out, *words[1:], "--out", tmp_path / "merged") == 1
        assert "has a bias for 14 layers that have none" in capsys.readouterr().err
        assert not (tmp_path / "merged").exists()
    assert run("export", out, "--to", "gguf", "--out", tmp_path / "m.gguf") == 0
    model, _ = graft.load(tmp_path / "m.gguf", tokenizer=str(tiny_base))
    ids = torch.arange(60).reshape(2, 30) + 5
    assert distance(model(input_ids=ids).logits, logits(out)) < 1e-5
    words = ["--method", "lora", "--adapter-bias", "--export", "hf", "--steps", 2]
    words += ["--model", tiny_base, "--data", rows, "--out", tmp_path / "trained"]
    assert run("train", *words) == 1
    assert "--adapter-bias trains a bias for 14 layers" in capsys.readouterr().err


def drop_config(folder: Path, _: Path) -> None:
    (folder / "adapter_config.json").unlink()


def cut(folder: Path, _: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def another_shape(folder: Path, _: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    first = next(key for key in tensors if "lora_A" in key)
    save_file(tensors | {first: torch.ones(4, 7)}, folder / WEIGHTS)


REFUSALS: dict[str, tuple[Callable[[Path, Path], object], list[object], list[str]]] = {
    "no configuration": (drop_config, [], ["no adapter folder of PEFT", "adapter_config.json"]),
    "no such base": (lambda *_: None, ["--model", "nowhere"], ["no folder 'nowhere'"]),
    "another kind": (lambda f, _: changed(f, peft_type="IA3"), [], ["only LORA is read"]),
    "no rank": (lambda f, _: changed(f, r=None), [], ["r is None, not a number"]),
    "a changed base": (lambda f, _: changed(f, init_lora_weights="pissa"), [], ["'pissa'"]),
    "no number": (
        lambda f, _: changed(f, alpha_pattern={"q_proj": "x"}, r="8"),
        [],
        ["alpha_pattern.q_proj is 'x'", "r is '8'"],
    ),
    "no pattern": (
        lambda f, _: changed(f, alpha_pattern={"(": 3}, lora_dropout=1.5),
        [],
        ["alpha_pattern has '(', which is no valid regular expression", "lora_dropout is 1.5"],
    ),
    "truncated": (cut, [], ["truncated"]),
    "another shape": (another_shape, [], ["down_proj", "(4, 7)", "(4, 96)"]),
    "several": (
        lambda f, out: (
            changed(f, use_dora=True, modules_to_save=["lm_head"]),
            (out / "mine").mkdir(parents=True),
        ),
        ["--double-quant"],
        ["exists already", "--format nf4 and fp4", "modules_to_save", "magnitude_vector is mis"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_leaves_nothing(case, peft_folder, tmp_path, capsys, monkeypatch) -> None:
    def reads_weights(*arguments, **options):
        raise AssertionError("the base was read")

    adapter, out = peft_folder(), tmp_path / "run"
    damage, words, pieces = REFUSALS[case]
    damage(adapter, out)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("graft.api.adopt.load_model", reads_weights)
    assert run("adopt", adapter, "--out", out, *words) == 1
    message = capsys.readouterr().err
    assert all(piece in message for piece in pieces), message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_of_graft_that_started_as_loftq_stays_one(tiny_base, rows, tmp_path, capsys) -> None:
    words = ["--model", tiny_base, "--data", rows, "--steps", 2, "--batch-size", 4, "--rank", 4]
    words += ["--method", "qlora", "--init", "loftq", "--dora", "--out", tmp_path / "run"]
    assert run("train", *words) == 0
    assert "qlora with DoRA" in (tmp_path / "run" / "report.md").read_text()
    assert run("export", tmp_path / "run", "--to", "peft", "--out", tmp_path / "peft") == 0
    assert run("merge", tmp_path / "run", "--into", "original", "--out", tmp_path / "merged") == 0
    assert run("adopt", tmp_path / "peft", "--out", tmp_path / "again") == 1
    assert "started as loftq" in capsys.readouterr().err
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "grid")
    (tmp_path / "grid" / "adapter_config.json").unlink()
    assert run("adopt", tmp_path / "grid", "--out", tmp_path / "again", "--model", tiny_base) == 1
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (["--method", "qalora", "--dora"], ["--dora", "method qalora adds none"]),
        (["--method", "lora", "--dora", "--adapter-bias"], ["--dora and --adapter-bias"]),
    ],
)
def test_dora_where_it_has_no_meaning(words, pieces, tiny_base, rows, tmp_path, capsys) -> None:
    words = [*words, "--model", tiny_base, "--data", rows, "--out", tmp_path / "run"]
    assert run("train", *words) == 1
    message = capsys.readouterr().err
    assert all(piece in message for piece in pieces), message
