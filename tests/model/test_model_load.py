"""A loaded model is the one that transformers loads, and a quantised one packs its very weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from graft.adapters.attach import frozen_layers
from graft.errors import GraftError
from graft.formats.registry import make_format
from graft.model.load import load_model
from graft.model.save import save_model
from graft.model.targets import linear_layers

FAMILIES = ["llama", "llama-tied", "qwen2", "mistral", "gemma", "gemma3", "gpt2"]
FORMATS = [
    ("int", {"bits": 4, "group_size": 32}),
    ("int", {"bits": 3, "group_size": 16}),
    ("nf4", {"double_quant": True}),
    ("int8", {}),
]


def from_transformers(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, checkpoint, logits) -> None:
    folder = checkpoint(family)
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    assert torch.equal(logits(loaded.model), logits(from_transformers(folder)))
    assert loaded.source_dtype == loaded.dtype == torch.float32


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_a_bfloat16_checkpoint_computes_in_either_dtype(
    family, compute, checkpoint, logits
) -> None:
    folder = checkpoint(family, torch.bfloat16)
    loaded = load_model(str(folder), dtype=compute, device="cpu")
    expected = logits(from_transformers(folder, getattr(torch, compute)))
    found = logits(loaded.model)
    assert found.dtype == expected.dtype == loaded.dtype
    assert torch.equal(found, expected)
    assert loaded.source_dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_checkpoint_in_several_files(family, checkpoint, logits) -> None:
    folder = checkpoint(family, torch.float32, "100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    assert torch.equal(logits(loaded.model), logits(from_transformers(checkpoint(family))))


def test_names_without_the_models_prefix(copied, logits) -> None:
    folder = copied("gpt2")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    assert all(name.startswith("transformer.") for name in tensors)
    # As the first GPT-2 checkpoints on the hub have it, with a causal mask among the weights.
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, file, metadata={"format": "pt"})
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    assert torch.equal(logits(loaded.model), logits(from_transformers(folder)))


@pytest.mark.parametrize(("name", "options"), FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantising_while_loading_packs_each_weight(
    family, name, options, checkpoint, logits
) -> None:
    folder = checkpoint(family)
    weight_format = make_format(name, options)
    truth = from_transformers(folder)
    layers = {
        layer: module
        for layer, module in truth.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and layer != "lm_head"
    }
    loaded = load_model(str(folder), weight_format=weight_format, dtype="float32", device="cpu")
    frozen = dict(frozen_layers(loaded.model))
    assert list(frozen) == list(layers)
    for layer, module in layers.items():
        weight = module.weight.detach()
        weight = weight.T.contiguous() if isinstance(module, Conv1D) else weight
        for key, expected in weight_format.pack(weight).items():
            assert torch.equal(frozen[layer].packed[key], expected), (layer, key)
        assert (frozen[layer].bias is None) == (module.bias is None)
        if module.bias is not None:
            assert torch.equal(frozen[layer].bias, module.bias)
        # The truth computes with the dequantised weight from here on.
        rounded = frozen[layer].dense_weight()
        module.weight.data = rounded.T.contiguous() if isinstance(module, Conv1D) else rounded
    torch.testing.assert_close(logits(loaded.model), logits(truth), rtol=1e-4, atol=1e-5)


def test_chosen_layers_only(load) -> None:
    loaded = load("llama", weight_format=make_format("int"), targets=("q_proj",))
    found = [name for name, _ in frozen_layers(loaded.model)]
    assert found == [f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)]
    assert len(linear_layers(loaded.model)) == 14


def test_result_is_ready_to_evaluate(load) -> None:
    loaded = load("qwen2", weight_format=make_format("nf4"))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not any(module.training for module in loaded.model.modules())
    tensors = [*loaded.model.parameters(), *loaded.model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert loaded.model.config.dtype == torch.float32
    assert loaded.tokenizer("red lamp").input_ids


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama-tied", True)])
def test_tied_embeddings_share_memory(family, tied, load) -> None:
    model = load(family).model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight.data_ptr() == embedding.weight.data_ptr()) is tied


def test_the_models_own_generation_settings(copied) -> None:
    folder = copied("llama")
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["max_new_tokens"] = 17
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = load_model(str(folder), dtype="float32", device="cpu").model
    assert model.generation_config.max_new_tokens == 17


def test_progress_counts_every_tensor(load) -> None:
    seen: list[tuple[int, int]] = []
    load("llama", weight_format=make_format("int"), on_tensor=lambda *step: seen.append(step))
    # 2 x 7 linear layers, 2 x 2 norms, the last norm, embedding, head.
    assert seen == [(number, 21) for number in range(1, 22)]


def test_a_quantised_folder_is_not_quantised_again(load, tmp_path) -> None:
    save_model(load("llama", weight_format=make_format("int")), tmp_path / "q")
    with pytest.raises(GraftError, match="quantised already"):
        load_model(str(tmp_path / "q"), weight_format=make_format("nf4"))


def test_a_relative_path_and_a_trailing_slash(checkpoint, monkeypatch, tmp_path) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    for path in ("owner/name", "owner/name/", "./owner/name"):
        assert load_model(path, device="cpu").folder.resolve() == tmp_path / "owner" / "name"
