"""Architectures besides Llama in a GGUF file; llama.cpp itself runs them among the peers."""

from __future__ import annotations

import gguf
import pytest
import torch
from tests.export.gguf_sizes import GEMMA, SIZES
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from graft.adapters.attach import frozen_layers, replace_module
from graft.errors import GraftError
from graft.export.gguf.write import check_gguf, check_gguf_plan, export_gguf
from graft.formats.dense import DenseFormat
from graft.formats.int_group import IntGroupFormat
from graft.model.gguf.load import load_gguf_model
from graft.model.targets import freeze_layers, select_targets


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


IDS = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | IDS
LAYER = {
    "gpt2": {
        "transformer.h.1.ln_1": "attn_norm",
        "transformer.h.1.attn.c_attn": "attn_qkv",
        "transformer.h.1.attn.c_proj": "attn_output",
        "transformer.h.1.ln_2": "ffn_norm",
        "transformer.h.1.mlp.c_fc": "ffn_up",
        "transformer.h.1.mlp.c_proj": "ffn_down",
    },
    "falcon": {
        "transformer.h.1.ln_mlp": "attn_norm",  # what llama.cpp gives to the MLP
        "transformer.h.1.ln_attn": "attn_norm_2",
        "transformer.h.1.input_layernorm": "attn_norm",
        "transformer.h.1.self_attention.query_key_value": "attn_qkv",
        "transformer.h.1.self_attention.dense": "attn_output",
        "transformer.h.1.mlp.dense_h_to_4h": "ffn_up",
        "transformer.h.1.mlp.dense_4h_to_h": "ffn_down",
    },
    "phi": {
        "model.layers.1.input_layernorm": "attn_norm",
        "model.layers.1.self_attn.q_proj": "attn_q",
        "model.layers.1.self_attn.k_proj": "attn_k",
        "model.layers.1.self_attn.v_proj": "attn_v",
        "model.layers.1.self_attn.dense": "attn_output",
        "model.layers.1.mlp.fc1": "ffn_up",
        "model.layers.1.mlp.fc2": "ffn_down",
    },
    "phi3": {
        "model.layers.1.input_layernorm": "attn_norm",
        "model.layers.1.self_attn.qkv_proj": "attn_qkv",
        "model.layers.1.self_attn.o_proj": "attn_output",
        "model.layers.1.post_attention_layernorm": "ffn_norm",
        "model.layers.1.mlp.gate_up_proj": "ffn_up",
        "model.layers.1.mlp.down_proj": "ffn_down",
    },
}
OUTSIDE = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.word_embeddings": "token_embd",
    "transformer.ln_f": "output_norm",
    "model.embed_tokens": "token_embd",
    "model.final_layernorm": "output_norm",
    "model.norm": "output_norm",
    "lm_head": "output",
}
CASES = {
    "gpt2": (GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=48, **IDS), 4, 256),
    "falcon-7b": (FalconConfig(**WIDE, ffn_hidden_size=96), 1, 96),
    "falcon-40b": (
        FalconConfig(
            **WIDE, new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False
        ),
        2,
        256,
    ),
    "phi": (PhiConfig(**WIDE, intermediate_size=96, num_key_value_heads=2), 2, 96),
    "phi3": (Phi3Config(**WIDE, intermediate_size=96, sliding_window=32), 4, 96),
}
OWN_METADATA = {
    "gpt2": {"context_length": 48, "attention.layer_norm_epsilon": 1e-5},
    "falcon-7b": {"context_length": 2048, "rope.dimension_count": 16, "rope.freq_base": 1e4},
    "falcon-40b": {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 16},
    "phi": {"context_length": 2048, "rope.dimension_count": 8},
    "phi3": {"context_length": 32, "attention.layer_norm_rms_epsilon": 1e-5},
}


def random_model(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, 1.0, 0.2)
    return model


