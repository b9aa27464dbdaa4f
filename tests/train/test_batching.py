"""However a step's rows are cut into batches and laid out, it trains the same adapter."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

import graft
from graft.api.events import Events
from graft.api.run.folder import read_run_config
from graft.api.run.prepare import prepare
from graft.data.batches import PackedBatch
from graft.data.load import load_train_and_eval
from graft.data.sampler import BatchSampler
from graft.errors import GraftError
from graft.kernels.backend.native_library import native
from graft.model.running.attention import NAME
from graft.objectives.next_token import NextToken
from graft.train.metrics import read_metrics

WORDS = "red green blue lamp chair table oak steel light heavy".split()
METHODS = {
    "lora": {"method": "lora"},
    "dora": {"method": "lora", "dora": True},
    "qlora": {"method": "qlora"},
    "qalora": {"method": "qalora"},
    "affine": {"method": "affine"},
    "merge_aware": {"method": "merge_aware", "dense_fraction": 0.0, "solver": "rtn"},
    "full": {"method": "full"},
}
WAYS = {
    "1x16": {"batch_size": 16, "batching": "padded"},
    "4x4": {"batch_size": 4, "grad_accum": 4, "batching": "padded"},
    "packed": {"batch_size": 16, "batching": "packed"},
    "packed 4x4": {"batch_size": 4, "grad_accum": 4, "batching": "packed"},
}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows, most of them short and a few long."""
    chance = random.Random(5)

    def text(most: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(1, most)))

    path = tmp_path_factory.mktemp("data") / "uneven.jsonl"
    rows = [{"prompt": text(2 if i % 8 else 9), "completion": text(3)} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(base: Path, rows: Path, out: Path, **changes: object) -> graft.TrainConfig:
    values = {"steps": 20, "learning_rate": 1e-4, "rank": 4, "dtype": "float32", "max_length": 64}
    values |= {"method": "lora", "checkpoints": False, "device": "cpu"}
    return graft.TrainConfig(model=str(base), data=str(rows), out=str(out), **(values | changes))


def trained(run: Path) -> dict[str, Tensor]:
    adapter = run / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else run / "model" / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_the_same_adapter_after_twenty_steps(
    method, tiny_base, uneven, tmp_path, monkeypatch
) -> None:
    # What is rounded is rounded by the batch: qalora's gradient is taken in floats here.
    monkeypatch.delitem(native.operations, "grad_factors", raising=False)
    found = {}
    for name, way in WAYS.items():
        run = tmp_path / name
        report = graft.finetune(settings(tiny_base, uneven, run, **METHODS[method], **way))
        found[name] = trained(run)
        assert report.batching.startswith(way["batching"])
    for name in WAYS:
        for key, tensor in found["1x16"].items():
            torch.testing.assert_close(found[name][key], tensor, rtol=0, atol=1e-5)


def test_packing_at_a_high_rate_is_padding_within_rounding(tiny_base, uneven, tmp_path) -> None:
    """AdamW divides by the gradient's size, so that it makes much of any difference."""
    for batching in ("padded", "packed"):
        run = tmp_path / batching
        graft.finetune(settings(tiny_base, uneven, run, batching=batching, learning_rate=1e-2))
    padded, packed = (trained(tmp_path / batching) for batching in ("padded", "packed"))
    for key, tensor in padded.items():
        torch.testing.assert_close(packed[key], tensor, rtol=0, atol=1e-5)


class _Sees(NextToken):
    """Remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[PackedBatch] = []

    def loss(self, model, batch):
        assert model.config._attn_implementation == NAME
        if model.training:
            self.batches.append(batch)
        return super().loss(model, batch)


def test_packed_is_what_a_known_model_trains_on(tiny_base, uneven, tmp_path, monkeypatch) -> None:
    objective = _Sees()
    monkeypatch.setattr("graft.api.finetune.OBJECTIVES", {"next_token": objective})
    config = settings(tiny_base, uneven, tmp_path / "run", steps=3, grad_accum=2, batch_size=4)
    report = graft.finetune(config)
    assert all(type(batch) is PackedBatch for batch in objective.batches)
    assert len(objective.batches) == 6
    assert read_run_config(tmp_path / "run").batching == "packed"
    assert report.batching.startswith("packed; padded, ")
    assert report.batching in (tmp_path / "run" / "report.md").read_text()
    # The rows are those that padded batches have.
    loaded = prepare(settings(tiny_base, uneven, tmp_path / "other"), Events())
    sampler = BatchSampler(len(loaded.training.examples), 4, 0)
    for batch in objective.batches:
        rows = [loaded.training.examples[row].input_ids for row in next(sampler)]
        assert batch.input_ids[0].tolist() == [token for row in rows for token in row]


def test_tokens_per_second_are_those_of_the_rows(tiny_base, uneven, tmp_path) -> None:
    for batching in ("padded", "packed", "grouped"):
        run = tmp_path / batching
        changes = {"batching": batching, "batch_size": 57, "steps": 1}
        graft.finetune(settings(tiny_base, uneven, run, **changes))
        config = read_run_config(run)
        tokenizer = prepare(settings(tiny_base, uneven, tmp_path / "x"), Events()).subject.tokenizer
        training, _ = load_train_and_eval(config, tokenizer, 64, 0)
        assert len(training.examples) == 57
        step = next(e for e in read_metrics(run / "metrics.jsonl") if "loss" in e)
        counted = step["tokens_per_second"] * step["step_seconds"]
        assert counted == pytest.approx(training.total_tokens)


@pytest.fixture(scope="module")
def unknown_base(tiny_base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a family that may do more about attention than it lets others see."""
    folder = tmp_path_factory.mktemp("opt")
    for file in tiny_base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = OPTConfig(
        vocab_size=320, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=64, max_position_embeddings=64, dropout=0.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


def test_another_model_trains_on_rows_of_one_length(unknown_base, uneven, tmp_path) -> None:
    report = graft.finetune(settings(unknown_base, uneven, tmp_path / "run", steps=2))
    assert report.batching.startswith("grouped; ")
    assert read_run_config(tmp_path / "run").batching == "grouped"
    refused = settings(unknown_base, uneven, tmp_path / "refused", batching="packed")
    with pytest.raises(GraftError, match="--batching packed: .*OPTForCausalLM.*grouped"):
        graft.finetune(refused)
    assert not (tmp_path / "refused").exists()


def test_an_objective_that_takes_no_packed_rows_gets_none(
    tiny_base, uneven, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(NextToken, "packs", False)
    assert prepare(settings(tiny_base, uneven, tmp_path), Events()).config.batching == "grouped"
    with pytest.raises(GraftError, match="the objective next_token takes no packed rows"):
        prepare(settings(tiny_base, uneven, tmp_path, batching="packed"), Events())


def test_graphs_take_rows_of_a_few_lengths_and_a_gpu(tiny_base, uneven, tmp_path) -> None:
    graphs = settings(tiny_base, uneven, tmp_path / "run", cuda_graphs=True, checkpointing="none")
    assert prepare(graphs, Events()).config.batching == "grouped"
    with pytest.raises(GraftError, match="--batching packed: --cuda-graphs takes rows of a few"):
        prepare(dataclasses.replace(graphs, batching="packed"), Events())
    with pytest.raises(GraftError, match="--cuda-graphs: the model is on cpu"):
        graft.finetune(graphs)


def test_a_model_that_does_not_pack_after_all_leaves_nothing(
    tiny_base, uneven, tmp_path, monkeypatch
) -> None:
    def fails(model) -> None:
        raise GraftError("--batching packed: no")

    monkeypatch.setattr("graft.api.finetune.check_packing", fails)
    with pytest.raises(GraftError, match="no"):
        graft.finetune(settings(tiny_base, uneven, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


class _DiesError(BaseException):
    """Stands for the end of the process."""


class _Dies(Events):
    def metrics(self, metrics) -> None:
        if "loss" in metrics and metrics["step"] == 5:
            raise _DiesError


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_a_run_goes_on_with_its_own_batches(batching, tiny_base, uneven, tmp_path) -> None:
    """Also where nobody says which."""
    common = {"batch_size": 8, "checkpoints": True, "save_every": 3, "steps": 9}
    whole, run = tmp_path / "whole", tmp_path / "part"
    graft.finetune(settings(tiny_base, uneven, whole, **common, batching=batching))
    with pytest.raises(_DiesError):
        graft.finetune(settings(tiny_base, uneven, run, **common, batching=batching), _Dies())
    graft.finetune(settings(tiny_base, uneven, run, **common, resume=True))
    for key, tensor in trained(whole).items():
        assert torch.equal(trained(run)[key], tensor), key
    other = "padded" if batching == "packed" else "packed"
    wrong = settings(tiny_base, uneven, run, **common, resume=True, batching=other)
    with pytest.raises(GraftError, match=f"batching is .{other}., the run was begun with"):
        graft.finetune(wrong)


def test_a_packed_batch_that_failed_is_kept_padded(
    tiny_base, uneven, tmp_path, monkeypatch
) -> None:
    class Bad(NextToken):
        def loss(self, model, batch):
            loss, measured = super().loss(model, batch)
            return loss * torch.nan, measured

    objectives = {"next_token": Bad()}
    monkeypatch.setattr("graft.api.finetune.OBJECTIVES", objectives)
    with pytest.raises(GraftError, match="the loss is not finite.*The batch is in"):
        graft.finetune(settings(tiny_base, uneven, tmp_path / "run", batch_size=4))
    kept = load_file(tmp_path / "run" / "failed-batch.safetensors")
    assert kept["0.input_ids"].shape[0] == kept["0.labels"].shape[0] == 4
