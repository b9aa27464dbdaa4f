from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from transformers import BloomConfig, LlamaConfig, MistralConfig, MistralForCausalLM

from graft.adapters.attach import attach_adapter
from graft.adapters.config import AdapterConfig
from graft.errors import GraftError
from graft.export.gguf.write import check_gguf, check_gguf_plan, export_gguf
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.layers.frozen import FrozenLinear
from graft.model.gguf.load import load_gguf_model

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

SHAPES = {
    "grouped-query": (4, 32, {}),
    "wide-heads": (4, 32, {"head_dim": 32, "tie_word_embeddings": True}),
    "group-64": (4, 64, {"intermediate_size": 160}),
    "group-128": (4, 128, {"intermediate_size": 352, "num_key_value_heads": 4}),
    "rows-of-172": (4, 32, {"intermediate_size": 172, "tie_word_embeddings": True}),
    "3-bit": (3, 32, {}),
    "3-bit-group-64": (3, 64, {"intermediate_size": 160}),
    "2-bit": (2, 32, {"intermediate_size": 172}),
    "2-bit-group-128": (2, 128, {}),
    "biases": (4, 32, {"attention_bias": True, "mlp_bias": True}),
    "linear-rope": (
        4,
        32,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}},
    ),
    "llama3-rope": (4, 32, {"rope_parameters": LLAMA3_ROPE}),
}


def module_weight(module: nn.Module) -> torch.Tensor:
    return module.dense_weight() if isinstance(module, FrozenLinear) else module.weight.detach()


def expected_rows(tensor: torch.Tensor, name: str, config: LlamaConfig) -> torch.Tensor:
    """In ggml's order: of each head's rows, feature i and i + half follow each other."""
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(name.rsplit(".")[-1])
    if heads is None:
        return tensor
    rows, half = [], len(tensor) // heads // 2
    for head in range(heads):
        for feature in range(half):
            rows += [head * 2 * half + feature, head * 2 * half + half + feature]
    return tensor[rows]


def gguf_target(name: str) -> str:
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_equals_and_comes_back(shape, make_llama, tokenizer, tokens, tmp_path):
    bits, group_size, changes = SHAPES[shape]
    model = make_llama(IntGroupFormat(bits, group_size), **changes)
    path = tmp_path / "model.gguf"
    report = export_gguf(model, tokenizer, path, unquantised="F32", name="tiny")
    assert report.max_rounding == 0.0
    assert report.bytes == path.stat().st_size

    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    seen = {"rope_freqs.weight"} & read.keys()
    for name, module in model.named_modules():
        if not dict(module.named_parameters(recurse=False)):
            continue
        if name == "lm_head" and model.config.tie_word_embeddings:
            continue
        target = gguf_target(name)
        tensor = read[f"{target}.weight"]
        frozen = isinstance(module, FrozenLinear)
        if frozen and module.in_features % 32 == 0:
            assert tensor.tensor_type is gguf.GGMLQuantizationType.Q4_1
        else:
            assert tensor.tensor_type is gguf.GGMLQuantizationType.F32
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = expected_rows(module_weight(module), name, model.config)
        assert np.array_equal(found, expected.numpy()), name
        seen.add(f"{target}.weight")
        if getattr(module, "bias", None) is not None:
            bias = expected_rows(module.bias.detach(), name, model.config)
            assert np.array_equal(read[f"{target}.bias"].data, bias.numpy()), name
            seen.add(f"{target}.bias")
    assert seen == read.keys()

    back = load_gguf_model(path)
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, model(tokens).logits)
    assert not any(parameter.requires_grad for parameter in back.parameters())
    int_rows = [name for name in report.float32_layers if name.endswith("down_proj")]
    assert len(int_rows) == (2 if changes.get("intermediate_size") == 172 else 0)


