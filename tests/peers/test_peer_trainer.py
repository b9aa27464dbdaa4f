"""Transformers' Trainer on a loaded model: its checkpoints are that model, as it then was."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.errors import GraftError
from graft.formats.registry import make_format
from graft.model.load import load_model
from graft.model.saving import saved_whole
from graft.model.targets import select_targets

pytest.importorskip("accelerate", reason="Trainer needs accelerate")


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_trainer_is_the_model(tiny_base, tmp_path) -> None:
    model = load_model(str(tiny_base), weight_format=make_format("int"), device="cpu").model
    attach_adapter(model, select_targets(model, ()), AdapterConfig(method="qalora", rank=2))
    for parameter in adapter_parameters(model, "default").values():
        parameter.requires_grad_(True)
    tokens = torch.arange(20, 40)
    before = model(input_ids=tokens[None]).logits

    def trainer(steps: int) -> Trainer:
        options = {"max_steps": steps, "save_steps": 2, "save_strategy": "steps"}
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
        arguments = TrainingArguments(
            str(tmp_path), learning_rate=0.05, logging_strategy="no", **options, **quiet
        )
        rows = [{"input_ids": tokens, "labels": tokens}] * 16
        return Trainer(model=saved_whole(model), args=arguments, train_dataset=rows)

    trainer(2).train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float32)
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens[None]).logits
        found = saved.eval()(input_ids=tokens[None]).logits
    assert not torch.allclose(expected, before, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    with pytest.raises(GraftError, match="no adapter to go on with"):
        trainer(4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
