"""Rotary scaling, biases and windows in a GGUF file: as llama.cpp reads them, or refused."""

from __future__ import annotations

import math

import gguf
import pytest
import torch
from tests.export.gguf_sizes import GEMMA, SIZES
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from graft.export.gguf.write import check_gguf, check_gguf_plan, export_gguf
from graft.export.registry import TARGETS
from graft.formats.dense import DenseFormat

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 32}


def metadata(model, tokenizer, path):
    report = export_gguf(model, tokenizer, path, unquantised="F32", name="m")
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    return {key: field.contents() for key, field in reader.fields.items()}, tensors, report


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_yarn(kind, tokenizer, tmp_path):
    config = kind(**SIZES, max_position_embeddings=64, rope_parameters=YARN, head_dim=16)
    if kind is MistralConfig:
        config.sliding_window = None
    model = AutoModelForCausalLM.from_config(config)
    found, _, _ = metadata(model, tokenizer, tmp_path / "m.gguf")
    arch = found["general.architecture"]
    assert found[f"{arch}.rope.scaling.type"] == "yarn"
    assert found[f"{arch}.rope.scaling.factor"] == 4.0
    assert found[f"{arch}.rope.scaling.original_context_length"] == 32
    assert found[f"{arch}.context_length"] == 128  # what the factor makes of it
    assert f"{arch}.rope.scaling.attn_factor" not in found


def test_yarns_attention_factor_is_written_beside_the_usual_one(tokenizer, tmp_path):
    rope = YARN | {"attention_factor": 1.5}
    config = LlamaConfig(**SIZES, max_position_embeddings=128, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config)
    found, _, _ = metadata(model, tokenizer, tmp_path / "m.gguf")
    usual = 0.1 * math.log(4.0) + 1.0
    assert found["llama.rope.scaling.attn_factor"] == pytest.approx(1.5 / usual)


def test_longrope(tokenizer, tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    short, long = [1.0 + 0.5 * i for i in range(8)], [1.0 + 2.0 * i for i in range(8)]
    rope |= {"short_factor": short, "long_factor": long}
    sizes = SIZES | {"pad_token_id": 0, "max_position_embeddings": 1024}
    config = Phi3Config(**sizes, original_max_position_embeddings=64, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config)
    found, tensors, report = metadata(model, tokenizer, tmp_path / "m.gguf")
    assert tensors["rope_factors_short.weight"].tolist() == short
    assert tensors["rope_factors_long.weight"].tolist() == long
    assert found["phi3.rope.scaling.original_context_length"] == found["phi3.context_length"] == 64
    attention = math.sqrt(1 + math.log(16) / math.log(64))
    assert found["phi3.rope.scaling.attn_factor"] == pytest.approx(attention)
    (note,) = report.notes
    assert "the file's context is 64 tokens" in note


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (YARN | {"truncate": False}, "truncate is False"),
        (YARN | {"beta_fast": 16}, "beta_fast is 16; programs on llama.cpp take 32"),
        (YARN | {"rope_type": "dynamic"}, "rope_type is 'dynamic'"),
    ],
    ids=["truncate", "beta", "dynamic"],
)
def test_rotary_settings_that_llama_cpp_has_not(rope, words):
    config = LlamaConfig(**SIZES, max_position_embeddings=128, rope_parameters=rope)
    (problem,) = check_gguf_plan(config, DenseFormat())
    assert words in problem


@pytest.mark.parametrize(
    ("kind", "own"), [(Qwen3Config, {"head_dim": 16}), (GemmaConfig, GEMMA)], ids=["qwen3", "gemma"]
)
def test_a_bias_that_llama_cpp_would_not_add_is_refused(kind, own, tokenizer):
    config = kind(**SIZES, **own, attention_bias=True)
    (problem,) = check_gguf_plan(config, DenseFormat())
    assert "attention_bias is True" in problem
    model = AutoModelForCausalLM.from_config(kind(**SIZES, **own))
    for name in ("q_proj", "o_proj"):
        layer = model.model.layers[0].self_attn.get_submodule(name)
        layer.bias = torch.nn.Parameter(torch.ones(layer.out_features))
    (problem,) = check_gguf(model, tokenizer)
    assert "self_attn.o_proj has a bias, which llama.cpp does not add" in problem
    names = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "o_proj")]
    assert TARGETS["gguf"].without_bias(model.config, names) == names[1:]
    assert TARGETS["gguf"].without_bias(LlamaConfig(**SIZES), names) == []


GEMMAS = GEMMA | {"query_pre_attn_scalar": 16, "sliding_window": 16}


@pytest.mark.parametrize("kind", [Gemma2Config, Gemma3TextConfig])
def test_later_gemmas(kind, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_config(kind(**SIZES | GEMMAS))
    found, tensors, _ = metadata(model, tokenizer, tmp_path / "m.gguf")
    arch = found["general.architecture"]
    assert arch == {"gemma2": "gemma2", "gemma3_text": "gemma3"}[model.config.model_type]
    assert found[f"{arch}.attention.sliding_window"] == 16
    assert found.get(f"{arch}.attn_logit_softcapping") == model.config.attn_logit_softcapping
    assert found.get(f"{arch}.final_logit_softcapping") == model.config.final_logit_softcapping
    assert found[f"{arch}.rope.freq_base"] == (1e4 if arch == "gemma2" else 1e6)
    norm = model.model.layers[1].post_feedforward_layernorm.weight
    assert torch.equal(tensors["blk.1.post_ffw_norm.weight"], norm + 1.0)
    assert torch.equal(
        tensors["blk.1.post_attention_norm.weight"],
        model.model.layers[1].post_attention_layernorm.weight + 1.0,
    )


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (Gemma2Config, {"attn_logit_softcapping": None}, "expected a number"),
        (Gemma3TextConfig, {"final_logit_softcapping": 30.0}, "expected none"),
        (Gemma2Config, {"query_pre_attn_scalar": 24}, "llama.cpp takes 16"),
        (Gemma3TextConfig, {"layer_types": ["full_attention"] * 2}, "each 6th layer"),
        (
            Gemma3TextConfig,
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                }
            },
            "llama.cpp has rope_theta 10000",
        ),
    ],
    ids=["cap", "no-cap", "scale", "pattern", "local"],
)
def test_later_gemmas_that_llama_cpp_has_otherwise(kind, changes, words):
    (problem,) = check_gguf_plan(kind(**SIZES | GEMMAS | changes), DenseFormat())
    assert words in problem
