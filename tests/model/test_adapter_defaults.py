"""The defaults of a method, filled in where it is known what it trains on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.adapters.attach import adapter_parameters, attach_adapter, replace_module
from graft.adapters.config import AdapterConfig
from graft.formats.registry import make_format
from graft.layers.registry import kind_of
from graft.model.targets import select_targets


@pytest.mark.parametrize(
    ("method", "bits", "expected"),
    [
        ("lora", None, (16, None, None)),
        ("qlora", 4, (16, None, None)),
        ("qalora", 4, (16, 16, None)),
        ("merge_aware", 8, (16, 0, 0.99)),
        ("merge_aware", 4, (16, 0, 0.99)),
        ("merge_aware", 3, (16, 0, 0.7)),
        ("merge_aware", 2, (14, 1, 0.5)),
    ],
)
def test_defaults_of_each_method(method, bits, expected) -> None:
    config = AdapterConfig(method=method).resolved(bits)
    assert (config.rank, config.grid_rank, config.dense_fraction) == expected


@pytest.mark.parametrize("method", ["qalora", "merge_aware"])
def test_what_is_given_stays(method: str) -> None:
    given = AdapterConfig(method=method, rank=5, grid_rank=0, dense_fraction=0.25)
    assert given.resolved(2) == given


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("method", ["qalora", "affine", "merge_aware"])
def test_no_method_trains_more_than_lora_where_quality_is_measured(method: str, bits: int) -> None:
    """The shape of the model in benchmarks/quality.md."""
    config = LlamaConfig(
        vocab_size=361,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
    )

    def trained(method: str, name: str, options: dict[str, Any]) -> int:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        targets = select_targets(model, ())
        weight_format = make_format(name, options)
        for target in targets:
            layer = model.get_submodule(target)
            specs = weight_format.storage(layer.out_features, layer.in_features)
            packed = {key: spec.empty("meta") for key, spec in specs.items()}
            frozen = kind_of(layer).frozen(layer, weight_format, packed, None)
            replace_module(model, target, frozen)
        attach_adapter(model, targets, AdapterConfig(method=method).resolved(bits))
        return sum(p.numel() for p in adapter_parameters(model, "default").values())

    lora = trained("lora", "dense", {})
    assert lora == 186_880
    name = "latent" if method == "merge_aware" else "int"
    assert 0 < trained(method, name, {"bits": bits}) <= lora
