"""GGUF files as llama.cpp's converter and quantiser write them, one architecture each."""

from __future__ import annotations

import re

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_written import CONFIGS, SCALES, SIZES, Written, rotated
from transformers import LlamaConfig

import graft
from graft.adapters.attach import frozen_layers
from graft.convert.config import ConvertConfig
from graft.errors import GraftError


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
    words = r"14 weights are Q5_0 \(model.layers.0.self_attn.q_proj ...\), .* add --dequantise"
    with pytest.raises(GraftError, match=words):
        graft.convert_model(written.path, tmp_path / "out", tokenizer=tiny_base)
    assert not (tmp_path / "out").exists()


SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
WIDE = LlamaConfig(**SIZES | SMALL)
ASKED = ConvertConfig(dequantise=True)


@pytest.mark.parametrize("kind", [*SCALES, Kind.Q5_0, Kind.Q5_1], ids=lambda kind: kind.name)
def test_every_other_type_comes_in_as_floats(kind, tiny_base, tmp_path, logits):
    written = Written(tmp_path / "m.gguf", WIDE, kind)
    report = graft.convert_model(written.path, tmp_path / "out", tokenizer=tiny_base, config=ASKED)
    held = {Kind.Q1_0, Kind.TQ1_0, Kind.TQ2_0}
    assert report.dense == {"int, 2 bits, groups of 128" if kind in held else kind.name: 7}
    assert f"tensors of the file by type: 7 {kind.name}, 5 F32" in report.notes
    model, _ = graft.load(tmp_path / "out", dtype="float32")
    for name, tensor in written.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not (tmp_path / "out" / "graft.json").exists()


@pytest.mark.parametrize("kind", [Kind.Q1_0, Kind.TQ1_0, Kind.TQ2_0], ids=lambda kind: kind.name)
def test_two_and_three_values_are_held_in_two_bits(kind, check, tmp_path):
    check(Written(tmp_path / "m.gguf", WIDE, kind), {"int, 2 bits, groups of 128": 7})


def mixture(name):
    """Q4_K_M: some tensors in a wider type than the others."""
    wide = "attn_v" in name or "ffn_down" in name or name in ("output.weight", "token_embd.weight")
    return Kind.Q6_K if wide else None


def test_a_mixture_of_types_is_told_type_by_type(tiny_base, tmp_path, logits):
    written = Written(tmp_path / "m.gguf", WIDE, Kind.Q4_K, kinds=mixture)
    with pytest.raises(GraftError) as caught:
        graft.convert_model(written.path, tmp_path / "out", tokenizer=tiny_base)
    assert "5 weights are Q4_K" in str(caught.value) and "2 weights are Q6_K" in str(caught.value)
    report = graft.convert_model(written.path, tmp_path / "out", tokenizer=tiny_base, config=ASKED)
    assert report.dense == {"Q4_K": 5, "Q6_K": 2}
    assert report.dequantised == ("model.embed_tokens", "lm_head")
    model, _ = graft.load(tmp_path / "out", dtype="float32")
    assert torch.equal(logits(model), logits(written.model))


def test_what_is_held_exactly_beside_what_is_not(tiny_base, tmp_path, logits):
    """As llama.cpp writes Q4_0: some layers in Q4_1, the head in Q6_K."""
    kinds = {"output.weight": Kind.Q6_K, "blk.0.ffn_down.weight": Kind.Q4_1}
    written = Written(tmp_path / "m.gguf", WIDE, Kind.Q4_0, kinds=kinds.get)
    report = graft.convert_model(written.path, tmp_path / "out", tokenizer=tiny_base)
    assert report.layers == {"int, 4 bits, groups of 32": 7} and report.dense == {}
    assert report.notes == ("tensors of the file by type: 6 Q4_0, 4 F32, 1 Q4_1, 1 Q6_K",)
    model, _ = graft.load(tmp_path / "out", dtype="float32")
    difference = (logits(model) - logits(written.model)).abs().max()
    assert difference <= 1e-5 * logits(written.model).abs().max()


def test_types_that_nobody_reads_are_refused(tiny_base, tmp_path):
    def integers(_, tensors):
        tensors["blk.0.attn_v.weight"] = (np.ones((32, 64), np.int32), Kind.I32)

    written = Written(tmp_path / "m.gguf", CONFIGS["llama"], change=integers)
    with pytest.raises(GraftError, match=r"1 tensors are I32 \('blk.0.attn_v.weight' ...\), which"):
        graft.convert_model(written.path, tmp_path / "out", tokenizer=tiny_base, config=ASKED)


@pytest.mark.parametrize(
    ("number", "words"),
    [(31, "has type 31: Q4_0_4_4, which llama.cpp reads no more"), (250, "has type 250: unknown")],
)
def test_types_that_gguf_does_not_know(number, words, tiny_base, tmp_path):
    written = Written(tmp_path / "m.gguf", CONFIGS["llama"])
    data = written.path.read_bytes()
    name = b"blk.0.attn_v.weight"
    at = data.index(name) + len(name) + 4 + 16  # behind the number of axes and their sizes
    written.path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(GraftError, match=words):
        graft.convert_model(written.path, tmp_path / "out", tokenizer=tiny_base)


def some_biases(_, tensors):
    rng = np.random.default_rng(0)
    for layer, rows in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32)):
        values = rng.standard_normal(rows).astype(np.float32)
        tensors[f"blk.1.{layer}.bias"] = (values, Kind.F32)


def test_biases_that_some_layers_have(tiny_base, tmp_path):
    """llama.cpp's Llama takes each bias that is there; in Transformers all or none have one."""
    written = Written(tmp_path / "m.gguf", CONFIGS["llama"], change=some_biases)
    report = graft.convert_model(written.path, tmp_path / "out", tokenizer=tiny_base)
    assert report.notes[1].startswith("5 layers that have no bias in the file got one of zeros")
    model, _ = graft.load(tmp_path / "out", dtype="float32")
    tensors = {}
    some_biases(None, tensors)
    first, second = (layer.self_attn for layer in model.model.layers)
    assert not first.q_proj.bias.any() and not second.o_proj.bias.any()
    stored = tensors["blk.1.attn_q.bias"][0]
    assert torch.equal(
        torch.from_numpy(rotated(second.q_proj.bias.detach().numpy(), 4)), torch.from_numpy(stored)
    )


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
    tensors["rope_freqs.weight"] = (np.arange(9, dtype=np.float32), Kind.F32)


def longrope(writer, _):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)


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
        (other_factors, "rope_freqs.weight is [9]; expected 8 positive numbers"),
        (longrope, "rope scaling is 'longrope'"),
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
