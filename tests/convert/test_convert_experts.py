"""Experts that a folder holds one by one come in as the model's fused tensors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from foreign import WEIGHTS, change_tensors, foreign_folder, gptq_layer, gptq_weight
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import graft
from graft.convert.config import ConvertConfig
from graft.errors import GraftError

EXPERT = "model.layers.1.mlp.experts.2.up_proj"
ASKED = ConvertConfig(dequantise=True)


@pytest.fixture
def folder(tiny_base, tmp_path):
    """A DeepSeek-V3 in FP8 as it is published: blocks with short ends, experts one by one."""
    config = DeepseekV3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    folder = tmp_path / "theirs"
    DeepseekV3ForCausalLM(config).save_pretrained(folder)
    for file in tiny_base.glob("*token*"):
        shutil.copy(file, folder)
    tensors = load_file(folder / WEIGHTS)
    for key in [key for key in tensors if key.endswith(("_proj.weight", "_mqa.weight"))]:
        weight = tensors[key]
        rows, columns = (-(-size // 16) for size in weight.shape)
        scales = torch.rand(rows, columns) * 1e-3 + 1e-4
        spread = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
        spread = spread[: weight.shape[0], : weight.shape[1]]
        tensors[key] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scales
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": settings}))
    return folder


def test_a_deepseek_v3_in_fp8(folder, tmp_path, logits):
    with pytest.raises(GraftError, match=r"weights are FP8 \(model.*add --dequantise"):
        graft.convert_model(folder, tmp_path / "out")
    report = graft.convert_model(folder, tmp_path / "out", config=ASKED)
    assert set(report.dense) == {"FP8"} and not report.left_out
    tensors, stored = load_file(folder / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    fused = stored["model.layers.1.mlp.experts.gate_up_proj"]
    assert fused.shape == (4, 64, 64)
    scales = tensors[f"{EXPERT}.weight_scale_inv"].double()
    spread = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
    meant = tensors[f"{EXPERT}.weight"].double() * spread
    torch.testing.assert_close(fused[2, 32:].double(), meant, rtol=1e-7, atol=0)
    found = logits(graft.load(tmp_path / "out", dtype="float32")[0])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(found, logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: (t.pop(f"{EXPERT}.weight"), t.pop(f"{EXPERT}.weight_scale_inv")),
            f"tensor {EXPERT}.weight is missing",
        ),
        (
            lambda t: t.update({f"{EXPERT}.weight": torch.ones(32, 48)}),
            r"has shape \[32, 48\]; expected \[32, 64\]|is not zero",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused(change, words, folder, tmp_path):
    change_tensors(folder, change)
    with pytest.raises(GraftError, match=words):
        graft.convert_model(folder, tmp_path / "out", config=ASKED)
    assert not (tmp_path / "out").exists()


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}


@pytest.fixture
def qwen(tiny_base, tmp_path):
    """A Qwen 3 MoE whose experts lie one by one, as it is published."""
    config = Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
    )
    folder = tmp_path / "qwen"
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    for file in tiny_base.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def test_what_sends_tokens_to_experts_may_be_quantised(qwen, tmp_path):
    name = "model.layers.0.mlp.gate"
    theirs = foreign_folder(qwen, tmp_path / "theirs", GPTQ, gptq_layer(4, 32), [name])
    report = graft.convert_model(theirs, tmp_path / "out")
    made = load_file(tmp_path / "out" / WEIGHTS)[f"{name}.weight"]
    expected = gptq_weight(load_file(theirs / WEIGHTS), name, 4).float()
    torch.testing.assert_close(made, expected, rtol=0, atol=float(expected.abs().max()) * 1e-3)
    assert report.dequantised == (name,)


def test_experts_of_two_dtypes_keep_what_the_wider_holds(qwen, tmp_path):
    theirs = foreign_folder(
        qwen, tmp_path / "theirs", GPTQ, gptq_layer(4, 32), ["model.layers.0.self_attn.q_proj"]
    )
    experts = "model.layers.0.mlp.experts"

    def narrow(tensors):
        tensors[f"{experts}.0.down_proj.weight"] = tensors[f"{experts}.0.down_proj.weight"].half()

    change_tensors(theirs, narrow)
    graft.convert_model(theirs, tmp_path / "out")
    made = load_file(tmp_path / "out" / WEIGHTS)[f"{experts}.down_proj"]
    stored = load_file(theirs / WEIGHTS)
    for number, found in enumerate(made):
        assert torch.equal(found, stored[f"{experts}.{number}.down_proj.weight"].float())


def test_a_norm_cannot_be_quantised(qwen, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    theirs = foreign_folder(qwen, tmp_path / "theirs", GPTQ, gptq_layer(4, 32), [name])

    def rename(tensors):
        tensors.pop("model.norm.weight")
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"model.norm.{part}"] = tensors[f"{name}.{part}"].clone()

    change_tensors(theirs, rename)
    with pytest.raises(GraftError, match=r"model\.norm: its weight is quantised, and is \[64\]"):
        graft.convert_model(theirs, tmp_path / "out")
