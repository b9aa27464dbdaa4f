"""Metadata of GGUF files: what is read, with llama.cpp's defaults, and what is refused by name."""

from __future__ import annotations

import json
import re

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType as Value
from gguf_written import CONFIGS, LINEAR, LLAMA3, Written, llama3_factors, rewritten

import graft
from graft.convert.config import ConvertConfig
from graft.convert.readers.gguf_source import gguf_source
from graft.errors import GraftError

INT, FLOAT, TEXT, BOOL = Value.UINT32, Value.FLOAT32, Value.STRING, Value.BOOL
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return Written(tmp_path_factory.mktemp("gguf") / "m.gguf", CONFIGS["llama"])


@pytest.fixture
def source_of(written, tmp_path):
    def read(add=(), drop=(), **rest):
        return gguf_source(
            rewritten(written.path, tmp_path / "changed.gguf", add=add, drop=drop, **rest)
        )

    return read


SCALED = LINEAR | {"factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, DEFAULT),
        ({"scale_linear": (4.0, FLOAT)}, SCALED),
        ({"scaling.factor": (4.0, FLOAT)}, SCALED),
        ({"scaling.factor": (4.0, FLOAT), "scale_linear": (2.0, FLOAT)}, SCALED),
        ({"scaling.type": ("linear", TEXT), "scaling.factor": (4.0, FLOAT)}, SCALED),
        ({"scaling.type": ("none", TEXT), "scaling.factor": (4.0, FLOAT)}, DEFAULT),
        ({"scaling.type": ("linear", TEXT)}, DEFAULT),
        ({"scaling.type": ("yarn", TEXT)}, DEFAULT),
        (
            {
                "scaling.type": ("yarn", TEXT),
                "scaling.factor": (4.0, FLOAT),
                "scaling.original_context_length": (16, INT),
                "scaling.finetuned": (True, BOOL),
                "scaling.yarn_beta_fast": (32.0, FLOAT),
            },
            YARN,
        ),
        (
            {"scaling.type": ("yarn", TEXT), "scaling.factor": (4.0, FLOAT)},
            YARN | {"original_max_position_embeddings": 64},
        ),
        (
            {"scaling.type": ("yarn", TEXT), "scaling.attn_factor": (2.0, FLOAT)},
            YARN | {"factor": 1.0, "original_max_position_embeddings": 64, "attention_factor": 2.0},
        ),
    ],
)
def test_rotary_keys_old_and_new(keys, rope, source_of):
    add = [(f"llama.rope.{name}", *value) for name, value in keys.items()]
    assert source_of(add).model.config.rope_parameters == rope


def test_what_older_files_leave_out_is_as_llama_cpp_takes_it(source_of):
    add = [
        ("llama.tensor_data_layout", "Meta AI original pth", TEXT),
        ("general.quantization_version", 2, INT),
        ("llama.feed_forward_length", [96, 96], Value.ARRAY, INT),
        ("llama.attention.head_count", [4, 4], Value.ARRAY, Value.INT32),
    ]
    config = source_of(add, drop=("llama.rope.freq_base",)).model.config
    assert config.rope_parameters == DEFAULT
    assert (config.vocab_size, config.head_dim, config.intermediate_size) == (320, 16, 96)


def test_keys_that_say_that_a_feature_is_off(source_of, written):
    add = [
        ("llama.attention.causal", True, BOOL),
        ("llama.expert_count", 0, INT),
        ("llama.expert_used_count", 0, INT),
        ("llama.attention.sliding_window", 64, INT),
        ("llama.attention.scale", 0.25, FLOAT),
        ("llama.logit_scale", 1.0, FLOAT),
        ("llama.attention.key_length", 16, INT),
        ("llama.attention.value_length", 16, INT),
        ("llama.rope.dimension_count", 16, INT),
        ("llama.vocab_size", 320, INT),
        ("general.base_model.count", 1, INT),
        ("general.type", "model", TEXT),
        ("quantize.imatrix.file", "some.dat", TEXT),
        ("mradermacher.quantized_by", "somebody", TEXT),
    ]
    assert source_of(add).notes[1:] == [
        "metadata that llama.cpp does not read were left out: mradermacher.quantized_by"
    ]


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("attention.causal", False, BOOL),
        ("attention.clamp_kqv", 8.0, FLOAT),
        ("attention.scale", 0.5, FLOAT),
        ("attention.sliding_window", 8, INT),
        ("attention.max_alibi_bias", 8.0, FLOAT),
        ("attn_logit_softcapping", 50.0, FLOAT),
        ("final_logit_softcapping", 30.0, FLOAT),
        ("logit_scale", 0.5, FLOAT),
        ("embedding_scale", 12.0, FLOAT),
        ("residual_scale", 0.2, FLOAT),
        ("expert_count", 8, INT),
        ("pooling_type", 3, INT),
        ("use_parallel_residual", True, BOOL),
        ("rope.dimension_count", 8, INT),
        ("attention.value_length", 8, INT),
        ("rope.scaling.attn_factor", 1.2, FLOAT),
        ("rope.scaling.yarn_ext_factor", 1.0, FLOAT),
        ("rope.scaling.yarn_log_multiplier", 0.1, FLOAT),
        ("rope.freq_base_swa", 1e4, FLOAT),
        ("tensor_data_layout", "shuffled", TEXT),
        ("something_new", 1, INT),
    ],
)
def test_a_key_that_changes_the_result_is_an_error_that_names_it(name, value, kind, source_of):
    with pytest.raises(GraftError, match=re.escape(f"metadata llama.{name}")):
        source_of([(f"llama.{name}", value, kind)])


