"""Architectures besides Llama in a GGUF file; llama.cpp itself runs them among the peers."""

from __future__ import annotations

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, Qwen2Config, Qwen3Config

from graft.errors import GraftError
from graft.export.gguf_export import check_gguf_plan, export_gguf
from graft.formats.dense import DenseFormat
from graft.model.gguf_load import load_gguf_model

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}


@pytest.mark.parametrize(
    ("config", "own"),
    [
        (Qwen2Config(**SIZES), ("blk.1.attn_q.bias", "layers.1.self_attn.q_proj.bias")),
        (Qwen3Config(**SIZES, head_dim=32), ("blk.1.attn_k_norm.weight", "self_attn.k_norm")),
        (GemmaConfig(**SIZES, **GEMMA), ("blk.1.attn_norm.weight", "input_layernorm")),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_rows_keep_their_order_and_gemma_adds_one(config, own, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, 1.0, 0.2)
    path = tmp_path / "m.gguf"
    export_gguf(model, tokenizer, path, unquantised="F32", name="m")
    reader = gguf.GGUFReader(path)
    kind = config.model_type
    assert reader.fields["general.architecture"].contents() == kind
    width = getattr(config, "head_dim", None) or 16
    assert reader.fields[f"{kind}.attention.key_length"].contents() == width
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    first = model.model.layers[1].self_attn
    assert torch.equal(tensors["blk.1.attn_q.weight"], first.q_proj.weight)
    assert torch.equal(tensors["blk.1.attn_k.weight"], first.k_proj.weight)
    name, ending = own
    (parameter,) = [
        parameter
        for full, parameter in model.named_parameters()
        if "layers.1." in full and ending in full
    ]
    assert torch.equal(tensors[name], parameter + (1.0 if kind == "gemma" else 0.0))
    with pytest.raises(GraftError, match="reads GGUF files of architecture 'llama'"):
        load_gguf_model(path)


def test_what_llama_cpp_computes_otherwise_is_refused() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    scaled = check_gguf_plan(Qwen2Config(**SIZES, rope_parameters=rope), DenseFormat())
    assert len(scaled) == 1 and "rope_type is 'llama3'" in scaled[0]
    window = check_gguf_plan(Qwen3Config(**SIZES, use_sliding_window=True), DenseFormat())
    assert len(window) == 1 and "use_sliding_window" in window[0]
    config = GemmaConfig(**SIZES, head_dim=16, hidden_activation="gelu")
    assert "hidden_act is 'gelu'" in check_gguf_plan(config, DenseFormat())[0]
    assert check_gguf_plan(GemmaConfig(**SIZES, **GEMMA), DenseFormat()) == []
