"""The planner's bytes against files that are written, models that are loaded, and paper figures."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.adapters.attach import adapter_parameters, attach_adapter, frozen_layers
from graft.adapters.config import AdapterConfig
from graft.errors import GraftError
from graft.formats.dense import DenseFormat
from graft.formats.registry import make_format
from graft.model.load import load_model
from graft.model.running.checkpointing import CHECKPOINTING
from graft.model.running.memory import free_bytes
from graft.model.save import save_model
from graft.model.targets import freeze_layers, select_targets
from graft.plan import skeleton
from graft.plan.memory import HEAP_BUFFERS, HEAP_BYTES, HEAP_SHARE, MemoryPlan, plan_memory
from graft.plan.skeleton import count_weights

FORMATS = [
    ("int", {"bits": 4}),
    ("int", {"bits": 3, "group_size": 64}),
    ("int", {"bits": 2, "group_size": 16}),
    ("nf4", {"double_quant": False}),
    ("nf4", {"double_quant": True}),
    ("int8", {}),
]
IDS = ["-".join(map(str, (name, *options.values()))) for name, options in FORMATS]
SHARED = ["babyllama-361-1m", "mixed-13m", "stories260k"]


def plan(folder: Path | str, method: str = "lora", weight_format=None, **changes) -> MemoryPlan:
    settings = {
        "dtype": "auto",
        "device": "cpu",
        "batch_size": 2,
        "sequence_length": 16,
        "checkpointing": "none",
    }
    adapter = changes.pop("adapter", AdapterConfig(method=method, rank=4))
    return plan_memory(
        str(folder), weight_format=weight_format, adapter=adapter, **(settings | changes)
    )


def row(planned: MemoryPlan, name: str) -> int:
    return next(row.bytes for row in planned.rows if row.name == name)


def tensor_bytes(folder: Path) -> int:
    """Return the size of the weights file without its header: 8 bytes of length, then JSON."""
    data = (folder / "model.safetensors").read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


# weights on disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FORMATS, ids=IDS)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_weight_file_bytes_are_those_of_the_file(model_folder, tmp_path, family, source, variant):
    folder, weight_format = model_folder(family, source), make_format(*variant)
    save_model(load_model(str(folder), weight_format=weight_format), tmp_path / "out")
    assert plan(folder, weight_format=weight_format).weight_file_bytes == tensor_bytes(
        tmp_path / "out"
    )


@pytest.mark.parametrize("variant", FORMATS, ids=IDS)
@pytest.mark.parametrize("name", SHARED)
def test_weight_file_bytes_of_the_shared_models(shared_models, tmp_path, name, variant):
    folder, weight_format = shared_models / name, make_format(*variant)
    save_model(load_model(str(folder), weight_format=weight_format), tmp_path / "out")
    assert plan(folder, weight_format=weight_format).weight_file_bytes == tensor_bytes(
        tmp_path / "out"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight_format", [None, make_format("int")], ids=["dense", "int"])
def test_weight_file_bytes_follow_the_compute_dtype(model_folder, tmp_path, dtype, weight_format):
    folder = model_folder("llama")
    loaded = load_model(str(folder), weight_format=weight_format, dtype=dtype)
    save_model(loaded, tmp_path / "out")
    planned = plan(folder, weight_format=weight_format, dtype=dtype)
    assert planned.weight_file_bytes == tensor_bytes(tmp_path / "out")


def test_a_quantised_folder_plans_as_it_is(model_folder, tmp_path):
    folder, weight_format = model_folder("llama"), make_format("int", {"bits": 3})
    save_model(load_model(str(folder), weight_format=weight_format), tmp_path / "int3")
    stored, fresh = plan(tmp_path / "int3", "qalora"), plan(folder, "qalora", weight_format)
    assert stored.as_dict() == fresh.as_dict()
    with pytest.raises(GraftError, match="quantised already"):
        plan(tmp_path / "int3", "qalora", weight_format)
    with pytest.raises(GraftError, match="full trains the weights themselves"):
        plan(tmp_path / "int3", "full")


def test_no_weights_are_read(tmp_path):
    LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1).save_pretrained(
        tmp_path
    )
    assert plan(tmp_path, weight_format=make_format("nf4")).weight_file_bytes > 0


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_the_source_dtype_is_that_of_config_json(model_folder, tmp_path, key):
    settings = json.loads((model_folder("llama") / "config.json").read_text())
    settings.pop("dtype", None)
    if key is not None:
        settings[key] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    planned = plan(tmp_path, weight_format=make_format("nf4"), dtype="float32")
    source = torch.float32 if key is None else torch.bfloat16
    truth = plan(model_folder("llama", source), weight_format=make_format("nf4"), dtype="float32")
    assert planned.weight_file_bytes == truth.weight_file_bytes


# weights in memory -------------------------------------------------------------------------------

METHODS = {"lora": None, "qlora": "nf4", "qalora": "int", "affine": "int", "merge_aware": "latent"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [*METHODS, "dora", "qdora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_those_of_the_loaded_model(model_folder, family, method, dtype):
    dora, method = "dora" in method, method.replace("dora", "lora")
    weight_format = make_format(METHODS[method]) if METHODS[method] else None
    adapter = AdapterConfig(method=method, rank=3, dora=dora)
    folder = model_folder(family)
    planned = plan(folder, weight_format=weight_format, adapter=adapter, dtype=dtype)
    model = load_model(str(folder), weight_format=weight_format, dtype=dtype).model
    names = select_targets(model, ())
    freeze_layers(model, names)
    attach_adapter(model, names, adapter)
    frozen = [layer for _, layer in frozen_layers(model)]
    own = list(adapter_parameters(model, "default").values())
    total = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
    assert row(planned, "frozen weights") == sum(layer.storage_bytes for layer in frozen)
    assert row(planned, "trained weights") == sum(total.values())
    assert planned.trainable_parameters == sum(p.numel() for p in own)
    everything = sum(t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers()))
    parts = ("frozen weights", "other weights", "trained weights")
    assert sum(row(planned, part) for part in parts) == everything
    quantised = [layer for layer in frozen if not isinstance(layer.weight_format, DenseFormat)]
    if weight_format is None:
        assert planned.bits_per_weight is None and not quantised
    else:
        bits = sum(8 * layer.storage_bytes for layer in quantised)
        weights = sum(layer.in_features * layer.out_features for layer in quantised)
        assert planned.bits_per_weight == bits / weights


def test_parameters_by_hand(model_folder):
    planned = plan(model_folder("llama"), "full")
    attention = 48 * 48 + 2 * 24 * 48 + 48 * 48
    base = 90 * 48 + 3 * (attention + 3 * 48 * 172 + 2 * 48) + 48  # the head is tied
    assert planned.total_parameters == planned.trainable_parameters == base
    assert row(planned, "trained weights") == row(planned, "gradients") == 4 * base
    assert row(planned, "optimizer") == 8 * base
    lora = plan(model_folder("llama"), "lora")
    ranks = 4 * 3 * (2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 172))
    assert (lora.trainable_parameters, lora.total_parameters) == (ranks, base + ranks)


def test_full_trains_in_float32_unless_told_and_only_the_targets(model_folder):
    folder = model_folder("llama", torch.bfloat16)
    assert plan(folder, "full").dtype == "float32"
    assert plan(folder, "full", dtype="bfloat16").dtype == "bfloat16"
    some = plan(folder, adapter=AdapterConfig(method="full", targets=("down_proj",)))
    assert some.trainable_parameters == 3 * 48 * 172


def seven_billion(folder: Path) -> Path:
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


def test_seven_billion_parameters_plan_quickly_and_small(tmp_path):
    folder = seven_billion(tmp_path)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    planned = plan(
        folder,
        adapter=AdapterConfig(method="qlora", rank=64),
        weight_format=make_format("nf4", {"double_quant": True}),
        dtype="bfloat16",
        batch_size=1,
        sequence_length=512,
        checkpointing="layers",
    )
    assert time.perf_counter() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    assert planned.total_parameters - planned.trainable_parameters == 6_738_415_616
    assert planned.bits_per_weight == pytest.approx(4.127, abs=5e-4)
    # QLoRA (arXiv 2305.14314), figure 6: 6.9 GB for 7B at batch 1 and 512 tokens.
    assert planned.peak_bytes == pytest.approx(6.9e9, rel=0.15)


def test_nf4_with_double_quantisation_costs_4_127_bits_at_4096():
    count = 4096 * 4096
    blocks = count // 64
    bits = 8 * (count / 2 + blocks + 4 * blocks / 256 + 4) / count
    specs = make_format("nf4", {"double_quant": True}).storage(4096, 4096)
    assert 8 * sum(spec.bytes for spec in specs.values()) / count == bits
    assert round(bits, 3) == 4.127


# the plan as a whole -----------------------------------------------------------------------------


def test_peaks_are_sums_of_rows(model_folder):
    planned = plan(model_folder("llama"), "qalora", make_format("int"))
    rows = {row.name: row.bytes for row in planned.rows}
    weights = sum(rows[name] for name in ("frozen weights", "other weights", "trained weights"))
    held = rows["process"] + weights + rows["optimizer"]
    passing = max(rows["loss"], rows["layer workspace"])
    assert planned.evaluation_bytes == held + passing
    assert planned.training_bytes == held + sum(
        rows[name] for name in ("gradients", "activations", "heap")
    ) + (passing)
    # 2 x 16 tokens; the widest layer of an MLP, four times.
    buffers = 4 * 2 * 16 * 172 * 4
    gaps = HEAP_BUFFERS * buffers + int(HEAP_SHARE * rows["activations"])
    assert rows["heap"] == HEAP_BYTES + gaps
    assert rows["recomputation"] == 0
    assert planned.saving_bytes == rows["process"] + weights + rows["merging"]
    assert planned.peak_bytes == planned.training_bytes
    # 2 x 16 tokens, 90 logits: four float32 matrices; the hidden states' gradient twice.
    assert rows["loss"] == 2 * 16 * 4 * (4 * 90 + 2 * 48)


def test_recomputing_takes_turns_with_the_loss(model_folder):
    planned = plan(model_folder("llama"), "qalora", make_format("int"), checkpointing="layers")
    rows = {row.name: row.bytes for row in planned.rows}
    backward = rows["recomputation"] + rows["layer workspace"]
    assert backward > rows["loss"] > 0
    rest = ("gradients", "optimizer", "activations", "heap")
    weights = sum(rows[name] for name in ("frozen weights", "other weights", "trained weights"))
    held = rows["process"] + weights + sum(rows[name] for name in rest)
    assert planned.training_bytes == held + backward


def test_the_loss_needs_a_chunk_of_logits_and_no_more(tmp_path):
    folder = seven_billion(tmp_path)
    adapter = AdapterConfig(method="lora", rank=8)
    sizes = {"dtype": "bfloat16", "batch_size": 1, "checkpointing": "layers"}
    short, long = (
        row(plan(folder, adapter=adapter, sequence_length=length, **sizes), "loss")
        for length in (512, 4096)
    )
    assert long - short == 2 * 2 * (4096 - 512) * 4096  # the hidden states' gradient
    assert short == 2 * 2 * (131 * 32000 + 512 * 4096) + 8 * 2**18


def test_a_head_that_trains_has_a_gradient_of_its_own_in_the_loss(model_folder):
    frozen, trained = (plan(model_folder("llama"), method) for method in ("lora", "full"))
    assert row(trained, "loss") - row(frozen, "loss") == 4 * 90 * 48


# checkpointing -----------------------------------------------------------------------------------


def test_auto_takes_the_first_that_fits(model_folder, monkeypatch, tmp_path):
    # So many layers that recomputing one of them costs less than keeping them all.
    config = json.loads((model_folder("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 12}))
    folder, changes = tmp_path, {"batch_size": 64, "sequence_length": 64}
    plans = [plan(folder, checkpointing=choice, **changes) for choice in CHECKPOINTING]
    sizes = [one.training_bytes for one in plans]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    for expected in plans:
        for free, fits in ((expected.training_bytes / 0.8 + 1, True), (sizes[-1], False)):
            monkeypatch.setattr("graft.plan.memory.free_bytes", lambda device, free=free: int(free))
            picked = plan(folder, checkpointing="auto", **changes)
            wanted = expected if fits else plans[-1]
            assert picked.checkpointing == wanted.checkpointing
            assert picked.rows == wanted.rows
            assert picked.peak_bytes == wanted.peak_bytes
            assert picked.checkpointing_reason.startswith(wanted.checkpointing)
            said = "the first of none, products, half, layers" if fits else "no choice needs less"
            assert said in picked.checkpointing_reason
    assert plans[1].checkpointing_reason == "products, as asked for"


def test_auto_on_another_machine_s_gpu_is_careful(model_folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    picked = plan(model_folder("llama"), device="cuda", checkpointing="auto")
    assert picked.checkpointing == "layers"
    assert "how much memory is free on that cuda is not known here" in picked.checkpointing_reason


def test_a_model_that_cannot_recompute(model_folder, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    picked = plan(model_folder("llama"), checkpointing="auto")
    assert picked.checkpointing == "none"
    assert picked.checkpointing_reason == "none: LlamaForCausalLM cannot recompute its layers"
    with pytest.raises(GraftError, match="--checkpointing none"):
        plan(model_folder("llama"), checkpointing="layers")


def test_free_memory_is_what_the_system_says(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16 kB\nMemFree:  3 kB\nMemAvailable:    7 kB\n")
    monkeypatch.setattr("graft.model.running.memory._MEMINFO", meminfo)
    assert free_bytes(torch.device("cpu")) == 7 * 1024
    monkeypatch.setattr("graft.model.running.memory._MEMINFO", tmp_path / "nowhere")
    total = free_bytes(torch.device("cpu"))
    assert total is not None and total > 2**30
    monkeypatch.undo()
    available = free_bytes(torch.device("cpu"))
    assert available is not None and 0 < available <= total


def test_merging_counts_the_dense_weights_that_lora_becomes(model_folder):
    folder = model_folder("llama")
    largest, weights = 48 * 172, 3 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 48 * 172)
    nf4, int4 = make_format("nf4"), make_format("int")
    exact, dense = plan(folder, "qalora", int4), plan(folder, "qlora", nf4)
    assert row(exact, "merging") == 36 * largest
    assert row(dense, "merging") == 36 * largest + 4 * weights - row(dense, "frozen weights")
    assert row(plan(folder, "full"), "merging") == 0


def test_a_gpu_is_planned_without_one_and_without_the_process(model_folder):
    planned = plan(model_folder("llama", torch.bfloat16), device="cuda")
    assert (planned.device, row(planned, "process")) == ("cuda", 0)
    assert planned.dtype == "bfloat16"


def test_table_and_dict(model_folder):
    planned = plan(model_folder("gpt2"), "qlora", make_format("nf4"))
    table = planned.table()
    assert [name for name, _, _ in table[:2]] == ["process", "frozen weights"]
    assert table[0][1] == "450.0 MiB"
    assert all(isinstance(cell, str) and cell for line in table for cell in line)
    again = json.loads(json.dumps(planned.as_dict()))
    assert again["rows"][1]["bytes"] == row(planned, "frozen weights")
    assert again["peak_bytes"] == planned.peak_bytes


def test_the_plan_leaves_the_random_state_alone(model_folder):
    state = torch.get_rng_state()
    plan(model_folder("llama"))
    assert torch.equal(torch.get_rng_state(), state)


BAD = {
    "targets": ({"adapter": AdapterConfig(method="lora", targets=("c_attn",))}, "matches none"),
    "method": ({"method": "qalora", "weight_format": make_format("nf4")}, "needs weights in the"),
    "dense": ({"method": "affine"}, "needs weights in the int format"),
    "full": (
        {"method": "full", "weight_format": make_format("int")},
        "full trains the weights themselves",
    ),
    "sizes": ({"batch_size": 0, "sequence_length": -1}, "2 problems"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_said(model_folder, case):
    settings, message = BAD[case]
    with pytest.raises(GraftError, match=message):
        plan(model_folder("llama"), **settings)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(GraftError, match="no folder"):
        plan(tmp_path / "nowhere")
    with pytest.raises(GraftError, match="no folder .*and the hub"):
        plan("nobody/nothing")


def test_weights_are_counted_once(model_folder, monkeypatch):
    counted = []

    def counting(planned):
        counted.append(planned)
        return count_weights(planned)

    monkeypatch.setattr(skeleton, "count_weights", counting)
    plan(model_folder("llama"), checkpointing="auto")
    assert len(counted) == 1