@pytest.mark.parametrize(
    ("add", "words"),
    [
        ([("llama.rope.scaling.type", "longrope", TEXT)], "rope scaling is 'longrope'"),
        (
            [
                ("llama.rope.scaling.type", "yarn", TEXT),
                ("llama.rope.scaling.factor", 4.0, FLOAT),
                ("llama.rope.scaling.yarn_beta_fast", 8.0, FLOAT),
            ],
            "yarn_beta_fast is 8; graft computes only what -1 or 32 stands for",
        ),
        ([("llama.rope.scaling.factor", -2.0, FLOAT)], "the factor of rope scaling is -2"),
        ([("llama.rope.freq_base", float("nan"), FLOAT)], "freq_base is nan; expected a finite"),
        ([("llama.rope.freq_base", -5.0, FLOAT)], "freq_base is -5; expected at least 1e-06"),
        (
            [("llama.attention.layer_norm_rms_epsilon", -1.0, FLOAT)],
            "layer_norm_rms_epsilon is -1; expected at least 0",
        ),
        (
            [("llama.feed_forward_length", [96, 64], Value.ARRAY, INT)],
            "feed_forward_length differs from layer to layer (64, 96)",
        ),
        ([("llama.block_count", 3, INT)], "3 blocks, the tensors make 2 (missing: blk.2)"),
        (
            [("tokenizer.ggml.tokens", ["a", "b"], Value.ARRAY, TEXT)],
            "tokenizer.ggml.tokens has 2 tokens, and the model 320 embeddings",
        ),
        ([("general.type", "adapter", TEXT)], "general.type is 'adapter', a LoRA adapter without"),
        ([("general.type", "mmproj", TEXT)], "general.type is 'mmproj', the image or audio part"),
        ([("adapter.lora.alpha", 16.0, FLOAT)], "adapter.lora.alpha belongs to another kind"),
        ([("clip.has_vision_encoder", True, BOOL)], "clip.has_vision_encoder belongs to another"),
    ],
)
def test_what_else_is_no_model_that_graft_computes(add, words, source_of):
    with pytest.raises(GraftError, match=re.escape(words)):
        source_of(add)


def test_a_special_id_beyond_the_tokens_is_none(source_of):
    config = source_of([("tokenizer.ggml.padding_token_id", 2**32 - 1, INT)]).model.config
    assert config.pad_token_id is None and config.eos_token_id == 0


def frequencies(model):
    return type(model.model.rotary_emb)(model.config).inv_freq


def test_factors_that_no_settings_of_llama_3_make(tiny_base, tmp_path):
    """llama.cpp divides each frequency by its factor, whatever made them."""
    factors = np.linspace(1, 3, 8, dtype=np.float32)

    def change(_, tensors):
        tensors["rope_freqs.weight"] = (factors, gguf.GGMLQuantizationType.F32)

    written = Written(tmp_path / "m.gguf", CONFIGS["llama"], change=change)
    graft.convert_model(written.path, tmp_path / "out", tokenizer=tiny_base)
    model, _ = graft.load(tmp_path / "out")
    plain = frequencies(written.model)
    torch.testing.assert_close(frequencies(model), plain / torch.from_numpy(factors))
    assert model.model.rotary_emb.attention_scaling == 1.0
    scaled = rewritten(
        written.path, tmp_path / "s.gguf", add=[("llama.rope.scaling.factor", 2.0, FLOAT)]
    )
    with pytest.raises(GraftError, match=r"both rope_freqs.weight and a rope scaling of 2"):
        gguf_source(scaled)


@pytest.mark.parametrize("lie", [{"factor": 8.0}, {"rope_theta": 1e4}, {"rope_type": "linear"}])
def test_what_a_file_says_of_its_factors_is_checked(lie, tiny_base, tmp_path):
    def change(writer, tensors):
        writer.add_string("graft.rope_parameters", json.dumps(LLAMA3 | lie))

    written = Written(tmp_path / "m.gguf", CONFIGS["llama 3"], change=change)
    with pytest.raises(GraftError, match=r"does not follow from graft.rope_parameters"):
        gguf_source(written.path)


def test_factors_have_no_place_where_llama_cpp_does_not_read_them(tmp_path):
    def change(_, tensors):
        tensors["rope_freqs.weight"] = (llama3_factors(LLAMA3), gguf.GGMLQuantizationType.F32)

    written = Written(tmp_path / "m.gguf", CONFIGS["qwen2"], change=change)
    with pytest.raises(GraftError, match=r"no place in a qwen2 \('rope_freqs.weight'"):
        gguf_source(written.path)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ((1).to_bytes(4, "little"), "it has version 1; expected 2 or 3"),
        ((3).to_bytes(4, "big"), "it is big-endian; expected little-endian"),
    ],
)
def test_other_headers_are_refused(version, words, written, tmp_path):
    data = written.path.read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:4] + version + data[8:])
    with pytest.raises(GraftError, match=words):
        gguf_source(tmp_path / "m.gguf")


def test_version_2_and_another_alignment_are_read(written, tiny_base, tmp_path):
    data = written.path.read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:4] + (2).to_bytes(4, "little") + data[8:])
    writer_file = rewritten(
        written.path, tmp_path / "wide.gguf", add=[("general.alignment", 256, INT)]
    )
    asked = ConvertConfig(dequantise=True)
    outs = []
    for number, file in enumerate((written.path, tmp_path / "m.gguf", writer_file)):
        outs.append(tmp_path / f"out{number}" / "model.safetensors")
        graft.convert_model(file, outs[-1].parent, tokenizer=tiny_base, config=asked)
    first, *others = (out.read_bytes() for out in outs)
    assert others == [first, first]
