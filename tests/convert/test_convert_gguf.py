"""GGUF files as llama.cpp's converter and quantiser write them, one architecture each."""

from __future__ import annotations

import re

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

import graft
from graft.adapters.attach import frozen_layers
from graft.errors import GraftError

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied llama": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LINEAR),
    "llama 3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma": GemmaConfig(**SIZES, head_dim=16, hidden_activation="gelu_pytorch_tanh"),
}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
}


def rotated(rows, heads: int):
    """What llama.cpp's converter does to the query and key projections of a Llama."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(rope):
    """What llama.cpp's converter makes of Llama 3's settings, for heads of 16."""
    factors = []
    for place in range(0, 16, 2):
        turns = rope["original_max_position_embeddings"] / (
            2 * np.pi * rope["rope_theta"] ** (place / 16)
        )
        smooth = (turns - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


class Written:
    """A GGUF file and the model whose weights it stands for."""

    def __init__(self, path, config, linear=Kind.Q4_0, other=Kind.F32, change=None):
        torch.manual_seed(0)
        self.path, self.config = path, config
        self.model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in self.model.parameters():  # norms of 1 would hide mistakes
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter.data, 1.0, 0.2)
        name = config.model_type
        self.writer = gguf.GGUFWriter(path, name)
        names = gguf.get_tensor_name_map(ARCHITECTURES[name], 2)
        tensors = {}
        for key, parameter in self.model.state_dict().items():
            if key == "lm_head.weight" and config.tie_word_embeddings:
                continue
            module = key.rpartition(".")[0]
            target = f"{names.get_name(module)}.{key.rpartition('.')[2]}"
            quantised = parameter.dim() == 2
            kind = Kind.F32
            if quantised:
                kind = linear if module.endswith("_proj") else other
            tensors[target] = self.block(key, parameter, kind)
        if config.rope_parameters["rope_type"] == "llama3":
            tensors["rope_freqs.weight"] = (llama3_factors(config.rope_parameters), Kind.F32)
        if change is not None:
            change(self.writer, tensors)
        for target, (data, kind) in tensors.items():
            raw = None if data.dtype == np.float32 else kind
            self.writer.add_tensor(target, data, raw_dtype=raw)
        self.metadata(name)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()

    def block(self, key, parameter, kind):
        """Return the data as the file has it; the model gets what they mean, float64 loops."""
        values = parameter.detach().numpy()
        heads = None
        if self.config.model_type == "llama":
            heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
        stored = values if heads is None else rotated(values, heads)
        if self.config.model_type == "gemma" and key.split(".")[-2].endswith("norm"):
            stored = stored + 1
        if kind is Kind.F32:
            return stored.astype(np.float32), kind
        data = gguf.quants.quantize(stored, kind)
        if kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0):
            meant = np.array([blocks_of(row, kind) for row in data.view(np.uint8)])
        else:
            meant = gguf.quants.dequantize(data, kind)
        if heads is not None:
            back = np.argsort(rotated(np.arange(len(meant)), heads))
            meant = meant[back]
        parameter.data.copy_(torch.from_numpy(meant))
        return data, kind

    def metadata(self, name):
        writer, config = self.writer, self.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        if name in ("qwen3", "gemma"):
            writer.add_key_length(config.head_dim)
        if config.rope_parameters["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
        writer.add_uint32("tokenizer.ggml.eos_token_id", 0)


def blocks_of(row, kind) -> list[float]:
    """Return a row of blocks as numbers, from ggml's description of the block."""
    size = {Kind.Q4_0: 18, Kind.Q4_1: 20, Kind.Q8_0: 34}[kind]
    values = []
    for start in range(0, len(row), size):
        block = row[start : start + size]
        d = float(block[:2].view(np.float16)[0])
        if kind is Kind.Q8_0:
            values += [d * int(code) for code in block[2:].view(np.int8)]
            continue
        low = float(block[2:4].view(np.float16)[0]) if kind is Kind.Q4_1 else -8 * d
        nibbles = [int(byte) for byte in block[size - 16 :]]
        values += [d * (byte & 15) + low for byte in nibbles]
        values += [d * (byte >> 4) + low for byte in nibbles]
    return values


@pytest.fixture
def check(tiny_base, tmp_path, logits):
    def run(written, layers):
        report = graft.convert_model(written.path, tmp_path / "out", tokenizer=tiny_base)
        assert report.kind == "GGUF" and report.rounding == 0.0
        assert report.layers == layers
        model, _ = graft.load(tmp_path / "out", dtype="float32")
        expected = written.model.state_dict()
        for name, layer in frozen_layers(model):
            assert torch.equal(layer.dense_weight(torch.float32), expected[f"{name}.weight"]), name
        for name, found in model.state_dict().items():
            if name in expected and "norm" not in name:
                assert torch.equal(found, expected[name]), name
        difference = (logits(model) - logits(written.model)).abs().max()
        assert difference <= 1e-5 * logits(written.model).abs().max()
        return report, model

    return run


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name, check, tmp_path):
    _, model = check(Written(tmp_path / "m.gguf", CONFIGS[name]), {"int, 4 bits, groups of 32": 14})
    assert model.config.eos_token_id == 0
    assert model.config.rope_parameters == CONFIGS[name].rope_parameters


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q4_1, 4), (Kind.Q8_0, 8)])
def test_every_type(kind, bits, check, tmp_path):
    written = Written(tmp_path / "m.gguf", CONFIGS["llama"], kind)
    check(written, {f"int, {bits} bits, groups of 32": 14})


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_0, Kind.F16, Kind.BF16])
def test_embeddings_and_head_of_any_type(kind, check, tmp_path):
    written = Written(tmp_path / "m.gguf", CONFIGS["llama"], other=kind)
    report, _ = check(written, {"int, 4 bits, groups of 32": 14})
    quantised = () if kind in (Kind.F16, Kind.BF16) else ("model.embed_tokens", "lm_head")
    assert report.dequantised == quantised


