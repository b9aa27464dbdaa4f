"""Which layers a pattern chooses, and what a pattern that chooses none is told."""

from __future__ import annotations

import pytest
import torch

from graft.adapters.attach import attach_adapter, frozen_layers
from graft.adapters.config import AdapterConfig
from graft.errors import GraftError
from graft.formats.dense import DenseFormat
from graft.formats.registry import make_format
from graft.model.targets import freeze_layers, linear_layers, linear_shape, select_targets

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LLAMA = [
    f"model.layers.{number}.{part}"
    for number in (0, 1)
    for part in [*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in MLP)]
]
GPT2 = [
    f"transformer.h.{number}.{part}"
    for number in (0, 1)
    for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


@pytest.mark.parametrize(("family", "names"), [("llama", LLAMA), ("gpt2", GPT2)])
def test_no_pattern_chooses_all_but_the_head(family, names, load) -> None:
    model = load(family).model
    assert select_targets(model, ()) == names == list(linear_layers(model))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["q_proj"], [name for name in LLAMA if name.endswith("q_proj")]),
        (["mlp.up_proj"], [name for name in LLAMA if name.endswith("up_proj")]),
        (["up_proj", "q_proj"], [n for n in LLAMA if n.endswith(("up_proj", "q_proj"))]),
        ([r"model\.layers\.0\..*"], LLAMA[:7]),
        ([r".*\.[qv]_proj"], [n for n in LLAMA if n.endswith((".q_proj", ".v_proj"))]),
        (["q_proj", "q_proj", r".*q_proj"], [n for n in LLAMA if n.endswith("q_proj")]),
    ],
)
def test_names_suffixes_and_regular_expressions(patterns, expected, load) -> None:
    assert select_targets(load("llama").model, patterns) == expected


# A suffix has whole parts only, and a regular expression matches the whole name.
@pytest.mark.parametrize("pattern", ["proj", "lm_head", "query_key_value", "self_attn", "q_pro."])
def test_a_miss_lists_the_real_names(pattern, load) -> None:
    with pytest.raises(GraftError) as raised:
        select_targets(load("llama").model, [pattern])
    message = str(raised.value)
    assert repr(pattern) in message
    assert ", ".join(sorted(ATTENTION + MLP)) in message
    assert LLAMA[0] in message


def test_every_miss_is_told_at_once(load) -> None:
    with pytest.raises(GraftError) as raised:
        select_targets(load("gpt2").model, ["q_proj", "c_attn", "up_proj", "(["])
    message = str(raised.value)
    assert "3 problems" in message
    assert "'q_proj'" in message and "'up_proj'" in message and "'(['" in message
    assert "c_attn, c_fc, c_proj" in message


def test_a_pattern_that_would_match_for_ever_is_refused(load, monkeypatch) -> None:
    monkeypatch.setenv("GRAFT_BOUNDS", "0.25")
    with pytest.raises(GraftError, match="takes more than 1 s"):
        select_targets(load("llama").model, [r"(([a-z_.]|[0-9]|\w)*)*x!"])


def test_shapes(load) -> None:
    layers = linear_layers(load("gpt2").model)
    assert linear_shape(layers["transformer.h.0.attn.c_attn"]) == (80, 240)
    assert linear_shape(layers["transformer.h.0.mlp.c_proj"]) == (320, 80)
    layers = linear_layers(load("llama", weight_format=make_format("int")).model)
    assert linear_shape(layers["model.layers.0.mlp.up_proj"]) == (80, 88)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_freezing_shares_the_data(family, load, logits) -> None:
    model = load(family).model
    names = select_targets(model, ())
    before = logits(model)
    pointers = {name: model.get_submodule(name).weight.data_ptr() for name in names}
    freeze_layers(model, names)
    frozen = dict(frozen_layers(model))
    assert list(frozen) == names
    for name, layer in frozen.items():
        assert layer.weight_format == DenseFormat("float32")
        assert layer.packed["weight"].data_ptr() == pointers[name]
        assert layer.transposed == (family == "gpt2")
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    freeze_layers(model, names)  # frozen layers stay what they are
    assert dict(frozen_layers(model)) == frozen


def test_adapted_layers_keep_their_names(load) -> None:
    model = load("llama", weight_format=make_format("int")).model
    attach_adapter(model, LLAMA[:3], AdapterConfig(method="lora", rank=2))
    assert list(linear_layers(model)) == LLAMA
    assert select_targets(model, ["q_proj"]) == [LLAMA[0], LLAMA[7]]
