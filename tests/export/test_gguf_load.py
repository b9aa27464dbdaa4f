from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch

from graft.errors import GraftError
from graft.export.gguf.write import export_gguf
from graft.formats.int_group import IntGroupFormat
from graft.layers.frozen import FrozenLinear
from graft.model.gguf.file import read_gguf
from graft.model.gguf.load import load_gguf_model


@pytest.fixture
def exported(make_llama, tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    model = make_llama(IntGroupFormat(), num_hidden_layers=1)
    export_gguf(model, tokenizer, path, unquantised="F16", name="tiny")
    return model, path


def rewrite(path, *, metadata=None, tensors=None, architecture="llama"):
    """Write the file again with metadata or tensors replaced, or (None) left out."""
    file = read_gguf(path)
    writer = gguf.GGUFWriter(path.with_name("changed.gguf"), architecture)
    values = {
        key: value
        for key, value in file.metadata.items()
        if key.startswith(("llama.", "tokenizer.ggml.bos", "graft."))
    }
    for key, value in (values | (metadata or {})).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, tensor in file.tensors.items():
        data = (tensors or {}).get(name, np.array(tensor.data))
        if data is not None:
            raw = tensor.type if data.dtype == np.uint8 else None
            writer.add_tensor(name, data, raw_dtype=raw)
    for name in (tensors or {}).keys() - file.tensors.keys():
        writer.add_tensor(name, tensors[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("changed.gguf")


def test_packed_tensors_come_back(exported):
    model, path = exported
    back = load_gguf_model(path)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear)}
    assert len(layers) == 7
    for name, layer in layers.items():
        found = back.get_submodule(name)
        assert found.weight_format == IntGroupFormat(4, 32)
        for key, tensor in layer.packed.items():
            assert torch.equal(found.packed[key], tensor), (name, key)
    assert back.config.bos_token_id == 0 and back.config.eos_token_id == 1


def test_an_unchanged_rewrite_loads(exported, tokens):
    model, path = exported
    with torch.no_grad():
        expected = load_gguf_model(path)(tokens).logits
        assert torch.equal(load_gguf_model(rewrite(path))(tokens).logits, expected)


def test_a_truncated_file_is_refused_wherever_it_ends(exported):
    _, path = exported
    data = path.read_bytes()
    first_tensor = gguf.GGUFReader(path).data_offset
    ends = [0, 3, 4, 7, 12, 23, 24, 30, 60, *range(100, first_tensor, 997), len(data) - 40]
    for end in ends:
        path.write_bytes(data[:end])
        with pytest.raises(GraftError, match=r"model\.gguf: not a complete GGUF file"):
            load_gguf_model(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(GraftError, match="no such file"):
        read_gguf(tmp_path / "absent.gguf")
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(2000))
    with pytest.raises(GraftError, match="not a complete GGUF file"):
        read_gguf(path)


def with_array(data: bytes, kind: int, count: int, inside: bytes) -> bytes:
    """Return a file with one more value in its metadata, an array."""
    key = struct.pack("<Q", 5) + b"array" + struct.pack("<IIQ", 9, kind, count)
    (pairs,) = struct.unpack_from("<Q", data, 16)
    return data[:16] + struct.pack("<Q", pairs + 1) + key + inside + data[24:]


def test_arrays_are_passed_over_at_once(exported):
    _, path = exported
    found, data = read_gguf(path), path.read_bytes()
    other = path.with_name("array.gguf")
    other.write_bytes(with_array(data, 0, 32_000_003, bytes(32_000_003)))
    read = read_gguf(other)
    array = read.metadata["array"]
    assert (array.count, array.data.nbytes) == (32_000_003, 32_000_003)
    assert read.metadata.keys() - {"array"} == found.metadata.keys()
    assert all(torch.equal(read.tensors[n].bytes(), found.tensors[n].bytes()) for n in read.tensors)


@pytest.mark.parametrize(
    ("kind", "count", "inside", "words"),
    [
        (0, 2**63, b"", "it ends before byte"),
        (8, 2**63, bytes(8 * 30_000), "more than 20,000 values; at most 20,000 are taken"),
        (9, 1, bytes(12), "an array holds arrays"),
        (99, 1, b"", "99 is not a valid GGUFValueType"),
    ],
)
def test_arrays_that_are_none(kind, count, inside, words, exported, monkeypatch):
    _, path = exported
    path.write_bytes(with_array(path.read_bytes(), kind, count, inside))
    monkeypatch.setattr("graft.model.gguf.header.VALUES", 20_000)
    with pytest.raises(GraftError, match=words):
        read_gguf(path)


def test_damaged_header_bytes_never_escape_as_other_errors(exported):
    _, path = exported
    data = bytearray(path.read_bytes())
    header = gguf.GGUFReader(path).data_offset
    loaded = 0
    for position in range(4, header, 211):
        damaged = data.copy()
        damaged[position] ^= 0xA5
        path.write_bytes(damaged)
        try:
            load_gguf_model(path)
        except GraftError as error:
            assert "model.gguf" in str(error)
        else:
            loaded += 1  # a byte of a token's text, for example
    assert loaded > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "qwen2"}, "architecture is 'qwen2'"),
        ({"metadata": {"llama.block_count": None}}, "llama.block_count is None"),
        ({"metadata": {"llama.block_count": 7}}, "says 7 blocks, the tensors make 1"),
        ({"metadata": {"llama.attention.head_count": 0}}, "num_attention_heads is 0"),
        ({"metadata": {"llama.attention.head_count": 5}}, "gguf is not understood"),
        ({"metadata": {"llama.vocab_size": "many"}}, "vocab_size is 'many'; expected int"),
        (
            {"metadata": {"llama.embedding_length": 32}},
            r"token_embd.weight is \[320, 64\]; expected \[320, 32\]",
        ),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "rope scaling is 'longrope'"),
        ({"metadata": {"llama.attention.clamp_kqv": 1.0}}, "clamp_kqv is 1.0; graft computes"),
        ({"metadata": {"graft.rope_parameters": "{"}}, "rope_parameters that are not understood"),
        ({"tensors": {"blk.0.attn_v.weight": None}}, "attn_v.weight is missing"),
        ({"tensors": {"rope_freqs.weight": np.full(8, -3, "f4")}}, "8 positive numbers"),
        ({"tensors": {"blk.0.extra.weight": np.ones(8, "f4")}}, "has no place in a Llama"),
        (
            {"tensors": {"blk.0.attn_v.weight": np.ones((32, 64), "i4")}},
            "attn_v.weight is I32; graft reads F32, F16, BF16, Q4_1",
        ),
    ],
)
def test_files_that_do_not_describe_a_llama(change, words, exported):
    _, path = exported
    with pytest.raises(GraftError, match=words):
        load_gguf_model(rewrite(path, **change))


def test_rotary_factors_must_follow_from_the_parameters(make_llama, tokenizer, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    path = tmp_path / "model.gguf"
    model = make_llama(IntGroupFormat(), rope_parameters=rope)
    export_gguf(model, tokenizer, path, unquantised="F32", name="tiny")
    assert load_gguf_model(path).config.rope_parameters == rope
    changed = rewrite(path, tensors={"rope_freqs.weight": np.ones(8, "f4")})
    with pytest.raises(GraftError, match=r"does not follow from graft\.rope_parameters"):
        load_gguf_model(changed)
