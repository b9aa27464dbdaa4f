"""Layers are recognised, shaped and frozen by their kind; a new kind is one entry.

The toy kind stores its weight as `kernel` [in_features, 2, out_features / 2], in the MLPs of a
Llama. It is frozen, quantised, adapted, merged, saved and planned by what this file says alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.adapters.merge import merge_adapters
from graft.errors import GraftError
from graft.formats.base import Packed, WeightFormat
from graft.formats.dense import DenseFormat
from graft.formats.registry import make_format
from graft.layers.base import LayerKind
from graft.layers.conv1d import CONV1D
from graft.layers.frozen import FrozenLinear
from graft.layers.linear import FROZEN, LINEAR
from graft.layers.registry import LAYER_KINDS, find_kind, kind_of
from graft.model.load import load_model
from graft.model.save import save_model
from graft.model.targets import freeze_layers, select_targets
from graft.plan.memory import plan_memory


class Toy(nn.Module):
    """y = x W + b, with W stored in two halves of its columns."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(in_features, 2, out_features // 2) * 0.1)
        self.bias = nn.Parameter(torch.randn(out_features) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel.flatten(1) + self.bias


class FrozenToy(FrozenLinear):
    """What takes a toy's place."""


class ToyKind(LayerKind):
    classes = (f"{__name__}.Toy", f"{__name__}.FrozenToy")
    weight = "kernel"

    def shape(self, module: Any) -> tuple[int, int]:
        if isinstance(module, FrozenToy):
            return module.in_features, module.out_features
        return module.kernel.shape[0], module.bias.shape[0]

    def rows(self, module: Any, stored: Tensor) -> Tensor:
        return stored.flatten(1).T

    def stored(self, module: Any, weight: Tensor) -> Tensor:
        return weight.T.unflatten(1, (2, -1))

    def frozen(
        self, module: Any, weight_format: WeightFormat, packed: Packed, bias: Tensor | None
    ) -> FrozenToy:
        return FrozenToy(*self.shape(module), weight_format, packed, bias)


class ToyLlamaConfig(LlamaConfig):
    model_type = "toy_llama"


class ToyLlamaForCausalLM(LlamaForCausalLM):
    config_class = ToyLlamaConfig

    def __init__(self, config: ToyLlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.up_proj = Toy(config.hidden_size, config.intermediate_size)
            layer.mlp.down_proj = Toy(config.intermediate_size, config.hidden_size)


TOYS = [f"model.layers.{n}.mlp.{part}_proj" for n in (0, 1) for part in ("up", "down")]


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder of a model with toy layers; the kind is known while the test runs."""
    LAYER_KINDS.add("toy", ToyKind())
    AutoConfig.register("toy_llama", ToyLlamaConfig)
    AutoModelForCausalLM.register(ToyLlamaConfig, ToyLlamaForCausalLM)
    settings = LlamaConfig.from_pretrained(tiny_base).to_dict()
    for key in ("model_type", "architectures"):
        del settings[key]
    model = ToyLlamaForCausalLM(ToyLlamaConfig(**settings))
    model.save_pretrained(tmp_path / "toy")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / file, tmp_path / "toy" / file)
    yield tmp_path / "toy"
    LAYER_KINDS.remove("toy")
    del CONFIG_MAPPING._extra_content["toy_llama"]
    del AutoModelForCausalLM._model_mapping._extra_content[ToyLlamaConfig]


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(24).reshape(2, 12) + 7
    with torch.no_grad():
        out: Tensor = model(ids).logits
    return out


def loaded_by_transformers(folder: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model.get_submodule(TOYS[0]), Toy)
    return model.eval()


def test_it_is_frozen_and_saved_as_it_was(folder, tmp_path) -> None:
    loaded = load_model(folder, dtype="float32", device="cpu")
    before, names = logits(loaded.model), select_targets(loaded.model, ())
    assert set(TOYS) < set(names)
    pointers = {name: loaded.model.get_submodule(name).kernel.data_ptr() for name in TOYS}
    freeze_layers(loaded.model, names)
    for name in TOYS:
        layer = loaded.model.get_submodule(name)
        assert type(layer) is FrozenToy
        assert layer.packed["weight"].data_ptr() == pointers[name]
    torch.testing.assert_close(logits(loaded.model), before, rtol=1e-5, atol=1e-5)
    save_model(loaded, tmp_path / "saved")
    was, now = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
    assert was.keys() == now.keys()
    for name, tensor in was.items():
        assert torch.equal(tensor, now[name]), name
    torch.testing.assert_close(logits(loaded_by_transformers(tmp_path / "saved")), before)


@pytest.mark.parametrize("name", ["nf4", "int", "int8"])
def test_it_is_quantised_while_it_is_read_and_saved_packed(folder, tmp_path, name) -> None:
    weight_format = make_format(name)
    loaded = load_model(folder, weight_format=weight_format, dtype="float32", device="cpu")
    expected = loaded_by_transformers(folder)
    for layer_name in select_targets(loaded.model, ()):
        module, layer = expected.get_submodule(layer_name), loaded.model.get_submodule(layer_name)
        assert isinstance(layer, FrozenToy) == (layer_name in TOYS)
        kind = kind_of(module)
        stored = module.get_parameter(kind.weight)
        weight = kind.rows(module, stored.detach()).contiguous()
        packed = weight_format.pack(weight)
        assert all(torch.equal(tensor, layer.packed[key]) for key, tensor in packed.items())
        rounded = weight_format.unpack(packed, *weight.shape, torch.float32)
        stored.data = kind.stored(module, rounded)
    torch.testing.assert_close(logits(loaded.model), logits(expected), rtol=1e-4, atol=1e-4)
    save_model(loaded, tmp_path / "quantised")
    again = load_model(tmp_path / "quantised", device="cpu")
    assert type(again.model.get_submodule(TOYS[0])) is FrozenToy
    assert torch.equal(logits(again.model), logits(loaded.model))


@pytest.mark.parametrize("weight_format", [None, make_format("nf4")], ids=["dense", "nf4"])
def test_it_is_adapted_and_merged(folder, tmp_path, weight_format) -> None:
    loaded = load_model(folder, weight_format=weight_format, dtype="float32", device="cpu")
    names = select_targets(loaded.model, ["up_proj", "down_proj", "q_proj"])
    freeze_layers(loaded.model, names)
    attach_adapter(loaded.model, names, AdapterConfig(method="lora", rank=2))
    for parameter in adapter_parameters(loaded.model, "default").values():
        nn.init.normal_(parameter, std=0.1)
    trained = logits(loaded.model)
    merge_adapters(loaded.model)
    assert type(loaded.model.get_submodule(TOYS[0])) is FrozenToy
    torch.testing.assert_close(logits(loaded.model), trained, rtol=1e-4, atol=1e-4)
    rest = [name for name in select_targets(loaded.model, ()) if name not in names]
    if weight_format is None:
        save_model(loaded, tmp_path / "merged")
        merged = logits(loaded_by_transformers(tmp_path / "merged"))
        torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    else:
        save_model(loaded, tmp_path / "merged")
        assert rest
        again = load_model(tmp_path / "merged", dtype="float32", device="cpu")
        torch.testing.assert_close(logits(again.model), trained, rtol=1e-4, atol=1e-4)


def test_it_is_planned(folder, tmp_path) -> None:
    weight_format = make_format("int")
    plan = plan_memory(
        folder,
        weight_format=weight_format,
        adapter=AdapterConfig(method="lora", rank=2),
        dtype="float32",
        device="cpu",
        batch_size=1,
        sequence_length=8,
        checkpointing="none",
    )
    loaded = load_model(folder, weight_format=weight_format, dtype="float32", device="cpu")
    save_model(loaded, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert plan.weight_file_bytes == sum(t.numel() * t.itemsize for t in tensors.values())


def test_a_problem_in_its_weights_names_them(folder) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{TOYS[0]}.kernel"] = tensors[f"{TOYS[0]}.kernel"][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(GraftError, match=f"{TOYS[0]}.kernel has shape"):
        load_model(folder, weight_format=make_format("int"), device="cpu")


# The kinds that there are -------------------------------------------------------------------------


class _Special(nn.Linear):
    pass


class _OtherConv1D(Conv1D):
    pass


def test_a_module_is_of_the_kind_of_its_nearest_class() -> None:
    packed = {"weight": torch.randn(3, 5)}
    frozen = FrozenLinear(5, 3, DenseFormat(), packed)
    assert find_kind(nn.Linear(5, 3)) is find_kind(_Special(5, 3)) is LINEAR
    assert find_kind(Conv1D(3, 5)) is find_kind(_OtherConv1D(3, 5)) is CONV1D
    assert find_kind(frozen) is FROZEN
    for module in (nn.LayerNorm(5), nn.Embedding(3, 5), nn.Sequential(nn.Linear(5, 3))):
        assert find_kind(module) is None
        with pytest.raises(TypeError, match=type(module).__name__):
            kind_of(module)
    assert find_kind(FrozenToy(5, 3, DenseFormat(), packed)) is FROZEN
    LAYER_KINDS.add("toy", ToyKind())
    try:
        assert isinstance(find_kind(FrozenToy(5, 3, DenseFormat(), packed)), ToyKind)
    finally:
        LAYER_KINDS.remove("toy")


@pytest.mark.parametrize("module", [nn.Linear(5, 3), nn.Linear(5, 3, bias=False), Conv1D(3, 5)])
def test_a_kind_says_what_its_modules_hold(module: nn.Module) -> None:
    kind = kind_of(module)
    assert kind.shape(module) == (5, 3)
    stored = module.get_parameter(kind.weight).detach()
    weight, bias = kind.rows(module, stored), kind.bias(module)
    assert weight.shape == (3, 5) and weight.data_ptr() == stored.data_ptr()
    assert torch.equal(kind.stored(module, weight), stored)
    x = torch.randn(4, 5)
    y = x @ weight.T + (0 if bias is None else bias)
    torch.testing.assert_close(module(x), y)
    layer = kind.frozen(module, DenseFormat(), {"weight": weight}, bias)
    torch.testing.assert_close(layer(x), y)
    again = kind_of(layer)
    assert again.shape(layer) == (5, 3)
    assert torch.equal(again.stored(layer, layer.packed["weight"]), stored)
    moved = layer.replaced(layer.weight_format, {"weight": weight + 1})
    assert torch.equal(again.stored(moved, moved.packed["weight"]), stored + 1)
