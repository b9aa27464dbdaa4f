"""Another tool's integers, trained, merged and exported: what is shipped is what was trained."""

from __future__ import annotations

import dataclasses
import json

import gguf
import pytest
import torch
from foreign import awq_layer, foreign_folder, gptq_layer, gptq_weight, nf4_layer
from safetensors.torch import load_file, save_file

import graft
from graft.adapters.attach import frozen_layers
from graft.errors import GraftError
from graft.kernels.packed.planes import unpack_codes

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
WRITERS = {"gptq": (GPTQ, gptq_layer(4, 32)), "awq": (AWQ, awq_layer(32)), "nf4": (NF4, nf4_layer)}


@pytest.fixture
def converted(tiny_base, tmp_path):
    def make(kind):
        folder = foreign_folder(tiny_base, tmp_path / "theirs", *WRITERS[kind])
        graft.convert_model(folder, tmp_path / "base")
        return str(tmp_path / "base")

    return make


@pytest.fixture
def settings(rows, tmp_path):
    return {
        "data": str(rows),
        "max_length": 48,
        "steps": 3,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "out": str(tmp_path / "run"),
    }


@pytest.mark.parametrize("method", ["qalora", "affine"])
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_gguf_holds_the_trained_integers(kind, method, converted, settings, logits, tmp_path):
    base = converted(kind)
    graft.finetune(graft.TrainConfig(model=base, method=method, export=("gguf",), **settings))
    run = tmp_path / "run"
    assert graft.merge(run, tmp_path / "merged").exact
    before, _ = graft.load(base)
    trained, _ = graft.load(run)
    merged, _ = graft.load(tmp_path / "merged")
    assert torch.equal(logits(trained), logits(merged))
    assert not torch.equal(logits(before), logits(merged))
    reader = gguf.GGUFReader(run / "export" / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    first = dict(frozen_layers(before))
    layers = dict(frozen_layers(merged))
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(codes(layer), codes(first[name])), "training moves no code"
        stored = tensors[f"{names.get_name(name)}.weight"]
        assert stored.tensor_type is gguf.GGMLQuantizationType.Q4_1
        found = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
        expected = layer.dense_weight(torch.float32)
        heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
        if heads:  # llama.cpp rotates rows 2i and 2i + 1 of a head, Transformers i and i + half
            expected = expected.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(found, expected), name


def codes(layer):
    return unpack_codes((layer.packed["codes"],), 4, layer.in_features)


def test_a_run_goes_on_where_it_stopped(converted, settings, logits, tmp_path):
    base = converted("gptq")
    whole = graft.TrainConfig(model=base, save_every=2, **settings)
    graft.finetune(whole)
    expected = logits(graft.load(tmp_path / "run")[0])
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    graft.finetune(graft.TrainConfig(model=base, resume=True, **settings))
    assert torch.equal(logits(graft.load(tmp_path / "run")[0]), expected)


def test_an_adapter_trained_on_gptq_is_adopted_and_merged_on_the_same_weights(
    tiny_base, logits, expected_logits, tmp_path
):
    """PEFT cannot merge into GPTQ's integers; here the base is brought in, and then adopted on."""
    layer = gptq_layer(4, 32, symmetric=True)
    theirs = foreign_folder(tiny_base, tmp_path / "theirs", GPTQ, layer)
    stored = load_file(theirs / "model.safetensors")
    generator, target = torch.Generator().manual_seed(4), "model.layers.1.self_attn.q_proj"
    a, b = torch.randn(4, 64, generator=generator) / 8, torch.randn(64, 4, generator=generator) / 8
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = {f"base_model.model.{target}.lora_{key}.weight": t for key, t in (("A", a), ("B", b))}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": target}
    config |= {"base_model_name_or_path": str(theirs), "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(GraftError, match="on these very weights: graft convert"):
        graft.adopt(adapter, tmp_path / "run")
    graft.convert_model(theirs, tmp_path / "base")
    graft.adopt(adapter, tmp_path / "run", model=str(tmp_path / "base"))
    graft.merge(tmp_path / "run", tmp_path / "merged", dtype="float32")

    weights = {
        f"{key.removesuffix('.qweight')}.weight": gptq_weight(
            stored, key.removesuffix(".qweight"), 4
        )
        for key in stored
        if key.endswith(".qweight")
    }
    weights[f"{target}.weight"] = weights[f"{target}.weight"] + 2 * (b @ a).double()
    reference = expected_logits(weights)
    for path in ("run", "merged"):
        found = logits(graft.load(tmp_path / path, dtype="float32")[0])
        assert (found - reference).abs().max() <= 1e-5 * reference.abs().max(), path


def test_qlora_trains_on_the_very_nf4_weights(converted, settings, logits, tmp_path):
    base = converted("nf4")
    graft.finetune(graft.TrainConfig(model=base, method="qlora", **settings))
    assert not (tmp_path / "run" / "base").exists(), "the weights stay where they are"
    trained, _ = graft.load(tmp_path / "run")
    assert {layer.weight_format.name for _, layer in frozen_layers(trained)} == {"nf4"}
    assert not torch.equal(logits(trained), logits(graft.load(base)[0]))


def test_the_plan_is_of_the_formats_that_are_there(converted):
    from graft.api.config import PlanConfig
    from graft.api.plan import plan

    assert plan(PlanConfig(model=converted("gptq"), method="qalora")).bits_per_weight == 5.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 4, "group_size": 32}, "2 problems"),
        ({"format": "int"}, "--format says how to quantise, and this folder is quantised already"),
        ({"solver": "gptq"}, "--solver says how to quantise"),
        ({"method": "merge_aware"}, "merge_aware rounds the weights itself"),
        ({"method": "lora", "init": "loftq"}, "loftq rounds the weights itself"),
        ({"method": "full"}, "full trains the weights themselves"),
    ],
)
def test_what_would_quantise_again_is_refused(options, words, converted, settings, tmp_path):
    base = converted("gptq")
    with pytest.raises(GraftError, match=words):
        graft.finetune(graft.TrainConfig(model=base, **settings | options))
    assert not (tmp_path / "run").exists()


