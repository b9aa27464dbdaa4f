"""The defaults of a method, filled in where it is known what it trains on."""

from __future__ import annotations

import pytest

from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.formats.registry import make_format
from graft.model.targets import freeze_layers, select_targets


@pytest.mark.parametrize(
    ("method", "bits", "expected"),
    [
        ("lora", None, (16, None, None)),
        ("qlora", 4, (16, None, None)),
        ("qalora", 4, (16, 16, None)),
        ("merge_aware", 8, (16, 0, 0.9)),
        ("merge_aware", 4, (16, 0, 0.9)),
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
@pytest.mark.parametrize("method", ["qalora", "merge_aware"])
def test_no_method_trains_more_than_lora_of_rank_16(method, bits, load) -> None:
    """Where layers are wide against their groups, as all but toys are."""

    def trained(weight_format, config: AdapterConfig) -> int:
        model = load("llama", weight_format=weight_format).model
        targets = select_targets(model, ())
        freeze_layers(model, targets)
        attach_adapter(model, targets, config)
        return sum(p.numel() for p in adapter_parameters(model, "default").values())

    name = {"qalora": "int", "merge_aware": "latent"}[method]
    config = AdapterConfig(method=method).resolved(bits)
    count = trained(make_format(name, {"bits": bits}), config)
    assert 0 < count <= trained(None, AdapterConfig(method="lora"))