def expected_rows(name: str, tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Of Falcon's fused rows, in heads of 16: each queries' rows, then the keys', the values'."""
    if not name.endswith("query_key_value"):
        return tensor
    each = 4 // kv_heads + 2
    order = []
    for part in (range(each - 2), [each - 2], [each - 1]):
        for head in range(kv_heads):
            for one in part:
                order += range(16 * (head * each + one), 16 * (head * each + one + 1))
    return tensor[order]


@pytest.mark.parametrize("frozen", ["raw", "dense", "int"])
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_and_its_rows(case, frozen, tokenizer, tmp_path):
    config, kv_heads, width = CASES[case]
    model = random_model(config)
    if frozen != "raw":
        freeze_layers(model, select_targets(model, ()))
    if frozen == "int":
        for name, layer in list(frozen_layers(model)):
            weight_format = IntGroupFormat(4, 32)
            packed = weight_format.pack(layer.dense_weight())
            replace_module(model, name, layer.replaced(weight_format, packed))
    path = tmp_path / "m.gguf"
    assert check_gguf(model, tokenizer) == []
    report = export_gguf(model, tokenizer, path, unquantised="F32", name="m")
    assert report.max_rounding == 0.0 and report.float32_layers == ()
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layers = dict(frozen_layers(model))
    seen = set()
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters or ".0." in name:
            continue
        kind = config.model_type
        target = OUTSIDE.get(name) or f"blk.1.{LAYER[kind][name]}"
        if name == "lm_head" and config.tie_word_embeddings:
            assert "output.weight" not in tensors
            continue
        if name in layers:
            weight = layers[name].dense_weight()
        else:  # GPT-2 stores its weights the other way
            weight = module.weight.T if kind == "gpt2" and ".c_" in name else module.weight
        stored = tensors[f"{target}.weight"]
        data = gguf.quants.dequantize(stored.data, stored.tensor_type)
        found = torch.from_numpy(data.copy())
        assert torch.equal(found, expected_rows(name, weight.detach(), kv_heads)), name
        quantised = stored.tensor_type is gguf.GGMLQuantizationType.Q4_1
        assert quantised == (frozen == "int" and name in layers), name
        seen.add(f"{target}.weight")
        if parameters.get("bias") is not None:
            bias = torch.from_numpy(tensors[f"{target}.bias"].data.copy())
            assert torch.equal(bias, parameters["bias"]), name
            seen.add(f"{target}.bias")
    assert seen == {name for name in tensors if not name.startswith("blk.0.")}

    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = {"phi": "phi2"}.get(config.model_type, config.model_type)
    assert fields["general.architecture"] == architecture
    expected = {
        "block_count": 2,
        "embedding_length": 64,
        "feed_forward_length": width,
        "attention.head_count": 4,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": 16,
    } | OWN_METADATA[case]
    for key, value in expected.items():
        assert fields[f"{architecture}.{key}"] == pytest.approx(value), key
    assert "gpt2.rope.freq_base" not in fields


def test_a_tied_head_with_a_bias_is_written_whole(tokenizer, tmp_path):
    """llama.cpp's Phi takes no embeddings in the place of its head."""
    model = random_model(PhiConfig(**WIDE, intermediate_size=96, tie_word_embeddings=True))
    path = tmp_path / "m.gguf"
    export_gguf(model, tokenizer, path, unquantised="F32", name="m")
    tensors = {
        tensor.name: torch.from_numpy(tensor.data.copy())
        for tensor in gguf.GGUFReader(path).tensors
    }
    assert torch.equal(tensors["output.weight"], tensors["token_embd.weight"])
    assert torch.equal(tensors["output.bias"], model.lm_head.bias)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), "by_inverse_layer_idx is True"),
        (GPT2Config(scale_attn_weights=False), "scale_attn_weights is False"),
        (GPT2Config(add_cross_attention=True), "add_cross_attention is True"),
        (GPT2Config(activation_function="relu"), "hidden_act is 'relu'"),
        (FalconConfig(alibi=True), "alibi is True"),
        (FalconConfig(parallel_attn=False), "parallel_attn is False"),
        (FalconConfig(bias=True), "bias is True"),
        (FalconConfig(activation="relu"), "hidden_act is 'relu'"),
        (
            FalconConfig(
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "rope_type is 'dynamic'",
        ),
        (PhiConfig(qk_layernorm=True), "qk_layernorm is True"),
    ],
)
def test_other_arithmetic_is_refused(config, words):
    (problem,) = check_gguf_plan(config, IntGroupFormat())
    assert words in problem and "--to hf" in problem


@pytest.mark.parametrize(
    ("activation", "told"), [("gelu_new", False), ("gelu_pytorch_tanh", False), ("gelu", True)]
)
def test_gelu_without_tanh_is_told(activation, told, tokenizer, tmp_path):
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, activation_function=activation, **IDS)
    assert check_gguf_plan(config, IntGroupFormat()) == []
    path = tmp_path / "m.gguf"
    report = export_gguf(random_model(config), tokenizer, path, unquantised="F32", name="m")
    assert any("tanh" in note for note in report.notes) is told
