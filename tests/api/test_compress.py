"""`compress`: folders, their curve, and what becomes of them in training, merging and exporting."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from unittest.mock import Mock

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import graft
from graft.adapters.attach import adapted_layers
from graft.api.compress import compress
from graft.api.config import CompressConfig, PlanConfig
from graft.api.events import Events
from graft.api.plan import plan
from graft.cli.main import main
from graft.errors import GraftError
from graft.model.factors import factor_ranks

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def settings(tiny_base, rows, tmp_path):
    def made(**options) -> CompressConfig:
        return CompressConfig(model=str(tiny_base), out=str(tmp_path / "out"), **options)

    return made


@pytest.fixture(scope="module")
def half(tiny_base, rows, tmp_path_factory) -> Path:
    """A folder of factors of half the weights, for its inputs."""
    out = tmp_path_factory.mktemp("half") / "half"
    compress(CompressConfig(model=str(tiny_base), out=str(out), ratio=(0.5,), data=str(rows)))
    return out


def probe(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(60).reshape(2, 30) + 5).logits


def train(model: Path, rows: Path, out: Path, **options: object) -> graft.TrainConfig:
    values = {"steps": 2, "batch_size": 4, "max_length": 48, "learning_rate": 1e-2} | options
    return graft.TrainConfig(model=str(model), data=str(rows), out=str(out), **values)


def test_one_ratio_gives_the_folder_itself(half, tiny_base) -> None:
    model, _ = graft.load(half)
    assert set(factor_ranks(model).values()) == {16, 10, 19}  # of 64x64, 32x64 and 96x64
    told = json.loads((half / "compress.json").read_text())
    assert told["name"] == "ratio 0.5" and told["folder"] is None and told["whole"] == []
    stored = load_file(half / "model.safetensors")
    assert told["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert told["parameters"] == sum(
        t.numel() for n, t in stored.items() if ".down" in n or ".up." in n
    )
    errors = [layer["weight_error"] for layer in told["layers"].values()]
    assert told["weight_error"] == pytest.approx(math.sqrt(sum(errors) / len(errors)))
    original = load_file(tiny_base / "model.safetensors")
    rest = [name for name in original if name in stored]
    assert rest and all(torch.equal(original[name], stored[name]) for name in rest)


def test_several_give_a_curve_beside_the_original(settings, rows, tmp_path) -> None:
    events = Mock(spec=Events)
    curve = compress(settings(energy=(0.999, 0.6), data=str(rows), calibration_rows=20), events)
    out = tmp_path / "out"
    assert json.loads((out / "curve.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(curve))
    )
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    large, small = curve.points
    assert large.bytes > small.bytes and large.weight_error < small.weight_error
    assert large.whole and any(large.whole[0] in c.args[0] for c in events.note.call_args_list)
    assert [point.name for point in curve.beside] == ["original"] and curve.rows == 20
    for point in (*curve.points, *curve.beside):
        folder = settings().model if point.folder is None else out / point.folder
        text = tmp_path / "held-out.jsonl"
        text.write_text("".join(rows.read_text().splitlines(keepends=True)[20:]))
        found = graft.evaluate_model(folder, str(text), max_length=64, eos=False)
        assert found["perplexity"] == pytest.approx(point.perplexity, rel=1e-4)


def test_the_whole_energy_of_a_low_rank_is_that_rank(tiny_base, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        weight = model.get_parameter(f"{Q}.weight")
        weight.copy_(torch.randn(64, 5) @ torch.randn(5, 64) / 8)
    thin = tmp_path / "thin"
    model.save_pretrained(thin)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (thin / name).write_bytes((tiny_base / name).read_bytes())
    config = CompressConfig(
        model=str(thin),
        out=str(tmp_path / "out"),
        energy=(0.9999,),
        targets=("0.self_attn.q_proj",),
    )
    compress(config)
    again, _ = graft.load(tmp_path / "out")
    assert factor_ranks(again) == {Q: 5}
    torch.testing.assert_close(probe(again), probe(model.eval()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"bits": 4}, {"format": "nf4"}, {"bits": 3, "solver": "gptq"}])
def test_factors_are_rounded_by_any_solver(options, settings, rows, tmp_path) -> None:
    curve = compress(settings(ratio=(0.8,), data=str(rows), calibration_rows=20, **options))
    assert [point.name for point in curve.beside] == ["original", "rounded alone"]
    rest = curve.beside[0].bytes - 4 * curve.beside[0].parameters  # in float32
    matrices = [point.bytes - rest for point in (*curve.points, curve.beside[1])]
    assert matrices[0] <= 0.8 * matrices[1]
    assert curve.points[0].bytes < curve.beside[1].bytes < curve.beside[0].bytes
    said = json.loads((tmp_path / "out" / "graft.json").read_text())
    assert {name.rpartition(".")[0] for name in said["layers"]} == set(said["factors"])
    assert len(said["layers"]) == 2 * len(said["factors"]) == 28
    model, _ = graft.load(tmp_path / "out")
    assert torch.isfinite(probe(model)).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give one of --ratio, --energy and --rank; none is given"),
        ({"ratio": (0.5,), "rank": (4,)}, "--ratio and --rank is given"),
        ({"ratio": (1.0,)}, "--ratio is 1; expected more than 0 and less than 1"),
        ({"energy": (0.0,)}, "--energy is 0"),
        ({"rank": (0,)}, "--rank is 0; expected 1 or more"),
        ({"rank": (4,), "targets": ("q_prj",)}, "matches none"),
        ({"rank": (4,), "solver": "gptq", "bits": 4}, "needs --data"),
        ({"rank": (4,), "bits": 5}, "bits"),
        ({"rank": (4,), "solver": "hqq"}, "nothing to quantise"),
        ({"rank": (4,), "eval_rows": 0}, "--eval-rows is 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(options, says, settings) -> None:
    with pytest.raises(GraftError) as raised:
        compress(settings(**options))
    assert says in str(raised.value)
    assert not Path(settings().out).exists()


def test_what_is_compressed_already_is_refused(half, settings) -> None:
    with pytest.raises(GraftError, match="compressed already"):
        compress(dataclasses.replace(settings(rank=(4,)), model=str(half)))


def test_the_factors_alone_train(half, rows, tmp_path) -> None:
    run = tmp_path / "run"
    report = graft.finetune(train(half, rows, run, method="full", train=("factors",)))
    before, after = (load_file(f / "model.safetensors") for f in (half, run / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".down." in name or ".up." in name}
    assert report.trainable_parameters == sum(before[name].numel() for name in changed)
    assert factor_ranks(graft.load(run)[0]) == factor_ranks(graft.load(half)[0])


@pytest.mark.parametrize("method", ["lora", "qlora", "qalora"])
def test_adapters_train_on_factors_and_merge_into_them(method, half, rows, tmp_path) -> None:
    run = tmp_path / "run"
    graft.finetune(train(half, rows, run, method=method, targets=("q_proj", "up_proj.down")))
    trained, _ = graft.load(run)
    adapted = {name for name, _ in adapted_layers(trained)}
    assert {f"{Q}.down", f"{Q}.up", "model.layers.1.mlp.up_proj.down"} <= adapted
    assert len(adapted) == 6
    merged = graft.merge(run, tmp_path / "merged")
    again, _ = graft.load(tmp_path / "merged")
    assert factor_ranks(again) == factor_ranks(trained)
    if method == "qalora":
        assert merged.exact and torch.equal(probe(again), probe(trained))
    else:
        torch.testing.assert_close(probe(again), probe(trained), rtol=1e-3, atol=1e-3)


def test_exports_hold_the_products_and_say_so(half, rows, tmp_path) -> None:
    expected = probe(graft.load(half)[0])
    for target, name in (("hf", "hf"), ("gguf", "model.gguf")):
        report = graft.export_model(half, target, tmp_path / name)
        assert any("this holds their products" in note for note in report.notes)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "products, whole matrices" in card
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(probe(plain.eval()), expected, rtol=1e-4, atol=1e-4)
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    assert [list(t.shape) for t in read.tensors if t.name == "blk.0.ffn_up.weight"] == [[64, 96]]
    back, _ = graft.load(tmp_path / "model.gguf", tokenizer=str(half))
    torch.testing.assert_close(probe(back), expected, rtol=1e-3, atol=1e-3)


def test_an_adapter_of_factors_is_no_peft_adapter(half, rows, tmp_path) -> None:
    config = train(half, rows, tmp_path / "run", method="lora")
    with pytest.raises(GraftError, match="compressed into low-rank factors"):
        graft.finetune(dataclasses.replace(config, export=("peft",)))
    graft.finetune(config)
    with pytest.raises(GraftError, match="compressed into low-rank factors"):
        graft.export_model(tmp_path / "run", "peft", tmp_path / "peft")


def test_the_plan_of_a_compressed_model(half) -> None:
    planned = plan(PlanConfig(model=str(half), method="lora", batch_size=2, max_length=32))
    tensors = load_file(half / "model.safetensors").values()
    assert planned.weight_file_bytes == sum(tensor.nbytes for tensor in tensors)
    whole = plan(PlanConfig(model=str(half), method="full", batch_size=2, max_length=32))
    assert whole.trainable_parameters == sum(tensor.numel() for tensor in tensors)


def test_the_command_shows_a_table(tiny_base, rows, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    words = ["--model", tiny_base, "--eval-data", rows, "--rank", 4, 8, "--out", out]
    assert main(["compress", *map(str, words)]) == 0
    shown = capsys.readouterr().out
    assert "rank 4" in shown and "original" in shown and "curve.png" in shown
    assert (out / "rank-8" / "compress.json").is_file()
    assert main(["generate", str(out / "rank-8"), "--prompt", "a b", "--max-new-tokens", "3"]) == 0