def test_a_method_needs_its_format(converted, settings):
    with pytest.raises(GraftError, match="needs weights in the int format, found 'nf4'"):
        graft.finetune(graft.TrainConfig(model=converted("nf4"), method="qalora", **settings))


def test_exports_are_checked_against_the_formats_that_are_there(tiny_base, settings, tmp_path):
    eight = {**GPTQ, "bits": 8}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", eight, gptq_layer(8, 32))
    graft.convert_model(folder, tmp_path / "base")
    config = graft.TrainConfig(model=str(tmp_path / "base"), export=("gguf",), **settings)
    with pytest.raises(GraftError, match="--export gguf: bits is 8"):
        graft.finetune(config)
    part = {"method": "lora", "targets": ("q_proj",)}
    with pytest.raises(GraftError, match="--export gguf: bits is 8"):
        graft.finetune(dataclasses.replace(config, **part))
    graft.finetune(dataclasses.replace(config, method="lora"))  # merged, every layer is dense
    assert (tmp_path / "run" / "export" / "model.gguf").is_file()


def test_messages_name_the_command(tiny_base, settings, tmp_path):
    folder = foreign_folder(tiny_base, tmp_path / "theirs", *WRITERS["gptq"])
    with pytest.raises(GraftError, match=f"graft convert {folder} --out"):
        graft.finetune(graft.TrainConfig(model=str(folder), **settings))
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4}  # MLX's
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraftError, match=f"graft convert {folder} --out"):
        graft.finetune(graft.TrainConfig(model=str(folder), **settings))


def test_groups_of_several_sizes(tiny_base, settings, logits, tmp_path):
    """Rows of 64 inputs are one group of 64, rows of 96 are three of 32; PEFT knows one size."""
    whole = {**GPTQ, "group_size": -1}
    folder = foreign_folder(tiny_base, tmp_path / "theirs", whole, gptq_layer(4, -1))
    graft.convert_model(folder, tmp_path / "base")
    config = graft.TrainConfig(model=str(tmp_path / "base"), grid_rank=0, **settings)
    graft.finetune(config)
    run = tmp_path / "run"
    trained, _ = graft.load(run)
    assert not torch.equal(logits(trained), logits(graft.load(tmp_path / "base")[0]))
    assert graft.merge(run, tmp_path / "merged").exact
    assert torch.equal(logits(graft.load(tmp_path / "merged")[0]), logits(trained))
    graft.export_model(run, "peft", tmp_path / "peft")
    graft.export_model(run, "gguf", tmp_path / "m.gguf")
    exported, _ = graft.load(tmp_path / "m.gguf", tokenizer=str(tiny_base))
    torch.testing.assert_close(logits(exported), logits(trained), rtol=1e-4, atol=1e-4)
