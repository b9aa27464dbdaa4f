"""Adapters on disk: what is written is what is read, and what does not fit changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from graft.adapters.attach import (
    activate_adapters,
    adapted_layers,
    adapter_names,
    adapter_parameters,
    attach_adapter,
    remove_adapter,
)
from graft.adapters.config import AdapterConfig
from graft.errors import GraftError
from graft.formats.registry import make_format
from graft.model.adapter_files import load_adapter, save_adapter
from graft.model.targets import freeze_layers, select_targets

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
OWN = "graft_adapter.json"
LAYER = "model.layers.0.self_attn.q_proj"
INT = make_format("int")


def attached(model: nn.Module, name: str = "default", **options: Any) -> nn.Module:
    """Attach an adapter with random values to every linear layer."""
    freeze_layers(model, select_targets(model, ()))
    config = AdapterConfig(rank=4, **options)
    attach_adapter(model, select_targets(model, config.targets), config, name)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


CASES = {
    "lora": (None, {"method": "lora"}),
    "lora-nf4": (make_format("nf4"), {"method": "lora", "alpha": 7.0}),
    "lora-rslora": (None, {"method": "lora", "alpha": 3.0, "rslora": True}),
    "lora-bias": (None, {"method": "lora", "adapter_bias": True, "dropout": 0.25}),
    "lora-some": (None, {"method": "lora", "targets": ("c_attn", "v_proj")}),
    "dora": (None, {"method": "lora", "dora": True, "alpha": 7.0, "dropout": 0.25}),
    "dora-nf4-rslora": (make_format("nf4"), {"method": "lora", "dora": True, "rslora": True}),
    "qalora": (INT, {"method": "qalora", "alpha": 5.0}),
    "qalora-rslora": (make_format("int", {"group_size": 16}), {"method": "qalora", "rslora": True}),
    "qalora-scales": (INT, {"method": "qalora", "alpha": 5.0, "grid_rank": 2}),
    "affine": (make_format("int", {"bits": 3}), {"method": "affine"}),
    "merge_aware": (make_format("latent", {"bits": 3}), {"method": "merge_aware"}),
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal(family, case, load, logits, tmp_path) -> None:
    weight_format, options = CASES[case]
    if case == "lora-some":
        options = options | {"targets": ("c_attn",) if family == "gpt2" else ("v_proj",)}
    saved = attached(load(family, weight_format=weight_format).model, **options)
    save_adapter(saved, tmp_path / "adapter", base="some/base")
    fresh = load(family, weight_format=weight_format).model
    freeze_layers(fresh, select_targets(fresh, ()))
    untouched = logits(fresh)
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert loaded.name == ("dora" if options.get("dora") else options["method"])
    before = adapter_parameters(saved, "default")
    after = adapter_parameters(fresh, "default")
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    for (_, one), (_, other) in zip(adapted_layers(saved), adapted_layers(fresh), strict=True):
        one, other = one.adapter("default"), other.adapter("default")
        assert getattr(one, "scaling", None) == getattr(other, "scaling", None)
        assert getattr(one, "dropout", None) == getattr(other, "dropout", None)
    assert torch.equal(logits(fresh), logits(saved))
    assert not torch.equal(logits(fresh), untouched)
    remove_adapter(fresh, "default")
    assert torch.equal(logits(fresh), untouched)


def test_files_and_dtype(load, tmp_path) -> None:
    model = attached(load("llama", dtype="bfloat16").model, method="lora")
    save_adapter(model, tmp_path / "a")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [CONFIG, WEIGHTS, OWN]
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 14 * 2
    assert f"base_model.model.{LAYER}.lora_A.weight" in tensors


@pytest.mark.parametrize(
    ("options", "name"),
    [({"method": "affine"}, "u"), ({"method": "qalora", "grid_rank": 1}, "u_B")],
)
def test_what_moves_scales_has_no_peft_config(options, name, load, tmp_path) -> None:
    model = attached(load("llama", weight_format=INT).model, **options)
    save_adapter(model, tmp_path / "a")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [WEIGHTS, OWN]
    assert f"{LAYER}.{name}" in load_file(tmp_path / "a" / WEIGHTS)
    with pytest.raises(GraftError, match="no LoRA"):
        save_adapter(model, tmp_path / "b", as_lora=True)
    assert not (tmp_path / "b").exists()


def test_several_adapters(load, logits, tmp_path) -> None:
    model = attached(load("llama", weight_format=INT).model, "one", method="qalora")
    attached(model, "two", method="lora", targets=("up_proj",))
    attached(model, "three", method="affine", targets=("q_proj", "down_proj"))
    for name in ("one", "two", "three"):
        save_adapter(model, tmp_path / name, name)
    fresh = load("llama", weight_format=INT).model
    for name in ("one", "two", "three"):
        load_adapter(fresh, tmp_path / name, name)
    assert adapter_names(fresh) == adapter_names(model)
    for active in (["one"], ["two"], ["three"], ["one", "two", "three"], []):
        activate_adapters(model, active)
        activate_adapters(fresh, active)
        assert torch.equal(logits(fresh), logits(model)), active


def test_a_qalora_adapter_as_plain_lora(load, logits, tmp_path) -> None:
    model = attached(load("gpt2", weight_format=INT).model, method="qalora", alpha=3.0)
    save_adapter(model, tmp_path / "lora", as_lora=True)
    fresh = load("gpt2", weight_format=INT).model
    assert load_adapter(fresh, tmp_path / "lora").name == "lora"
    for (_, one), (_, other) in zip(adapted_layers(model), adapted_layers(fresh), strict=True):
        deltas = [layer.adapter("default").delta(layer.base) for layer in (one, other)]
        assert torch.equal(*deltas)
    found, deployed = logits(fresh), logits(model)
    # The deployed form rounds the moved offsets to fp16.
    assert (found - deployed).abs().max() < 2e-3 * deployed.abs().max()


def test_a_foreign_qalora_adapter_keeps_a_rank_above_its_groups(load, tmp_path) -> None:
    model = attached(load("llama", weight_format=INT).model, method="qalora")
    save_adapter(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    for key, tensor in tensors.items():
        wide = (9, tensor.shape[1]) if "lora_A" in key else (tensor.shape[0], 9)
        tensors[key] = torch.randn(wide) * 0.1
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    config(CONFIG, r=9)(tmp_path / "a")
    fresh = load("llama", weight_format=INT).model
    load_adapter(fresh, tmp_path / "a")
    for name, layer in adapted_layers(fresh):
        adapter = layer.adapter("default")
        assert adapter.rank == 9
        for part in "AB":
            key = f"base_model.model.{name}.lora_{part}.weight"
            assert torch.equal(adapter.get_parameter(part), tensors[key])


@pytest.mark.parametrize("trainable", [False, True])
def test_gradients_are_asked_for_or_not(trainable, load, tmp_path) -> None:
    model = attached(load("llama", weight_format=INT).model, method="qalora")
    save_adapter(model, tmp_path / "a")
    fresh = load("llama", weight_format=INT).model
    load_adapter(fresh, tmp_path / "a", trainable=trainable)
    wanted = {key for key, p in fresh.named_parameters() if p.requires_grad}
    parameters = {key for key, _ in fresh.named_parameters() if ".adapters." in key}
    assert wanted == (parameters if trainable else set())
    assert not any(module.training for module in fresh.modules())


def test_a_mixture_of_lora_and_dora_is_not_saved(load, tmp_path) -> None:
    model = attached(load("llama").model, method="lora", targets=("q_proj",))
    attach_adapter(
        model, select_targets(model, ("v_proj",)), AdapterConfig(method="lora", dora=True)
    )
    with pytest.raises(GraftError, match="carry DoraAdapter and LoraAdapter; PEFT holds one kind"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_unknown_adapter_is_not_saved(load, tmp_path) -> None:
    model = attached(load("llama").model, method="lora")
    with pytest.raises(GraftError, match="no adapter named 'other'"):
        save_adapter(model, tmp_path / "a", "other")
    save_adapter(model, tmp_path / "a")
    with pytest.raises(GraftError, match="exists already"):
        save_adapter(model, tmp_path / "a")


Damage = Callable[[Path], object]


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def rewrite(folder: Path) -> None:
        held = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
        change(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def config(file: str = CONFIG, **values: Any) -> Damage:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(json.dumps(content))
        if file == CONFIG:  # as PEFT alone would have written it
            (folder / OWN).unlink()

    return change


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def drop_layer(held: dict[str, torch.Tensor]) -> None:
    for key in [key for key in held if LAYER in key]:
        del held[key]


A, B = (f"base_model.model.{LAYER}.lora_{part}.weight" for part in "AB")
DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "wrong shapes": (
        tensors(lambda t: t.update({A: torch.ones(4, 7), B: torch.ones(3, 4)})),
        [LAYER, "(4, 7)", "(3, 4)", "(4, 80)", "(80, 4)"],
    ),
    "ranks that differ": (tensors(lambda t: t.update({A: torch.ones(2, 80)})), [LAYER, "[2, 80]"]),
    "A missing": (tensors(lambda t: t.pop(A)), [f"{LAYER}: lora_A or lora_B is missing"]),
    "B missing": (tensors(lambda t: t.pop(B)), [f"{LAYER}: lora_A or lora_B is missing"]),
    "a layer missing": (tensors(drop_layer), [f"the tensors of '{LAYER}' are missing"]),
    "foreign tensors": (
        tensors(
            lambda t: t.update(
                {
                    A.replace("layers.0", "layers.9"): torch.ones(4, 80),
                    "lm_head.weight": torch.ones(2),
                    A.replace("lora_A", "lora_magnitude_vector"): torch.ones(2),
                }
            )
        ),
        ["3 problems", "layers.9", "lm_head.weight", "magnitude", "no linear layer of this model"],
    ),
    "several problems": (
        tensors(lambda t: (t.pop(A), t.update({"x.lora_A.weight": torch.ones(1)}))),
        ["2 problems", "lora_A or lora_B is missing", "x.lora_A.weight"],
    ),
    "no tensors": (
        lambda folder: (save_file({}, folder / WEIGHTS), (folder / OWN).unlink()),
        ["holds no tensors"],
    ),
    "truncated": (cut, ["truncated"]),
    "pickled": (pickled, [f"no {WEIGHTS}", "adapter_model.bin is read by `graft adopt`"]),
    "no configuration": (
        lambda folder: [(folder / file).unlink() for file in (CONFIG, OWN)],
        ["no adapter folder", CONFIG],
    ),
    "a later version": (config(OWN, format_version=9), ["format_version 9", "reads 1"]),
    "another kind": (config(peft_type="IA3"), ["peft_type is 'IA3'; only LORA is read"]),
    "dora with qalora, and more": (
        config(use_dora=True, use_qalora=True, modules_to_save=["lm_head"], bias="all"),
        ["problems", "use_dora and use_qalora", "modules_to_save is", "bias is 'all'"],
    ),
    "a changed base": (
        config(init_lora_weights="pissa_niter_4"),
        ["init_lora_weights is 'pissa_niter_4'", "path_initial_model_for_weight_conversion"],
    ),
    "magnitudes missing": (config(use_dora=True), [LAYER, "lora_magnitude_vector is missing"]),
    "an embedding and the head": (
        tensors(
            lambda t: t.update(
                {
                    "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 320),
                    "base_model.model.lm_head.lora_A.weight": torch.ones(4, 80),
                }
            )
        ),
        ["2 problems", "lora_embedding_A", "adapts an embedding", "adapts the output head"],
    ),
    "activated LoRA": (config(alora_invocation_tokens=[1, 2]), ["alora_invocation_tokens"]),
    "a pattern that goes back and tries again": (
        config(alpha_pattern={"(.+)+!": 3}),
        ["alpha_pattern has", "takes more than 1 s"],
    ),
    "an alpha that is no number": (
        config(lora_alpha=float("nan")),
        ["lora_alpha is nan: Input should be a finite number"],
    ),
    "fields of other types": (
        config(r="4", use_dora=1, alpha_pattern=[1]),
        ["3 problems", "r is '4'", "use_dora is 1", "alpha_pattern is [1]"],
    ),
    "a scaling that is no number": (
        config(OWN, scaling={LAYER: [1, 2]}),
        [f"scaling.{LAYER} is [1, 2]: Input should be a valid number"],
    ),
    "a rank beyond the layer": (
        tensors(lambda t: t.update({A: torch.ones(9999, 80), B: torch.ones(80, 9999)})),
        [LAYER, "rank 9,999; at most 80 are taken"],
    ),
    "numbers that are none": (
        tensors(lambda t: t[B][0].fill_(float("nan"))),
        [f"{LAYER}: B holds what is infinite or no number"],
    ),
    "integers": (tensors(lambda t: t.update({A: t[A].int()})), [A, "hold integers"]),
    "tensors without a row": (
        tensors(lambda t: t.update({A: t[A][:0], B: t[B][:, :0]})),
        [f"{LAYER}: A is [0, 80], which holds nothing"],
    ),
    "qalora on a dense base": (
        config(use_qalora=True, qalora_group_size=32),
        [LAYER, "qalora needs the int format, found 'dense'"],
    ),
}


def test_a_qalora_adapter_of_another_model_is_refused(load, tmp_path) -> None:
    save_adapter(attached(load("llama", weight_format=INT).model, method="qalora"), tmp_path / "a")
    tensors(lambda t: t.update({A: torch.ones(4, 9), B: torch.ones(7, 4)}))(tmp_path / "a")
    model = load("llama", weight_format=INT).model
    with pytest.raises(GraftError, match=r"(?s)q_proj.*\(4, 9\).*\(7, 4\).*the layer takes"):
        load_adapter(model, tmp_path / "a")
    assert not adapter_names(model)


@pytest.mark.parametrize("case", DAMAGES)
def test_what_does_not_fit_changes_nothing(case, load, tmp_path, monkeypatch) -> None:
    save_adapter(attached(load("llama").model, method="lora"), tmp_path / "a")
    damage, pieces = DAMAGES[case]
    damage(tmp_path / "a")
    model = load("llama").model
    freeze_layers(model, select_targets(model, ()))
    before = dict(model.named_modules())
    monkeypatch.setattr("graft.patterns.PATTERN_SECONDS", 1)
    with pytest.raises(GraftError) as raised:
        load_adapter(model, tmp_path / "a")
    for piece in [*pieces, str(tmp_path / "a")]:
        assert piece in str(raised.value)
    after = dict(model.named_modules())
    assert list(before) == list(after)
    assert all(after[name] is module for name, module in before.items())


def test_a_group_size_that_is_not_the_bases(load, tmp_path) -> None:
    base = make_format("int", {"group_size": 16})
    save_adapter(attached(load("llama", weight_format=base).model, method="qalora"), tmp_path / "a")
    model = load("llama", weight_format=INT).model
    with pytest.raises(GraftError, match="its group size is 16, the base's is 32"):
        load_adapter(model, tmp_path / "a")
    assert adapter_names(model) == []


def test_an_affine_adapter_needs_the_bases_groups(load, tmp_path) -> None:
    base = make_format("int", {"group_size": 16})
    save_adapter(attached(load("llama", weight_format=base).model, method="affine"), tmp_path / "a")
    model = load("llama", weight_format=INT).model
    with pytest.raises(GraftError, match=r"14 problems(.|\n)*'u': \(80, 5\)(.|\n)*'u': \(80, 3\)"):
        load_adapter(model, tmp_path / "a")
    dense = load("llama").model
    freeze_layers(dense, select_targets(dense, ()))
    with pytest.raises(GraftError, match="affine needs the int format, found 'dense'"):
        load_adapter(dense, tmp_path / "a")


def test_an_adapter_of_another_family(load, tmp_path) -> None:
    save_adapter(attached(load("gpt2").model, method="lora"), tmp_path / "a")
    model = load("llama").model
    freeze_layers(model, select_targets(model, ()))
    with pytest.raises(GraftError, match=r"transformer\.h\.0\.attn\.c_attn\.lora_A\.weight"):
        load_adapter(model, tmp_path / "a")


def test_a_name_that_is_taken_on_some_layers(load, tmp_path) -> None:
    model = attached(load("llama").model, method="lora", targets=("down_proj",))
    save_adapter(attached(load("llama").model, method="lora"), tmp_path / "a")
    before = list(dict(model.named_modules()))
    with pytest.raises(GraftError, match="already has an adapter named 'default'"):
        load_adapter(model, tmp_path / "a")
    assert list(dict(model.named_modules())) == before
