"""GGUF files that llama.cpp quantised, cut or scaled compute the same once they are brought in.

llama.cpp rounds activations where weights are quantised, so it is given the same file with every
block as the floats that ggml itself makes of it, and both compute in float32.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value

import graft
from graft.convert.config import ConvertConfig
from graft.model.gguf.file import GgufTensor, read_gguf
from graft.model.gguf.tokenizer import make_tokenizer, pre_tokenizer
from graft.model.gguf.tokens import read_tokens
from graft.model.probe import probe_texts

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="needs llama-cpp-python: make test-peers installs it"
)
CLOSE = 2e-5
"""Of the largest logit."""


class Traits(ctypes.Structure):
    """What ggml says of a type, as far as its function to floats."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantised", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


@pytest.fixture(scope="module")
def ggml():
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(min(folder.glob("libggml-base.*"))))
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    return library


def floats(ggml, data, kind):
    """What ggml makes of a tensor's blocks."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.ascontiguousarray(data)
    found = np.zeros(data.nbytes // size * weights, np.float32)
    traits = ggml.ggml_get_type_traits(int(kind)).contents
    traits.to_float(data.ctypes.data, found.ctypes.data, found.size)
    return found.reshape(data.shape[0], -1)


PLAIN = ("F32", "F16", "F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K")


@pytest.mark.parametrize(
    "kind", [one for one in Kind if one.name not in PLAIN], ids=lambda kind: kind.name
)
def test_every_type_is_dequantised_as_ggml_does(kind, ggml):
    """Of random bytes, which make scales of every size, some of them no numbers."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (8, 2560 // weights * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        found = GgufTensor(kind, (8, 2560), blocks).dense().float().numpy()
    assert np.array_equal(found, floats(ggml, blocks, kind), equal_nan=True)


