"""The base of an adapter: how it is called, what the adapter changes of it, its original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.api.foreign_adapters import (
    PREFIX,
    copy_tokenizer,
    dense,
    distance,
    logits,
    low_rank,
    merged,
    save_peft,
)
from tests.model.every_family import write_tiny
from transformers import AutoModelForCausalLM

import graft
from graft.api.config import QuantizeConfig
from graft.errors import GraftError
from graft.model.hub import base_name, hub_id_of

SAME = 1e-5
SNAPSHOT = "models--acme--tiny/snapshots/0123456789abcdef0123456789abcdef01234567"


def names(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


def test_a_base_is_named_by_its_hub_id(tiny_base, rows, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "hub" / SNAPSHOT
    shutil.copytree(tiny_base, folder)
    assert hub_id_of(str(folder)) == "acme/tiny" and hub_id_of(str(tiny_base)) is None
    assert base_name("acme/other") == "acme/other" and base_name(str(tiny_base)) == str(tiny_base)
    adapter = save_peft(tmp_path / "a", low_rank(dense(tiny_base)), folder)
    for number, options in enumerate([{}, {"format": "nf4"}]):
        run = tmp_path / f"run{number}"
        report = graft.adopt(adapter, run, **options)
        assert (report.base_hub_id, report.base_name) == ("acme/tiny", "tiny")
        graft.export_model(run, "peft", tmp_path / f"peft{number}")
        for made in (run / "adapter", tmp_path / f"peft{number}"):
            assert names(made) == "acme/tiny"
        assert "base_model: acme/tiny" in (tmp_path / f"peft{number}" / "README.md").read_text()
    # Another folder is called what it was called when it was given.
    monkeypatch.chdir(tiny_base.parent)
    graft.adopt(adapter, tmp_path / "run", model=tiny_base.name)
    graft.export_model(tmp_path / "run", "peft", tmp_path / "peft")
    assert names(tmp_path / "peft") == names(tmp_path / "run" / "adapter") == tiny_base.name


@pytest.mark.parametrize(
    "path", ["/root/models/llama", r"C:\models\llama", "../out/llama", "a/b/c"]
)
def test_a_path_of_another_machine_asks_for_the_base(path, tiny_base, tmp_path) -> None:
    adapter = save_peft(tmp_path / "a", low_rank(dense(tiny_base)), path)
    with pytest.raises(
        GraftError, match="a folder of the machine that it was trained on"
    ) as raised:
        graft.adopt(adapter, tmp_path / "run")
    assert "give the base with --model" in str(raised.value)
    graft.adopt(adapter, tmp_path / "run", model=str(tiny_base))


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTISED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bitsandbytes": (BNB | {"bnb_4bit_use_double_quant": True}, ["--format nf4 --double-quant"]),
    "single": (BNB, ["--model ORIGINAL --format nf4;"]),
    "fp4": (BNB | {"bnb_4bit_quant_type": "fp4"}, ["--format fp4"]),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, ["--format int8"]),
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, ["whose weights are not quite those"]),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_a_base_that_another_tool_quantised_has_two_ways(case, tiny_base, tmp_path) -> None:
    settings, pieces = QUANTISED[case]
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    adapter = save_peft(tmp_path / "a", low_rank(dense(tiny_base)), base)
    with pytest.raises(GraftError) as raised:
        graft.adopt(adapter, tmp_path / "run")
    for piece in [f"graft convert {base} --out", "--model NEW_FOLDER", "--model ORIGINAL", *pieces]:
        assert piece in str(raised.value)


@pytest.fixture
def untied(tiny_base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "untied"
    model = dense(tiny_base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    model.save_pretrained(folder)
    copy_tokenizer(tiny_base, folder)
    return folder


def test_trained_embeddings_and_head_make_a_base_of_the_runs_own(untied, tmp_path) -> None:
    model = dense(untied)
    tensors = low_rank(model)
    rows = model.config.vocab_size + 3
    new = {
        f"{PREFIX}model.embed_tokens.weight": torch.randn(rows, 64) * 0.2,
        f"{PREFIX}lm_head.weight": torch.randn(rows, 64) * 0.2,
    }
    report = graft.adopt(save_peft(tmp_path / "a", tensors | new, untied), tmp_path / "run")
    assert set(report.base_changes) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert f"to {rows} rows" in (tmp_path / "run" / "report.md").read_text()
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(new[f"{PREFIX}model.embed_tokens.weight"])
        model.lm_head.weight.copy_(new[f"{PREFIX}lm_head.weight"])
    expected = merged(model, tensors)
    assert distance(logits(graft.load(tmp_path / "run")[0]), expected) < SAME
    graft.merge(tmp_path / "run", tmp_path / "merged")
    assert distance(logits(dense(tmp_path / "merged")), expected) < SAME
    graft.export_model(tmp_path / "run", "hf", tmp_path / "hf")
    assert f"to {rows} rows) from the adapter" in (tmp_path / "hf" / "README.md").read_text()
    graft.merge(tmp_path / "run", tmp_path / "again", into="original")
    assert distance(logits(dense(tmp_path / "again")), expected) < SAME
    with pytest.raises(GraftError, match="this run's base is its own"):
        graft.export_model(tmp_path / "run", "peft", tmp_path / "peft")
    weights = tmp_path / "run" / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0"[:1])
    changed = bytearray(weights.read_bytes())
    changed[-2] ^= 1
    weights.write_bytes(bytes(changed))
    with pytest.raises(GraftError, match="has changed since"):
        graft.load(tmp_path / "run")


def test_a_16_bit_base_keeps_its_size_and_the_trained_head_its_digits(untied, tmp_path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(untied, dtype=torch.bfloat16).save_pretrained(half)
    copy_tokenizer(untied, half)
    model = dense(half)
    head = model.lm_head.weight.detach() + torch.randn_like(model.lm_head.weight) * 0.01
    adapter = save_peft(
        tmp_path / "a",
        low_rank(model) | {f"{PREFIX}lm_head.weight": head},
        half,
        modules_to_save=["lm_head"],
    )
    graft.adopt(adapter, tmp_path / "run", dtype="float32")
    kept = load_file(tmp_path / "run" / "base" / "model.safetensors")
    assert torch.equal(kept["lm_head.weight"], head)
    assert {kept[key].dtype for key in kept if key != "lm_head.weight"} == {torch.bfloat16}
    tensors = low_rank(model)
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    assert distance(logits(graft.load(tmp_path / "run")[0]), merged(model, tensors)) < SAME


def test_a_merge_keeps_what_a_16_bit_base_was_given_or_measures_its_rounding(
    untied, tmp_path
) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(untied, dtype=torch.bfloat16).save_pretrained(half)
    copy_tokenizer(untied, half)
    model = dense(half)
    head = model.lm_head.weight.detach() + torch.randn_like(model.lm_head.weight) * 0.01
    tensors = {f"{PREFIX}lm_head.weight": head}
    adapter = save_peft(
        tmp_path / "a", low_rank(model) | tensors, half, modules_to_save=["lm_head"]
    )
    graft.adopt(adapter, tmp_path / "run")
    exact = graft.merge(tmp_path / "run", tmp_path / "wide", dtype="float32")
    kept = load_file(tmp_path / "wide" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(kept, head)
    rounded = graft.merge(tmp_path / "run", tmp_path / "narrow")
    kept = load_file(tmp_path / "narrow" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(kept, head.bfloat16())
    assert exact.max_logit_difference < 1e-5 * exact.max_logit < rounded.max_logit_difference
    before, after = (
        logits(graft.load(tmp_path / folder, dtype="float32")[0]) for folder in ("run", "narrow")
    )
    assert rounded.max_logit_difference < 4 * (before - after).abs().max()


MISFITS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "only the embeddings resized": (
        {"model.embed_tokens.weight": torch.ones(9, 64)},
        {},
        "its embeddings have 9 rows and its head",
    ),
    "another width": ({"lm_head.weight": torch.ones(9, 3)}, {}, r"lm_head.weight is \[9, 3\]"),
    "no number": (
        {"model.norm.weight": torch.full((64,), float("nan"))},
        {},
        "model.norm.weight holds what is infinite or no number",
    ),
    "a module that is not there": ({}, {"modules_to_save": ["score"]}, "which this model has not"),
    "a module without tensors": ({}, {"modules_to_save": ["lm_head"]}, "no tensors of it"),
    "biases that it has not": ({}, {"bias": "some"}, "expected 'none', 'all' or 'lora_only'"),
    "tokens without numbers": (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 64)},
        {},
        "trainable_token_indices does not say which",
    ),
    "numbers without tokens": ({}, {"trainable_token_indices": [3]}, "are not in the file"),
    "tokens beyond the rows": (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 64)},
        {"trainable_token_indices": [9999]},
        "token 9999 is beyond its",
    ),
    "another count of tokens": (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 64)},
        {"trainable_token_indices": [1, 2]},
        r"is \[1, 64\]; expected \[2, 64\]",
    ),
    "half an update": (
        {"lm_head.lora_A.weight": torch.ones(4, 64)},
        {"target_modules": ["q_proj", "v_proj", "lm_head"]},
        "lm_head has lora_A.weight; expected lora_A.weight and lora_B.weight",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_beside_the_layers_does_not_fit_is_refused(case, untied, tmp_path) -> None:
    tensors, options, piece = MISFITS[case]
    named = {PREFIX + key: tensor for key, tensor in tensors.items()}
    adapter = save_peft(tmp_path / "a", low_rank(dense(untied)) | named, untied, **options)
    with pytest.raises(GraftError, match=piece):
        graft.adopt(adapter, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_updates_that_were_to_be_tied_and_differ_are_refused(tiny_base, tmp_path) -> None:
    model = dense(tiny_base)
    assert model.config.tie_word_embeddings
    rows, width = model.get_input_embeddings().weight.shape
    own = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.randn(4, rows),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.randn(width, 4),
        f"{PREFIX}lm_head.lora_A.weight": torch.randn(4, width),
        f"{PREFIX}lm_head.lora_B.weight": torch.randn(rows, 4),
    }
    targets = ["q_proj", "v_proj", "embed_tokens", "lm_head"]
    options = {"target_modules": targets, "ensure_weight_tying": True}
    adapter = save_peft(tmp_path / "a", low_rank(model) | own, tiny_base, **options)
    with pytest.raises(GraftError, match="ensure_weight_tying.* embeddings and head differ"):
        graft.adopt(adapter, tmp_path / "run")


def test_the_original_of_a_base_that_came_quantised(untied, tmp_path) -> None:
    config = QuantizeConfig(model=str(untied), out=str(tmp_path / "nf4"), format="nf4")
    graft.quantize(config)
    tensors = low_rank(dense(untied))
    adapter = save_peft(tmp_path / "a", tensors, tmp_path / "nf4")
    run = tmp_path / "run"
    graft.adopt(adapter, run)
    with pytest.raises(GraftError, match="nf4 is quantised itself(.|\n)*--original FOLDER"):
        graft.merge(run, tmp_path / "merged", into="original")
    with pytest.raises(GraftError, match="give both"):
        graft.merge(run, tmp_path / "merged", original=str(untied))
    report = graft.merge(run, tmp_path / "merged", into="original", original=str(untied))
    assert report.into == f"the original base, {untied} (unquantised)"
    expected = merged(dense(untied), tensors)
    assert distance(logits(dense(tmp_path / "merged")), expected) < SAME
    other = tmp_path / "other"
    model = dense(untied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(other)
    copy_tokenizer(untied, other)
    with pytest.raises(GraftError, match="is not what the run's base was made of"):
        graft.merge(run, tmp_path / "wrong", into="original", original=str(other))
    assert not (tmp_path / "wrong").exists()


def test_a_merge_says_what_it_went_into(untied, tmp_path) -> None:
    adapter = save_peft(tmp_path / "a", low_rank(dense(untied)), untied)
    graft.adopt(adapter, tmp_path / "plain")
    report = graft.merge(tmp_path / "plain", tmp_path / "one", into="original")
    assert report.into == f"the original base, {untied} (unquantised, as the run was trained on it)"
    graft.adopt(adapter, tmp_path / "rounded", format="nf4")
    report = graft.merge(tmp_path / "rounded", tmp_path / "two", into="original")
    assert report.into == f"the original base, {untied} (unquantised)"


def test_two_adapters_are_merged_one_after_the_other(tiny_base, tmp_path) -> None:
    first, second = low_rank(dense(tiny_base)), low_rank(dense(tiny_base), ("q_proj", "down_proj"))
    save_peft(tmp_path / "a", first, tiny_base)
    save_peft(tmp_path / "b", second, tiny_base, target_modules=["q_proj", "down_proj"])
    graft.adopt(tmp_path / "a", tmp_path / "run")
    graft.merge(tmp_path / "run", tmp_path / "one", dtype="float32")
    graft.adopt(tmp_path / "b", tmp_path / "run2", model=str(tmp_path / "one"))
    graft.export_model(tmp_path / "run2", "hf", tmp_path / "both")
    expected = merged(dense(tiny_base), first)
    assert distance(logits(dense(tmp_path / "one")), expected) < SAME
    both = merged(dense(tmp_path / "one"), second)
    assert distance(logits(dense(tmp_path / "both")), both) < SAME < distance(expected, both)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_the_merged_gemma_is_the_adapted_one(family, tiny_base, tmp_path) -> None:
    base = tmp_path / "base"
    tensors = low_rank(write_tiny(family, base, tiny_base), ("q_proj", "down_proj"))
    save_peft(tmp_path / "a", tensors, base, target_modules=["q_proj", "down_proj"])
    graft.adopt(tmp_path / "a", tmp_path / "run")
    graft.merge(tmp_path / "run", tmp_path / "one")
    expected = merged(dense(base), tensors)
    assert distance(logits(dense(tmp_path / "one")), expected) < SAME
    assert distance(logits(dense(base)), expected) > 10 * SAME