def test_block_bytes_against_a_loop(make_llama, tokenizer, tmp_path):
    model = make_llama(IntGroupFormat(3, 64), num_hidden_layers=1, intermediate_size=160)
    path = tmp_path / "model.gguf"
    export_gguf(model, tokenizer, path, unquantised="F32", name="tiny")
    layer = model.model.layers[0].mlp.down_proj
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_down.weight")
    weight = layer.dense_weight().double()
    for row in range(0, 64, 7):
        for block in range(5):
            raw = bytes(tensor.data[row, 20 * block : 20 * block + 20])
            d, m = (float(np.frombuffer(raw[at : at + 2], "<f2")[0]) for at in (0, 2))
            assert d == layer.scales[row, block // 2].item()
            assert m == layer.offsets[row, block // 2].item()
            for j in range(16):
                for code, column in ((raw[4 + j] & 15, j), (raw[4 + j] >> 4, j + 16)):
                    assert code < 8
                    assert d * code + m == pytest.approx(
                        weight[row, 32 * block + column].item(), rel=1e-6, abs=1e-9
                    )


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_unquantised_type(kind, make_llama, tokenizer, tmp_path):
    model = make_llama(IntGroupFormat())
    path = tmp_path / "model.gguf"
    report = export_gguf(model, tokenizer, path, unquantised=kind, name="tiny")
    assert report.tensors == {kind: 2, "F32": 5, "Q4_1": 14}
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
    rounding = [
        (weight - weight.to(dtype).float()).abs().max().item()
        for weight in (model.lm_head.weight, model.model.embed_tokens.weight)
    ]
    assert report.max_rounding == max(rounding) > 0
    back = load_gguf_model(path)
    assert torch.equal(back.lm_head.weight, model.lm_head.weight.to(dtype).float())
    assert torch.equal(back.model.norm.weight, model.model.norm.weight)
    assert load_gguf_model(path, torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def test_dense_model(make_llama, tokenizer, tokens, tmp_path):
    path = tmp_path / "model.gguf"
    for model in (make_llama(), make_llama(DenseFormat())):
        report = export_gguf(model, tokenizer, path, unquantised="F32", name="tiny")
        assert report.tensors == {"F32": 21} and report.max_rounding == 0.0
        with torch.no_grad():
            assert torch.equal(load_gguf_model(path)(tokens).logits, model(tokens).logits)


def test_mistral_with_a_sliding_window(make_llama, tokenizer, tokens, tmp_path):
    config = make_llama().config
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    settings = {field: getattr(config, field) for field in fields}
    model = MistralForCausalLM(
        MistralConfig(**settings, num_key_value_heads=2, vocab_size=320, sliding_window=48)
    ).eval()
    path = tmp_path / "model.gguf"
    export_gguf(model, tokenizer, path, unquantised="F32", name="tiny")
    back = load_gguf_model(path)
    assert back.config.max_position_embeddings == 48
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, model(tokens).logits)


def test_quantised_head(make_llama, tokenizer, tokens, tmp_path):
    model = make_llama(IntGroupFormat(), tie_word_embeddings=True)
    weight_format = IntGroupFormat(2, 32)
    packed = weight_format.pack(model.lm_head.weight)
    model.lm_head = FrozenLinear(64, 320, weight_format, packed)
    path = tmp_path / "model.gguf"
    report = export_gguf(model, tokenizer, path, unquantised="F32", name="tiny")
    assert report.tensors["Q4_1"] == 15
    with torch.no_grad():
        assert torch.equal(load_gguf_model(path)(tokens).logits, model(tokens).logits)


def test_metadata(make_llama, tokenizer, tmp_path):
    model = make_llama(IntGroupFormat(), head_dim=32, rms_norm_eps=1e-5)
    path = tmp_path / "model.gguf"
    export_gguf(model, tokenizer, path, unquantised="F16", name="Tiny Cat")
    fields = {name: f.contents() for name, f in gguf.GGUFReader(path).fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny Cat",
        "general.file_type": 3,  # mostly Q4_1
        "general.quantization_version": 2,
        "llama.context_length": 64,
        "llama.vocab_size": 320,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.chat_template": "{{ messages[0].content }}",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    assert {key: fields.get(key) for key in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert load_gguf_model(path).config.rms_norm_eps == 1e-5


def test_llama3_frequencies_against_a_loop(make_llama, tokenizer, tmp_path):
    model = make_llama(IntGroupFormat(), head_dim=32, rope_parameters=LLAMA3_ROPE)
    path = tmp_path / "model.gguf"
    export_gguf(model, tokenizer, path, unquantised="F32", name="tiny")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    factors = []
    for pair in range(16):
        wavelength = 2 * math.pi * 500000.0 ** (2 * pair / 32)
        smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    assert 0 < sum(1 < factor < 8 for factor in factors) < 16
    np.testing.assert_allclose(tensors["rope_freqs.weight"], factors, rtol=1e-5)


def test_formats_that_gguf_cannot_hold():
    config = LlamaConfig()
    assert check_gguf_plan(config, IntGroupFormat(4, 32)) == []
    assert check_gguf_plan(config, DenseFormat()) == []
    (problem,) = check_gguf_plan(config, IntGroupFormat(4, 16))
    assert "group_size is 16" in problem and "--group-size 32" in problem
    (problem,) = check_gguf_plan(config, IntGroupFormat(8, 32))
    assert "bits is 8" in problem and "--bits 4" in problem
    problems = check_gguf_plan(config, IntGroupFormat(8, 8, "float32"))
    assert len(problems) == 3 and "float32" in problems[2]
    for weight_format in (CodebookFormat("nf4"), Int8Format()):
        (problem,) = check_gguf_plan(config, weight_format)
        assert repr(weight_format.name) in problem and "dense" in problem


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BloomConfig(), "model_type is 'bloom'"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (
            LlamaConfig(
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            ),
            "rope_type is 'dynamic'",
        ),
    ],
)
def test_models_that_gguf_cannot_describe(config, words):
    (problem,) = check_gguf_plan(config, IntGroupFormat())
    assert words in problem and "--to hf" in problem


def test_other_formats_go_dense_only_when_asked(make_llama, tokenizer, tokens, tmp_path):
    model = make_llama(CodebookFormat("nf4"))
    path = tmp_path / "model.gguf"
    assert len(check_gguf(model, tokenizer)) == 14
    with pytest.raises(GraftError, match=r"14 problems[\s\S]*layers.1.mlp.down_proj: format 'nf4'"):
        export_gguf(model, tokenizer, path, unquantised="F32", name="tiny")
    assert list(tmp_path.iterdir()) == []
    assert check_gguf(model, tokenizer, dense=True) == []
    report = export_gguf(model, tokenizer, path, unquantised="F32", name="tiny", dense=True)
    assert len(report.dense_layers) == 14 and report.max_rounding == 0.0
    with torch.no_grad():
        torch.testing.assert_close(load_gguf_model(path)(tokens).logits, model(tokens).logits)


def test_adapters_must_be_merged_first(make_llama, tokenizer):
    model = make_llama(IntGroupFormat())
    layer = "model.layers.1.mlp.up_proj"
    attach_adapter(model, [layer], AdapterConfig(method="qalora"))
    (problem,) = check_gguf(model, tokenizer)
    assert layer in problem and "merge first" in problem


def test_modules_without_a_place(make_llama, tokenizer):
    model = make_llama(IntGroupFormat())
    model.model.layers[0].mlp.extra = nn.Linear(4, 4)
    (problem,) = check_gguf(model, tokenizer)
    assert "model.layers.0.mlp.extra" in problem


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [(1e6, "F16", "does not fit F16"), (math.nan, "F32", "not finite")],
)
def test_weights_that_cannot_be_written(value, kind, words, make_llama, tokenizer, tmp_path):
    model = make_llama(IntGroupFormat())
    model.lm_head.weight[3, 5] = value
    with pytest.raises(GraftError, match=rf"output.weight.*{words}"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf", unquantised=kind, name="tiny")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_after_a_failure(make_llama, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"an older file")
    model = make_llama(IntGroupFormat())

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", full_disk)
        with pytest.raises(GraftError, match="No space left on device"):
            export_gguf(model, tokenizer, path, unquantised="F32", name="tiny")

    def interrupted(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(model, tokenizer, path, unquantised="F32", name="tiny", on_tensor=interrupted)
    assert [found.name for found in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_bytes() == b"an older file"


def test_the_place_cannot_be_written(make_llama, tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GraftError, match="cannot be written.*--out"):
        export_gguf(
            make_llama(), tokenizer, tmp_path / "file" / "m.gguf", unquantised="F32", name="tiny"
        )


def test_progress(make_llama, tokenizer, tmp_path):
    path: Path = tmp_path / "new" / "model.gguf"
    calls = []
    report = export_gguf(
        make_llama(IntGroupFormat()),
        tokenizer,
        path,
        unquantised="F32",
        name="tiny",
        on_tensor=lambda *call: calls.append(call),
    )
    total = sum(report.tensors.values())
    assert [call[:2] for call in calls] == [(done, total) for done in range(1, total + 1)]
    assert calls[0][2] == "token_embd.weight"