def rewritten(source, target, add=(), drop=(), change=None, **options):
    """Copy a file with other metadata, or tensors as `change` makes them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents(), **options)
    left = {key for key, *_ in add} | {"general.architecture", *drop}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in left:
            kind = field.types[0]
            part = field.types[-1] if kind is Value.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub_type=part)
    for key, value, kind in add:
        writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        data, kind = np.array(tensor.data), tensor.tensor_type
        data, kind = (data, kind) if change is None else change(tensor.name, data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture
def base(tiny_model, tiny_base, tmp_path):
    """Return a function to a model of that name as a folder and as a GGUF file in float32."""

    def make(name, **changes):
        folder, file = tmp_path / "base", tmp_path / "f32.gguf"
        tiny_model(name, vocab_size=320, initializer_range=0.1, **changes).save_pretrained(folder)
        for one in tiny_base.glob("*token*"):
            shutil.copy(one, folder)
        graft.export_model(folder, "gguf", file)
        return file

    return make


IDS = list(range(5, 105))


def their_logits(file):
    options = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    engine = llama_cpp.Llama(
        str(file),
        n_ctx=128,
        logits_all=True,
        flash_attn=False,
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
        **options,
    )
    try:
        engine.eval(IDS)
        return torch.from_numpy(np.array(engine.scores[: len(IDS)])).float()
    finally:
        engine.close()


def difference(file, reference, tmp_path):
    """Of the logits of what is brought in, as a share of the largest one."""
    asked = ConvertConfig(dequantise=True)
    report = graft.convert_model(file, tmp_path / "out", config=asked)
    model, _ = graft.load(tmp_path / "out", dtype="float32")
    with torch.no_grad():
        ours = model(torch.tensor([IDS])).logits[0]
    theirs = their_logits(reference)
    return float((ours - theirs).abs().max() / theirs.abs().max()), report


FTYPES = {
    "Q4_K_M": {"Q4_K", "Q6_K"},
    "Q2_K": {"Q2_K", "Q3_K"},
    "Q5_K_S": {"Q5_K"},
    "Q3_K_M": {"Q3_K", "Q4_K", "Q5_K"},
    "IQ4_XS": {"IQ4_XS"},
    "IQ3_S": {"IQ3_S"},
    "Q5_1": {"Q5_1"},
    "TQ2_0": set(),
    "Q4_0": set(),
}


WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.mark.parametrize(
    ("name", "ftype"), [("qwen3", "Q4_K_M"), *(("tied-llama", ftype) for ftype in FTYPES)]
)
def test_files_that_llama_cpp_quantised(name, ftype, base, ggml, tmp_path):
    source, file = base(name, **WIDE), tmp_path / "q.gguf"
    asked = llama_cpp.llama_model_quantize_default_params()
    asked.ftype, asked.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}"), 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), asked) == 0

    def change(_, data, kind):
        return (data, kind) if kind is Kind.F32 else (floats(ggml, data, kind), Kind.F32)

    found, report = difference(file, rewritten(file, tmp_path / "d.gguf", change=change), tmp_path)
    assert found <= CLOSE
    assert {kind for kind in report.dense if not kind.startswith("int")} == FTYPES[ftype]


@pytest.mark.parametrize("size", [3, 18])
def test_files_that_gguf_cut_into_parts(size, base, tmp_path):
    source = base("tied-llama")
    rewritten(source, tmp_path / "part.gguf", split_max_tensors=size)
    files = sorted(tmp_path.glob("part-*.gguf"))
    assert len(files) > 1
    found, _ = difference(files[-1], files[0], tmp_path)
    assert found <= CLOSE


FACTOR = ("rope.scaling.factor", 4.0, Value.FLOAT32)
YARN = ("rope.scaling.type", "yarn", Value.STRING)
SCALINGS = {
    "old": [("rope.scale_linear", 4.0, Value.FLOAT32)],
    "without a type": [FACTOR],
    "none": [("rope.scaling.type", "none", Value.STRING), FACTOR],
    "yarn": [YARN, FACTOR, ("rope.scaling.original_context_length", 32, Value.UINT32)],
    "yarn from the context": [YARN, FACTOR],
    "yarn without a factor": [YARN],
    "yarn with another scale": [YARN, FACTOR, ("rope.scaling.attn_factor", 1.5, Value.FLOAT32)],
    "yarn with a scale alone": [YARN, ("rope.scaling.attn_factor", 1.5, Value.FLOAT32)],
    "yarn of less than 1": [YARN, ("rope.scaling.factor", 0.5, Value.FLOAT32)],
    "linear of less than 1": [("rope.scaling.factor", 0.5, Value.FLOAT32)],
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ["tied-llama", "qwen3"])
def test_rotary_scalings(scaling, name, base, tmp_path):
    source = base(name)
    architecture = read_gguf(source).architecture
    add = [(f"{architecture}.{key}", *rest) for key, *rest in SCALINGS[scaling]]
    file = rewritten(source, tmp_path / "scaled.gguf", add=add)
    found, _ = difference(file, file, tmp_path)
    assert found <= CLOSE


def test_any_factors_of_the_frequencies(base, tmp_path):
    source = base("llama3-rope")
    factors = np.linspace(1, 5, 8).astype(np.float32)

    def change(name, data, kind):
        return (factors if name == "rope_freqs.weight" else data), kind

    # What graft says of the factors that it wrote holds no more.
    drop = ["graft.rope_parameters"]
    file = rewritten(source, tmp_path / "other.gguf", drop=drop, change=change)
    found, _ = difference(file, file, tmp_path)
    assert found <= CLOSE


NAMES = (
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling llama-bpe llama3 llama-v3 falcon3 "
    "falcon-h1 pixtral lfm2 dbrx smaug-bpe qwen2 deepseek-r1-qwen stablelm2 megrez smollm "
    "starcoder refact command-r codeshell minerva-7b exaone tekken gpt-4o llama4 deepseek-llm "
    "deepseek-coder deepseek-v3 falcon"
).split()


def test_every_pre_tokenizer_that_is_made_cuts_as_llama_cpp_does(base, tmp_path):
    source = base("tied-llama")
    for name in NAMES:
        assert pre_tokenizer(name) is not None, name
        add = [("tokenizer.ggml.pre", name, Value.STRING)]
        file = rewritten(source, tmp_path / "pre.gguf", add=add)
        assert cut_otherwise(file) == [], name
        file.unlink()


def cut_otherwise(file):
    tokenizer = make_tokenizer(read_tokens(read_gguf(file)), file)
    engine = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    try:
        return [
            text
            for text in (*probe_texts()[:200], "one<|end|>two</s> three")
            if engine.tokenize(text.encode(), add_bos=True, special=True)
            != tokenizer(text)["input_ids"]
        ]
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["babyllama-361-1m", "stories260k", "mixed-13m"])
def test_tokenizers_of_models_that_were_trained(name, shared_models, tmp_path):
    graft.export_model(shared_models / name, "gguf", tmp_path / "m.gguf")
    assert cut_otherwise(tmp_path / "m.gguf") == []


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_with_and_without_a_space_before_a_text(prefix, shared_models, tmp_path):
    graft.export_model(shared_models / "stories260k", "gguf", tmp_path / "m.gguf")
    add = [("tokenizer.ggml.add_space_prefix", prefix, Value.BOOL)]
    assert cut_otherwise(rewritten(tmp_path / "m.gguf", tmp_path / "p.gguf", add=add)) == []
