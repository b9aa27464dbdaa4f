"""FP8 and MXFP4 folders, compared with what Transformers makes of them on a CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    Qwen3MoeConfig,
)

import graft
from graft.convert.config import ConvertConfig

pytestmark = pytest.mark.filterwarnings("default")  # Transformers tells that there is no GPU
pytest.importorskip("accelerate", reason="needs accelerate: Transformers reads FP8 through it")

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, num_experts=4),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        **EXPERTS,
        **LATENT,
        v_head_dim=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
}


def written(config, base: Path, folder: Path, settings: dict, change) -> dict[str, Tensor]:
    """Write a random model of that configuration, its tensors changed, beside its settings."""
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    for file in base.glob("*token*"):
        shutil.copy(file, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"quantization_config": settings}))
    return tensors


def compared(folder: Path, out: Path) -> None:
    """Convert the folder and compare it, weight by weight, with Transformers' reading."""
    graft.convert_model(folder, out, config=ConvertConfig(dequantise=True))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stored = load_file(out / "model.safetensors")
    assert set(stored) == set(theirs.state_dict()) - set(theirs.all_tied_weights_keys)
    for name, weight in stored.items():
        torch.testing.assert_close(weight, theirs.state_dict()[name], rtol=0, atol=0)
    ids = torch.arange(60).reshape(2, 30) + 5
    with torch.no_grad():
        ours = graft.load(out, dtype="float32")[0](input_ids=ids).logits
        assert (ours - theirs(input_ids=ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("exponents", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_fp8_in_blocks(kind, exponents, tiny_base, tmp_path):
    def quantise(tensors):
        for key in [key for key in tensors if key.endswith(("_proj.weight", "_mqa.weight"))]:
            weight = tensors[key]
            rows, columns = (size // 16 for size in weight.shape)
            scales = torch.rand(rows, columns) * 1e-3 + 1e-4
            if exponents:
                scales = torch.exp2(scales.log2().round())
            spread = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
            tensors[key] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = scales.to(torch.float8_e8m0fnu) if exponents else scales

    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    settings |= {"scale_fmt": "ue8m0"} if exponents else {}
    written(CONFIGS[kind](), tiny_base, tmp_path / "theirs", settings, quantise)
    compared(tmp_path / "theirs", tmp_path / "out")


def test_gpt_oss(tiny_base, tmp_path):
    def quantise(tensors):
        for key in [key for key in tensors if key.endswith("experts.gate_up_proj")]:
            for name in (key, key.replace("gate_up", "down")):
                experts, columns, rows = tensors.pop(name).shape
                packed = torch.randint(0, 256, (experts, rows, columns // 32, 16)).byte()
                exponents = torch.randint(118, 124, packed.shape[:-1]).byte()
                tensors.update({f"{name}_blocks": packed, f"{name}_scales": exponents})

    config = GptOssConfig(
        **SIZES | {"intermediate_size": 32},
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    settings = {"quant_method": "mxfp4", "dequantize": True}
    written(config, tiny_base, tmp_path / "theirs", settings, quantise)
    compared(tmp_path / "theirs", tmp_path / "out")