def test_unquantised_layers_stay_so(check, tmp_path):
    check(Written(tmp_path / "m.gguf", CONFIGS["llama"], Kind.F16), {})
    assert not (tmp_path / "out" / "graft.json").exists()


def test_negative_scales_train_and_merge_exactly(tiny_base, rows, tmp_path, logits):
    """Q4_0 has a negative scale where a block's largest weight is positive."""
    written = Written(tmp_path / "m.gguf", CONFIGS["llama"])
    graft.convert_model(written.path, tmp_path / "base", tokenizer=tiny_base)
    config = graft.TrainConfig(
        model=str(tmp_path / "base"),
        data=str(rows),
        max_length=48,
        steps=3,
        batch_size=4,
        learning_rate=1e-2,
        export=("gguf",),
        out=str(tmp_path / "run"),
    )
    before, _ = graft.load(tmp_path / "base")
    assert any(bool((layer.packed["scales"] < 0).any()) for _, layer in frozen_layers(before))
    graft.finetune(config)
    assert graft.merge(tmp_path / "run", tmp_path / "merged").exact
    trained, merged = (logits(graft.load(tmp_path / name)[0]) for name in ("run", "merged"))
    assert torch.equal(trained, merged)
    exported, _ = graft.load(tmp_path / "run/export/model.gguf", tokenizer=str(tiny_base))
    assert torch.equal(logits(exported), merged)
    assert not torch.equal(logits(before), merged)


def test_a_file_of_our_own_comes_back(tiny_base, tmp_path, logits):
    config = graft.QuantizeConfig(model=str(tiny_base), format="int", out=str(tmp_path / "base"))
    from graft.api.quantize import quantize

    quantize(config)
    graft.export_model(tmp_path / "base", "gguf", tmp_path / "m.gguf")
    graft.convert_model(tmp_path / "m.gguf", tmp_path / "out", tokenizer=tmp_path / "base")
    before, after = (graft.load(tmp_path / name)[0] for name in ("base", "out"))
    assert torch.equal(logits(before), logits(after))


def test_types_without_a_format_are_refused_by_name(tiny_base, tmp_path):
    written = Written(tmp_path / "m.gguf", CONFIGS["llama"], Kind.Q5_0)
    with pytest.raises(GraftError, match=r"14 tensors are Q5_0 \(blk.0.attn_q.weight ...\)"):
        graft.convert_model(written.path, tmp_path / "out", tokenizer=tiny_base)
    assert not (tmp_path / "out").exists()


def missing(_, tensors):
    del tensors["blk.1.attn_v.weight"]


def strange(_, tensors):
    tensors["blk.0.ffn_gate_exps.weight"] = (np.ones((2, 64), np.float32), Kind.F32)


def misshapen(_, tensors):
    tensors["blk.0.attn_v.weight"] = (np.ones((3, 64), np.float32), Kind.F32)


def misshapen_blocks(_, tensors):
    blocks = gguf.quants.quantize(np.ones((3, 64), np.float32), Kind.Q4_0)
    tensors["blk.0.attn_v.weight"] = (blocks, Kind.Q4_0)


def other_factors(_, tensors):
    tensors["rope_freqs.weight"] = (np.arange(1, 9, dtype=np.float32), Kind.F32)


def yarn(writer, _):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


def infinite(_, tensors):
    data = tensors["blk.0.attn_v.weight"][0].copy()
    data[0, :2] = np.frombuffer(np.float16(60000).tobytes(), np.uint8)
    tensors["blk.0.attn_v.weight"] = (data, Kind.Q4_0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (missing, "tensor model.layers.1.self_attn.v_proj.weight is missing"),
        (strange, "1 tensors have no place in a llama ('blk.0.ffn_gate_exps.weight'"),
        (misshapen, "v_proj.weight has shape [3, 64]; config.json makes it [32, 64]"),
        (misshapen_blocks, "tensor blk.0.attn_v.weight is [3, 64]; the metadata make it [32, 64]"),
        (other_factors, "rotary factors that are not those of Llama 3.1"),
        (yarn, "rope scaling is 'yarn'"),
        (infinite, "v_proj: its scales or offsets are not finite in float16"),
    ],
)
def test_what_does_not_fit_is_refused(change, words, tiny_base, tmp_path):
    written = Written(tmp_path / "m.gguf", CONFIGS["llama"], change=change)
    with pytest.raises(GraftError, match=re.escape(words)):
        graft.convert_model(written.path, tmp_path / "out", tokenizer=tiny_base)
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused(tiny_base, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GraftError, match="architecture is 'mamba'; graft reads GGUF files of"):
        graft.convert_model(tmp_path / "m.gguf", tmp_path / "out", tokenizer=tiny_base)


def test_the_tokenizer_is_asked_for(tmp_path):
    written = Written(tmp_path / "m.gguf", CONFIGS["llama"])
    with pytest.raises(GraftError, match="--tokenizer"):
        graft.convert_model(written.path, tmp_path / "out")
