"""What bitsandbytes, mlx-lm and llama.cpp write themselves, brought in and compared with them."""

from __future__ import annotations

import ctypes
import json
import logging
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GemmaConfig,
    GraniteConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import graft
from graft.adapters.attach import frozen_layers
from graft.export.gguf.write import export_gguf
from graft.kernels.packed.planes import PLANES, unpack_codes
from graft.model.load import load_model

IDS = torch.arange(60).reshape(2, 30) + 5


def our_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.double()


# bitsandbytes -------------------------------------------------------------------------------------


def saved_by_bitsandbytes(base: Path, folder: Path, **options) -> torch.Tensor:
    """Quantise with Transformers and save; return the logits of that model."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: make test-peers installs it")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32
    )
    for file in base.glob("*token*"):
        folder.mkdir(exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(folder)
    # Otherwise its kernel for CPUs with AVX-512 takes the place, which rounds inputs to bfloat16.
    return our_logits(model.train() if "load_in_4bit" in options else model)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4_bit(kind, nested, base, tmp_path):
    theirs = saved_by_bitsandbytes(
        base,
        tmp_path / "theirs",
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
    )
    report = graft.convert_model(tmp_path / "theirs", tmp_path / "out")
    assert report.layers == {kind + ", double quantised" * nested: 14}
    ours = our_logits(graft.load(tmp_path / "out", dtype="float32")[0])
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{difference:.1e} of the largest logit")
    assert difference <= 1e-3
    assert not torch.equal(ours, our_logits(graft.load(base)[0]))


def test_bitsandbytes_8_bit(base, tmp_path):
    """LLM.int8 rounds its activations to 8 bits too, which graft does not, and says so."""
    theirs = saved_by_bitsandbytes(base, tmp_path / "theirs", load_in_8bit=True)
    report = graft.convert_model(tmp_path / "theirs", tmp_path / "out")
    assert report.layers == {"int8": 14}
    assert any("bitsandbytes rounds the inputs" in note for note in report.notes)
    ours = our_logits(graft.load(tmp_path / "out", dtype="float32")[0])
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    alike = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name in [name.removesuffix(".SCB") for name in stored if name.endswith(".SCB")]:
        weight = stored[f"{name}.weight"].float() * stored[f"{name}.SCB"][:, None] / 127
        alike.get_parameter(f"{name}.weight").data = weight
    unrounded = our_logits(alike)  # bitsandbytes' own weights, multiplied with inputs as they are
    assert (ours - unrounded).abs().max() <= 1e-5 * unrounded.abs().max()
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{difference:.1e} of the largest logit")
    assert difference <= 0.1


# MLX ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [
        (4, 64, "float16"),
        (4, 32, "bfloat16"),
        (2, 32, "float32"),
        (3, 64, "float16"),
        (8, 64, None),
    ],
)
def test_mlx(bits, group_size, dtype, base, tmp_path, capfd):
    mx = pytest.importorskip("mlx.core", reason="needs mlx: make test-peers installs it")
    mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm: make test-peers installs it")
    folder = tmp_path / "theirs"
    mlx_lm.convert(
        str(base),
        str(folder),
        quantize=True,
        q_bits=bits,
        q_group_size=group_size,
        dtype=dtype,
    )
    report = graft.convert_model(folder, tmp_path / "out")
    assert report.layers == {f"int, {bits} bits, groups of {group_size}": 14}
    assert report.dequantised == ("model.embed_tokens", "lm_head")
    weights = mx.load(str(folder / "model.safetensors"))
    options = {"group_size": group_size, "bits": bits}
    model, _ = graft.load(tmp_path / "out", dtype="float32")
    for name, layer in frozen_layers(model):
        ones, zeros = (make(weights[f"{name}.scales"].shape) for make in (mx.ones, mx.zeros))
        codes = mx.dequantize(weights[f"{name}.weight"], ones, zeros, **options)
        planes = [layer.packed[part] for part in ("codes", "codes_high") if part in layer.packed]
        assert len(planes) == len(PLANES[bits])
        found = unpack_codes(tuple(planes), bits, layer.in_features)
        assert torch.equal(found, torch.from_numpy(np.array(codes.astype(mx.float32))).byte())
        for ours, theirs in (("scales", "scales"), ("offsets", "biases")):
            stored = np.array(weights[f"{name}.{theirs}"].astype(mx.float32))
            expected = torch.from_numpy(stored)
            if dtype == "float16":
                assert torch.equal(layer.packed[ours].float(), expected)
            else:
                torch.testing.assert_close(
                    layer.packed[ours].float(), expected, rtol=2**-11, atol=1e-7
                )
    peer, _ = mlx_lm.load(str(folder))
    theirs = torch.from_numpy(np.array(peer(mx.array(IDS.numpy())).astype(mx.float32))).double()
    ours = our_logits(model)
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    print(f"{bits} bits, {dtype}: {difference:.1e}, rounding {report.rounding:.1e} of a step")
    # mlx-lm computes in the dtype of the file, and keeps float32 statistics.
    assert difference <= {"bfloat16": 0.1, "float16": 1e-2}.get(dtype, 1e-2)


MODELS = {
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "phi": PhiConfig,
    "phi3": Phi3Config,
    "granite": GraniteConfig,
    "smollm3": SmolLM3Config,
}


@pytest.mark.parametrize("model_type", MODELS)
def test_every_family_that_mlx_folders_are_read_of(model_type, base, tmp_path):
    mx = pytest.importorskip("mlx.core", reason="needs mlx: make test-peers installs it")
    mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm: make test-peers installs it")
    own = {"head_dim": 16} if model_type in ("gemma", "qwen3") else {}
    config = MODELS[model_type](
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        **own,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # norms of 1 would hide mistakes
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, 1.0, 0.2)
    model.save_pretrained(base)
    settings = json.loads((base / "config.json").read_text())
    # Where today's Transformers has rope_parameters, mlx-lm reads older names.
    rope = settings["rope_parameters"]
    settings |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    settings |= {key: value for key, value in rope.items() if key == "partial_rotary_factor"}
    (base / "config.json").write_text(json.dumps(settings))
    folder = tmp_path / "theirs"
    mlx_lm.convert(str(base), str(folder), quantize=True, q_bits=4, q_group_size=32)
    graft.convert_model(folder, tmp_path / "out")
    peer, _ = mlx_lm.load(str(folder))
    theirs = torch.from_numpy(np.array(peer(mx.array(IDS.numpy())).astype(mx.float32))).double()
    ours = our_logits(graft.load(tmp_path / "out", dtype="float32")[0])
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    print(f"{model_type}: {difference:.1e} of the largest logit")
    assert difference <= 1e-2


def test_awq_as_mlx_lm_reads_it(base, tmp_path):
    """The folder is the test's own; mlx-lm's reader of AutoAWQ says what is in it."""
    mx = pytest.importorskip("mlx.core", reason="needs mlx: make test-peers installs it")
    mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm: make test-peers installs it")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors.pop(name).shape
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.qweight"] = words(columns, rows // 8)
        tensors[f"{layer}.qzeros"] = words(columns // 32, rows // 8)
        tensors[f"{layer}.scales"] = torch.rand(columns // 32, rows).half() * 0.05
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((base / "config.json").read_text())
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    settings |= {"quantization_config": awq, "rope_theta": 10000.0}
    (base / "config.json").write_text(json.dumps(settings))
    report = graft.convert_model(base, tmp_path / "out")
    peer, _ = mlx_lm.load(str(base))
    ours = our_logits(graft.load(tmp_path / "out", dtype="float32")[0])
    theirs = torch.from_numpy(np.array(peer(mx.array(IDS.numpy())).astype(mx.float32))).double()
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    print(f"{difference:.1e} of the largest logit, rounding {report.rounding:.1e} of a step")
    assert difference <= 5e-2  # mlx-lm computes in float16


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


# llama.cpp ----------------------------------------------------------------------------------------

Q4_0, Q4_1, Q8_0 = 2, 3, 7  # llama_ftype in llama.h


@pytest.mark.parametrize("file_type", [Q4_0, Q4_1, Q8_0], ids=["Q4_0", "Q4_1", "Q8_0"])
def test_a_file_that_llama_cpp_quantised(file_type, shared_models, stories, first_ids, tmp_path):
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="needs llama-cpp-python: make test-peers installs it"
    )
    base = shared_models / "mixed-13m"
    loaded = load_model(str(base), dtype="float32")
    plain, file = tmp_path / "plain.gguf", tmp_path / "quantised.gguf"
    export_gguf(loaded.model, loaded.tokenizer, plain, unquantised="F32", name="model")
    # It cannot print a token that llama.cpp cut in two.
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = file_type, 1
    done = llama_cpp.llama_model_quantize(
        str(plain).encode(), str(file).encode(), ctypes.byref(options)
    )
    assert done == 0
    report = graft.convert_model(file, tmp_path / "out", tokenizer=base)
    assert report.rounding == 0.0 and report.dequantised == ("model.embed_tokens",)
    model, _ = graft.load(tmp_path / "out", dtype="float32")
    batch = first_ids(loaded.tokenizer, stories[:4], 96)
    engine = llama_cpp.Llama(
        str(file),
        n_ctx=128,
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    kl = []
    for row in batch:
        engine.reset()
        engine.eval(row.tolist())
        theirs = torch.from_numpy(np.array(engine.scores[: len(row)])).double().log_softmax(-1)
        with torch.no_grad():
            ours = model(row[None]).logits[0].double().log_softmax(-1)
        kl.append(float((ours.exp() * (ours - theirs)).sum(-1).mean()))
    engine.close()
    print(f"KL {np.mean(kl):.1e} nats")
    assert np.mean(kl) <= 1e-3


# GPTQ ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    find_spec("gptqmodel") is None, reason="needs gptqmodel, whose torch is newer than the pinned"
)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel(bits, symmetric, base, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # with two processors it counts one, too few
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    settings = QuantizeConfig(bits=bits, group_size=32, desc_act=False, sym=symmetric)
    model = GPTQModel.load(str(base), settings, device="cpu")
    rows = [{"input_ids": [row.tolist()], "attention_mask": [[1] * len(row)]} for row in IDS]
    model.quantize(rows, batch_size=1)
    model.save(str(tmp_path / "theirs"))
    graft.convert_model(tmp_path / "theirs", tmp_path / "out")
    loading = {"backend": BACKEND.TORCH, "device": "cpu", "dtype": torch.float16}
    theirs = GPTQModel.load(str(tmp_path / "theirs"), **loading).model
    layers = dict(frozen_layers(graft.load(tmp_path / "out", dtype="float32")[0]))
    for name, layer in layers.items():
        weight = theirs.get_submodule(name).dequantize_weight().T.float()  # float16
        step = layer.packed["scales"].float().repeat_interleave(32, 1)[:, : layer.in_features]
        lost = ((layer.dense_weight() - weight) / step).abs().max()
        assert lost <= 2**bits * 2**-10
