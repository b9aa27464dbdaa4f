"""A model folder is opened once: what reads it is counted, and what it holds stays as it is."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from graft.adapters.config import AdapterConfig
from graft.errors import GraftError
from graft.formats.registry import make_format
from graft.model import folder as folder_module
from graft.model import hub
from graft.model.families import FAMILIES
from graft.model.load import load_model
from graft.model.save import save_model
from graft.model.subject import Subject, build_skeleton, open_subject
from graft.plan.memory import MemoryPlan, plan_memory


def plan(model: str | Path | Subject, weight_format=None) -> MemoryPlan:
    return plan_memory(
        model,
        weight_format=weight_format,
        adapter=AdapterConfig(method="lora", rank=2),
        dtype="auto",
        device="cpu",
        batch_size=2,
        sequence_length=16,
        checkpointing="none",
    )


def described(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Every tensor's class, shape, dtype, device and whether it trains."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: (type(t), tuple(t.shape), t.dtype, t.device.type, t.requires_grad)
        for name, t in tensors.items()
    }


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often a folder is found, and each of transformers' readers and builders is called."""
    counts: Counter = Counter()

    def counted(owner: object, name: str) -> None:
        call = getattr(owner, name)

        def counting(*arguments: object, **options: object) -> object:
            counts[f"{getattr(owner, '__name__', owner)}.{name}"] += 1
            return call(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    counted(AutoConfig, "from_pretrained")
    counted(AutoTokenizer, "from_pretrained")
    counted(AutoModelForCausalLM, "from_config")
    counted(folder_module, "read_json")
    return counts


@pytest.mark.parametrize("quantised", [False, True])
def test_a_folder_is_read_once(quantised, checkpoint, tmp_path, monkeypatch, calls) -> None:
    folder, weight_format = checkpoint("llama"), make_format("int")
    if quantised:
        folder, weight_format = tmp_path / "q", None
        save_model(load_model(checkpoint("llama"), weight_format=make_format("int")), folder)
    calls.clear()  # of making the folder
    subject = open_subject(folder)
    plan(subject, weight_format)
    first = load_model(subject, weight_format=weight_format, device="cpu")
    plan(subject, weight_format)
    second = load_model(subject, weight_format=weight_format, device="cpu")
    for name in (
        "AutoConfig.from_pretrained",
        "AutoTokenizer.from_pretrained",
        "AutoModelForCausalLM.from_config",
    ):
        assert calls[name] == 1, calls
    assert first.tokenizer is second.tokenizer is subject.tokenizer
    for (name, one), (_, two) in zip(
        first.model.state_dict().items(), second.model.state_dict().items(), strict=True
    ):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "gpt2"])
def test_nobody_changes_what_it_holds(family, checkpoint) -> None:
    folder = checkpoint(family, torch.bfloat16)
    subject = open_subject(folder)
    fresh = build_skeleton(folder_module.read_config(folder))
    assert described(subject.skeleton) == described(fresh)
    assert subject.skeleton.config.to_dict() == fresh.config.to_dict()
    modules, config = list(subject.skeleton.modules()), subject.config.to_dict()
    plan(subject, make_format("int"))
    loaded = load_model(subject, weight_format=make_format("nf4"), dtype="float32", device="cpu")
    loaded.model.get_input_embeddings().requires_grad_(True)
    loaded.model.config.use_cache = False
    assert list(subject.skeleton.modules()) == modules
    assert described(subject.skeleton) == described(fresh)
    assert subject.config.to_dict() == config
    assert subject.skeleton.config.to_dict() == fresh.config.to_dict()


@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "gpt2"])
@pytest.mark.parametrize("stated", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_copy_is_what_transformers_builds_in_that_dtype(family, stated, dtype, checkpoint):
    folder = checkpoint(family, stated)
    config = folder_module.read_config(folder)
    config.dtype = dtype
    built, expected = open_subject(folder).new_model(dtype), build_skeleton(config)
    assert described(built) == described(expected)
    assert list(built.state_dict()) == list(expected.state_dict())
    assert built.config.dtype == expected.config.dtype == dtype
    assert built.all_tied_weights_keys == expected.all_tied_weights_keys
    tied = [model.get_output_embeddings().weight is model.get_input_embeddings().weight
            for model in (built, expected)]  # fmt: skip
    assert tied[0] == tied[1]


def test_the_dtype_is_that_of_the_files_and_with_the_configuration_alone_what_it_says(copied):
    folder = copied("llama", torch.bfloat16)
    assert open_subject(folder).source_dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_subject(folder).source_dtype == torch.bfloat16
    assert open_subject(folder, config_alone=True).source_dtype == torch.float32


def test_the_configuration_alone_is_enough_to_plan(checkpoint, tmp_path) -> None:
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    assert plan(tmp_path).as_dict() == plan(checkpoint("llama")).as_dict()
    subject = open_subject(tmp_path, config_alone=True)
    assert (subject.position_limit, subject.hidden_size) == (64, 80)
    assert subject.family is FAMILIES["llama"]
    with pytest.raises(GraftError, match="has no tokenizer"):
        _ = subject.tokenizer


def test_the_configuration_of_a_hub_id_is_all_that_is_fetched(checkpoint, monkeypatch) -> None:
    asked = []

    def download(model: str, file: str, local_files_only: bool) -> str:
        asked.append((model, file))
        return str(checkpoint("llama") / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert open_subject("owner/name", config_alone=True).folder == checkpoint("llama")
    assert asked == [("owner/name", "config.json")]


def damaged(description: dict[str, object]) -> dict[str, dict[str, object]]:
    layers = description["layers"]
    assert isinstance(layers, dict)
    name = "model.layers.0.mlp.up_proj"
    return {
        "format_version 9": description | {"format_version": 9},
        "layers is None": description | {"layers": None},
        "'elsewhere' is no linear layer": description | {"layers": layers | {"elsewhere": {}}},
        f"'{name}' names no format": description | {"layers": layers | {name: {}}},
        "unknown weight format 'nfx'": description | {"layers": layers | {name: {"format": "nfx"}}},
    }


def test_loading_and_planning_follow_the_same_rules(checkpoint, tmp_path) -> None:
    folder = tmp_path / "q"
    save_model(load_model(checkpoint("llama"), weight_format=make_format("int")), folder)
    sound = json.loads((folder / "graft.json").read_text())
    for piece, description in damaged(sound).items():
        (folder / "graft.json").write_text(json.dumps(description))
        for use in (plan, load_model):
            with pytest.raises(GraftError) as raised:
                use(folder)
            assert piece in str(raised.value)
