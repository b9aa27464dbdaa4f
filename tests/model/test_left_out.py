"""What stays as it is of a model is said with its share of the parameters."""

from __future__ import annotations

import json

import pytest
import torch
from every_family import tiny_config, write_tiny
from transformers import AutoModelForCausalLM

from graft.api.config import PlanConfig, QuantizeConfig, TrainConfig
from graft.api.events import Events
from graft.api.finetune import finetune
from graft.api.plan import plan
from graft.api.quantize import quantize
from graft.model.left_out import left_out
from graft.model.targets import linear_layers


def said_of(family: str, does: str = "adapts") -> str | None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    return left_out(model, linear_layers(model), does)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt", "qwen2", "phi"])
def test_nothing_is_said_of_embeddings_head_and_norms(family) -> None:
    assert said_of(family) is None


def test_fused_experts_are_named_with_their_share() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("gpt_oss"))
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
    share = experts / model.num_parameters()
    said = said_of("gpt_oss")
    assert said is not None and said.startswith("adapts 8 linear layers; ")
    named = f"model.layers.*.mlp.experts ({share:.0%}: fused experts are not adapted yet)"
    assert named in said and "model.layers.*.mlp.router (0." in said


def test_layers_whose_weight_others_read_are_named() -> None:
    said = said_of("mamba", "quantises")
    assert said is not None and said.startswith("quantises 2 linear layers")
    assert "mixer.out_proj (" in said and "MambaMixer reads its weight itself" in said


class Heard(Events):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_the_commands_say_it(tiny_base, rows, tmp_path) -> None:
    folder, out = str(tmp_path / "model"), str(tmp_path / "out")
    write_tiny("gpt_oss", tmp_path / "model", tiny_base)
    expected = said_of("gpt_oss")
    assert plan(PlanConfig(model=folder, method="lora")).left_out == expected
    assert plan(PlanConfig(model=folder, method="full")).left_out is None
    heard = Heard()
    config = TrainConfig(model=folder, data=str(rows), out=out, method="lora", steps=1)
    report = finetune(config, heard)
    assert report.left_out == expected and expected in heard.notes
    assert json.loads((tmp_path / "out" / "report.json").read_text())["left_out"] == expected
    assert (
        "| left as it is | adapts 8 linear layers" in (tmp_path / "out" / "report.md").read_text()
    )
    heard = Heard()
    quantize(QuantizeConfig(model=folder, out=str(tmp_path / "packed"), format="int8"), heard)
    assert heard.notes[-1] == said_of("gpt_oss", "quantises")
