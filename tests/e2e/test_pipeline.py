"""The main job, end to end, on a tiny random model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import graft
from graft.adapters.attach import adapter_parameters, attach_adapter, frozen_layers
from graft.adapters.config import AdapterConfig
from graft.api.events import Events
from graft.data.config import DataConfig
from graft.data.load import load_train_and_eval
from graft.model.gguf.layout import gguf_names, rotary_heads, rows_from_gguf
from graft.model.load import load_model
from graft.model.targets import freeze_layers, select_targets
from graft.objectives.base import LossResult
from graft.objectives.next_token import NEXT_TOKEN
from graft.optimizers.adamw import ADAMW
from graft.train.config import LoopConfig
from graft.train.loop import train
from graft.train.metrics import read_metrics
from graft.train.plots import plot_loss
from graft.train.task import TrainingTask


def settings(base: Path, rows: Path, out: Path, **changes: object) -> graft.TrainConfig:
    values = {"steps": 4, "batch_size": 4, "max_length": 48, "learning_rate": 1e-2} | changes
    return graft.TrainConfig(model=str(base), data=str(rows), out=str(out), **values)


def probe(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(60, device=model.device).reshape(2, 30) + 5
    with torch.no_grad():
        return model(input_ids=ids).logits.cpu()


def adapter_tensors(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["qalora", "affine", "merge_aware"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_what_is_trained_is_what_is_deployed(tiny_base, rows, tmp_path, method, bits):
    run, merged, file = tmp_path / "run", tmp_path / "merged", tmp_path / "model.gguf"
    graft.finetune(settings(tiny_base, rows, run, method=method, bits=bits))
    trained, _ = graft.load(run)
    report = graft.merge(run, merged)
    assert report.exact
    assert report.max_logit_difference == 0.0
    model, _ = graft.load(merged)
    assert torch.equal(probe(trained), probe(model))
    base, _ = graft.load(run / "base")
    assert not torch.equal(probe(trained), probe(base)), "training changed nothing"

    graft.export_model(run, "gguf", file)
    exported, _ = graft.load(file, tokenizer=str(merged))
    assert torch.equal(probe(trained), probe(exported))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = gguf_names(model.config)
    for name, layer in frozen_layers(model):
        tensor = tensors[f"{names(name)}.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        heads = rotary_heads(name, model.config)
        if heads is not None:
            weight = weight[rows_from_gguf(weight.shape[0], heads)]
        assert torch.equal(weight, layer.dense_weight().cpu()), name


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "qdora"])
def test_a_lora_run_merges_to_a_plain_folder_and_exports(tiny_base, rows, tmp_path, method):
    run, merged = tmp_path / "run", tmp_path / "merged"
    graft.finetune(settings(tiny_base, rows, run, method=method, dropout=0.1))
    trained, _ = graft.load(run)
    report = graft.merge(run, merged)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    difference = (probe(plain) - probe(trained)).abs().max()
    assert difference <= 1e-5 * probe(trained).abs().max()
    assert report.worst_relative_error < 1e-3
    written = json.loads((merged / "merge-report.json").read_text())
    assert written["layers"] == 14

    dense = graft.export_model(run, "gguf", tmp_path / "dense.gguf")
    rounded = graft.export_model(run, "gguf", tmp_path / "q4.gguf", requantize=True)
    assert rounded.bytes < dense.bytes
    assert rounded.merge is not None
    assert rounded.merge.worst_relative_error > 0.05, "rounding a merged update costs something"


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_dora_is_a_method_and_a_flag(tiny_base, rows, tmp_path, method):
    by_name, by_flag = tmp_path / "name", tmp_path / "flag"
    graft.finetune(settings(tiny_base, rows, by_name, method=method.replace("lora", "dora")))
    graft.finetune(settings(tiny_base, rows, by_flag, method=method, dora=True))
    assert adapter_tensors(by_name) == adapter_tensors(by_flag)
    models = [graft.load(run)[0] for run in (by_name, by_flag)]
    assert torch.equal(*map(probe, models))


def test_into_original_says_what_quantisation_had_cost(tiny_base, rows, tmp_path):
    run = tmp_path / "run"
    graft.finetune(settings(tiny_base, rows, run, method="qlora"))
    report = graft.merge(run, tmp_path / "original", into="original")
    assert not report.exact
    assert report.worst_relative_error > 0.1
    original = AutoModelForCausalLM.from_pretrained(tiny_base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    trained, _ = graft.load(run)
    name = "model.layers.0.self_attn.q_proj"
    update = trained.get_submodule(name).adapter("default").delta(None).cpu()
    expected = original.get_submodule(name).weight.double() + update
    torch.testing.assert_close(
        merged.get_submodule(name).weight.double(), expected, rtol=0, atol=1e-7
    )


def test_a_run_from_before_scales_moved_goes_on(tiny_base, rows, tmp_path):
    run = tmp_path / "run"
    config = settings(tiny_base, rows, run, method="qalora", grid_rank=0, save_every=2, steps=4)
    graft.finetune(config)
    expected = adapter_tensors(run)
    written = (run / "config.yaml").read_text()
    assert "\ngrid_rank: 0\n" in written
    (run / "config.yaml").write_text(written.replace("\ngrid_rank: 0\n", "\n"))
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    graft.finetune(dataclasses.replace(config, grid_rank=None, resume=True))
    assert adapter_tensors(run) == expected


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {"dropout": 0.1}),
        ("qalora", {}),
        ("qlora", {"init": "loftq"}),
        ("lora", {"init": "pissa"}),
        ("lora", {"init": "eva"}),
        ("qlora", {"init": "corda"}),
        # Rounded before, at, and after the checkpoint that is resumed from.
        ("merge_aware", {"dense_fraction": 0.25}),
        ("merge_aware", {"dense_fraction": 0.375}),
        ("merge_aware", {"dense_fraction": 0.5}),
        ("merge_aware", {"bits": 2}),
        ("merge_aware", {"dense_fraction": 0.5, "latent_dtype": "int8"}),
    ],
)
def test_a_resumed_run_ends_bit_for_bit_as_an_unbroken_one(
    tiny_base, rows, tmp_path, method, changes
):
    common = {"method": method, "steps": 8, "save_every": 3, "grad_accum": 2, **changes}
    whole = settings(tiny_base, rows, tmp_path / "whole", **common)
    graft.finetune(whole)

    class StoppedError(Exception):
        pass

    class StopAtStep5(Events):
        def metrics(self, metrics):
            if metrics["step"] == 5 and "loss" in metrics:
                raise StoppedError

    broken = settings(tiny_base, rows, tmp_path / "broken", **common)
    with pytest.raises(StoppedError):
        graft.finetune(broken, StopAtStep5())
    assert not (tmp_path / "broken" / "adapter").exists()
    again = settings(tiny_base, rows, tmp_path / "broken", **common, resume=True)
    graft.finetune(again)
    bases = [tmp_path / name / "base" / "model.safetensors" for name in ("whole", "broken")]
    assert method == "lora" or bases[0].read_bytes() == bases[1].read_bytes()
    assert adapter_tensors(tmp_path / "whole") == adapter_tensors(tmp_path / "broken")
    losses = [
        [
            entry["loss"]
            for entry in read_metrics(tmp_path / run / "metrics.jsonl")
            if "loss" in entry
        ]
        for run in ("whole", "broken")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_accumulation_normalises_by_the_targets_of_the_whole_step(tiny_base, rows, tmp_path):
    common = {"method": "lora", "steps": 3}
    graft.finetune(settings(tiny_base, rows, tmp_path / "one", batch_size=8, **common))
    graft.finetune(
        settings(tiny_base, rows, tmp_path / "two", batch_size=2, grad_accum=4, **common)
    )
    one, two = (
        [entry for entry in read_metrics(tmp_path / run / "metrics.jsonl") if "loss" in entry]
        for run in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert a["target_tokens"] == b["target_tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_checkpointing_changes_no_gradient(tiny_base, rows, tmp_path):
    common = {"method": "qlora", "dropout": 0.1, "save_every": 2}
    for choice in ("none", "products", "half", "layers"):
        run = tmp_path / choice
        report = graft.finetune(settings(tiny_base, rows, run, **common, checkpointing=choice))
        assert report.checkpointing == f"{choice}, as asked for"
        assert adapter_tensors(run) == adapter_tensors(tmp_path / "none")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    graft.finetune(settings(tiny_base, rows, run, **common, checkpointing="products", resume=True))
    assert adapter_tensors(run) == adapter_tensors(tmp_path / "none")


def test_checkpointing_is_picked_by_the_plan(tiny_base, rows, tmp_path, monkeypatch):

    notes: list[str] = []

    class Notes(Events):
        def note(self, text):
            notes.append(text)

    run = tmp_path / "run"
    monkeypatch.setattr("graft.plan.memory.free_bytes", lambda device: 2**20)
    report = graft.finetune(settings(tiny_base, rows, run, steps=1), Notes())
    assert report.checkpointing.startswith("layers, whose planned peak is ")
    assert f"checkpointing: {report.checkpointing}" in notes
    assert "checkpointing: layers\n" in (run / "config.yaml").read_text()
    assert report.checkpointing in (run / "report.md").read_text()


def test_reports_and_metrics(tiny_base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("graft.api.run.report.plot_loss", plot_loss)
    run = tmp_path / "run"
    report = graft.finetune(settings(tiny_base, rows, run, method="qalora", eval_every=2))
    stored = json.loads((run / "report.json").read_text())
    for key in (
        "loss",
        "eval_loss",
        "perplexity",
        "seconds",
        "tokens_per_second",
        "peak_memory_bytes",
        "planned_memory_bytes",
        "trainable_parameters",
        "total_parameters",
        "bits_per_weight",
        "versions",
    ):
        assert stored[key], key
    assert stored["eval_loss"] == report.eval_loss < stored["eval_loss_before"]
    assert stored["bits_per_weight"] == pytest.approx(5.0, abs=0.01)
    metrics = read_metrics(run / "metrics.jsonl")
    steps = [entry for entry in metrics if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert set(steps[0]) == {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "target_tokens",
        "step_seconds",
        "tokens_per_second",
        "memory_bytes",
    }
    assert [entry["step"] for entry in metrics if "eval_loss" in entry] == [0, 2, 4]
    assert (run / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "held-out perplexity" in (run / "report.md").read_text()
    evaluated = graft.evaluate_model(run, str(rows))
    assert evaluated["rows"] == 40
    assert evaluated["perplexity"] > 1


def test_generation_dresses_the_prompt_as_training_did(tiny_base, rows, tmp_path):
    run = tmp_path / "run"
    graft.finetune(settings(tiny_base, rows, run, method="lora", separator=" => "))
    model, tokenizer = graft.load(run)
    texts: list[str] = []
    answer = graft.generate(run, "red lamp", max_new_tokens=5, on_text=texts.append)
    ids = tokenizer("red lamp => ", return_tensors="pt").input_ids
    expected = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert answer == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert "".join(texts) == answer


def test_exports_of_a_run(tiny_base, rows, tmp_path):
    run = tmp_path / "run"
    exports = {"method": "qalora", "export": ("gguf", "mlx", "hf", "peft")}
    with pytest.raises(graft.GraftError, match="--export peft: qalora moves the scales too"):
        graft.finetune(settings(tiny_base, rows, run, **exports))
    assert not run.exists()
    graft.finetune(settings(tiny_base, rows, run, **exports, grid_rank=0))
    trained, _ = graft.load(run)
    plain = AutoModelForCausalLM.from_pretrained(run / "export" / "hf")
    difference = (probe(plain) - probe(trained)).abs().max()
    assert difference <= 1e-5 * probe(trained).abs().max()
    assert (run / "export" / "model.gguf").is_file()
    quantisation = json.loads((run / "export" / "mlx" / "config.json").read_text())["quantization"]
    assert quantisation["bits"] == 4
    adapter = json.loads((run / "export" / "peft" / "adapter_config.json").read_text())
    assert adapter["peft_type"] == "LORA"
    assert not adapter["use_qalora"]


def test_merge_aware_trains_as_lora_until_it_rounds(tiny_base, rows, tmp_path):
    common = {"method": "merge_aware", "bits": 2, "steps": 6, "rank": 4, "grid_rank": 0}
    losses = {}
    for fraction, dtype in ((0.0, None), (0.5, None), (0.5, "int8")):
        run = tmp_path / f"{fraction}-{dtype}"
        config = settings(tiny_base, rows, run, dense_fraction=fraction, **common)
        graft.finetune(dataclasses.replace(config, latent_dtype=dtype))
        losses[fraction, dtype] = [
            e["loss"] for e in read_metrics(run / "metrics.jsonl") if "loss" in e
        ]
        report = graft.merge(run, tmp_path / f"merged-{fraction}-{dtype}")
        assert report.exact and report.max_logit_difference == 0.0
        assert json.loads((run / "report.json").read_text())["bits_per_weight"] < 6
        layers = json.loads((run / "base" / "graft.json").read_text())["layers"]
        assert all(layer["rounds"] for layer in layers.values())
    lora = tmp_path / "lora"
    graft.finetune(settings(tiny_base, rows, lora, method="lora", steps=6, rank=4))
    dense = [e["loss"] for e in read_metrics(lora / "metrics.jsonl") if "loss" in e]
    assert losses[0.5, None][:3] == dense[:3], "float32 weights stay float32"
    assert losses[0.5, "int8"][:3] == pytest.approx(dense[:3], rel=1e-3)
    assert abs(losses[0.0, None][0] - dense[0]) > 1e-2 * dense[0]


def test_what_belongs_to_merge_aware_is_refused_elsewhere(tiny_base, rows, tmp_path):
    wrong = {"method": "affine", "grid_rank": -1, "dense_fraction": 1.0, "latent_dtype": "int8"}
    with pytest.raises(graft.GraftError) as told:
        graft.finetune(settings(tiny_base, rows, tmp_path / "run", **wrong))
    for part in ("--grid-rank belongs to merge_aware", "--dense-fraction belongs to merge_aware"):
        assert part in str(told.value)
    assert "--grid-rank is -1" in str(told.value)
    assert "--latent-dtype belongs to the latent format" in str(told.value)
    assert "--dense-fraction is 1.0; expected 0 up to" in str(told.value)
    assert not (tmp_path / "run").exists()


def test_a_rate_factor_multiplies_the_rate_of_its_parameters_alone(tiny_base, rows, tmp_path):
    """The first step of Adam moves each element by the learning rate, whatever its gradient."""
    loaded = load_model(str(tiny_base), dtype="float32")
    names = select_targets(loaded.model, ("q_proj",))
    freeze_layers(loaded.model, names)
    attach_adapter(loaded.model, names, AdapterConfig(method="lora"))
    parameters = adapter_parameters(loaded.model, "default")
    data = DataConfig(data=str(rows), max_length=48)
    examples = load_train_and_eval(data, loaded.tokenizer, 48, 0)[0].examples
    slow, fast = (f"{name}.B" for name in names)
    task = TrainingTask(
        model=loaded.model,
        parameters=parameters,
        examples=examples,
        objective=NEXT_TOKEN,
        evaluate=lambda: LossResult(0.0, 1),
        optimizer=ADAMW,
        learning_rate=1e-3,
        steps=1,
        folder=tmp_path,
        rate_factors={fast: 5.0},
    )
    train(task, LoopConfig(out=str(tmp_path), batch_size=4))
    assert parameters[slow].abs().max().item() == pytest.approx(1e-3, rel=1e-3)
    assert parameters[fast].abs().max().item() == pytest.approx(5e-3, rel=1e-3)
