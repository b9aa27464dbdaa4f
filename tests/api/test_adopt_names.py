"""Adapters under the names that programs give their tensors, and adapters that are not whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.api.foreign_adapters import PREFIX, dense, distance, logits, low_rank, merged, save_peft
from torch import Tensor

import graft
from graft.errors import GraftError
from graft.model.adapter_names import Place, place_tensors

Tensors = dict[str, Tensor]
SAME = 1e-5


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new, 1): value for key, value in tensors.items()}


UNDERSTOOD: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "the adapter's name": (renamed(".weight", ".default.weight"), ""),
    "another adapter's name": (renamed(".weight", ".mine.weight"), ""),
    "no prefix": (renamed(PREFIX, ""), "begin with 'model.' where PEFT has"),
    "nothing before the layers": (renamed(PREFIX + "model.", ""), "no prefix"),
    "torch.compile": (renamed(PREFIX, PREFIX + "_orig_mod."), "_orig_mod"),
    "torch.compile, by layers": (renamed("self_attn.", "_orig_mod.self_attn."), "_orig_mod"),
    "DDP": (renamed(PREFIX, "module." + PREFIX), "begin with 'module.base_model"),
    "FSDP": (renamed(PREFIX, "_fsdp_wrapped_module." + PREFIX), "_fsdp_wrapped_module"),
    "checkpointing": (renamed("self_attn.", "_checkpoint_wrapped_module.self_attn."), "_checkpoin"),
    "twice": (renamed(PREFIX, PREFIX + PREFIX), "begin with 'base_model.model.base_model"),
    "a part of a larger model": (renamed("model.layers", "model.language_model.layers"), "langua"),
    "that, in the other order": (renamed("model.layers", "language_model.model.layers"), "langua"),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_a_prefix_under_which_each_tensor_has_one_place(case, tiny_base, tmp_path) -> None:
    change, told = UNDERSTOOD[case]
    tensors = low_rank(dense(tiny_base))
    report = graft.adopt(save_peft(tmp_path / "a", change(tensors), tiny_base), tmp_path / "run")
    assert told in " ".join(report.notes) and bool(told) == bool(report.notes)
    assert (
        distance(logits(graft.load(tmp_path / "run")[0]), merged(dense(tiny_base), tensors)) < SAME
    )


def without_second_layer(tensors: Tensors) -> Tensors:
    return {key: value for key, value in tensors.items() if "layers.1." not in key}


def biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.replace(".weight", ".bias"): torch.ones(len(tensor))
        for key, tensor in tensors.items()
        if "lora_B" in key
    }


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, object], list[str]]] = {
    "biases that the settings do not know": (
        lambda tensors: tensors | biases(tensors),
        {},
        ["lora_B.bias for", "does not say lora_bias", "PEFT leaves them out"],
    ),
    "settings with biases that are not there": (
        lambda tensors: tensors,
        {"lora_bias": True},
        ["says lora_bias", "has no lora_B.bias for"],
    ),
    "a part that was lost": (
        without_second_layer,
        {},
        ["no tensors for 2 of the 4 layers", "model.layers.1.self_attn.q_proj, model.layers.1"],
    ),
    "lost, by a regular expression": (
        without_second_layer,
        {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj"},
        ["no tensors for 2 of the 4 layers"],
    ),
    "lost, of all layers": (
        lambda tensors: tensors,
        {"target_modules": "all-linear"},
        ["no tensors for 10 of the 14 layers"],
    ),
    "lost, of the layers that it names": (
        without_second_layer,
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        ["no tensors for 2 of the 4 layers"],
    ),
    "lost, and nothing says what there was": (
        without_second_layer,
        {"target_modules": None},
        ["no tensors for 2 of the 4 layers"],
    ),
    "more than it targets": (
        lambda tensors: tensors,
        {"target_modules": ["q_proj"]},
        ["adapts 2 layers that adapter_config.json does not target", "PEFT leaves them out"],
    ),
    "excluded layers": (
        lambda tensors: tensors,
        {"exclude_modules": r".*layers\.1.*"},
        ["adapts 2 layers that"],
    ),
    "half of a pair": (
        lambda tensors: {k: v for k, v in tensors.items() if "1.self_attn.q_proj.lora_B" not in k},
        {},
        ["layers.1.self_attn.q_proj: lora_A or lora_B is missing"],
    ),
    "DeepSpeed's ZeRO-3": (
        lambda tensors: {k: torch.zeros(0) if "lora_B" in k else v for k, v in tensors.items()},
        {},
        ["4 of its 8 tensors are empty", "DeepSpeed ZeRO-3", "gathering"],
    ),
    "FSDP's flat parts": (
        lambda tensors: {k: v.flatten() for k, v in tensors.items()},
        {},
        ["8 of its 8 tensors are empty or flat", "FSDP"],
    ),
    "a prefix of another kind": (
        renamed("model.layers", "vision_tower.layers"),
        {},
        ["vision_tower.layers.0", "without its prefix 'base_model.model.vision_tower.'"],
    ),
    "two adapters": (
        lambda tensors: (
            renamed("A.weight", "A.one.weight")(tensors)
            | renamed("A.weight", "A.two.weight")(tensors)
        ),
        {},
        ["one and the same by their names"],
    ),
    "two adapters of different layers": (
        lambda tensors: {
            key.replace(".weight", ".one.weight" if "q_proj" in key else ".two.weight"): value
            for key, value in tensors.items()
        },
        {},
        ["holds 2 adapters, 'one', 'two'"],
    ),
    "another rank": (lambda tensors: tensors, {"r": 8}, ["has rank 4", "gives it 8"]),
    "kohya's names": (renamed(PREFIX, "lora_unet_"), {}, ["kohya"]),
    "no adapter of a language model": (renamed(PREFIX, "unet."), {}, ["diffusers"]),
    "a score head": (lambda tensors: tensors, {"task_type": "SEQ_CLS"}, ["ends in another head"]),
    "fused experts": (lambda tensors: tensors, {"target_parameters": ["w"]}, ["target_parameters"]),
    "a variant to come": (lambda tensors: tensors, {"use_newlora": True}, ["'use_newlora' is set"]),
    "its configuration": (lambda tensors: tensors, {"new_config": {"a": 1}}, ["'new_config' is"]),
    "a merged layer of old": (lambda tensors: tensors, {"enable_lora": [True]}, ["'enable_lora'"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_whole_or_not_understood_is_refused(case, tiny_base, tmp_path) -> None:
    change, options, pieces = REFUSED[case]
    tensors = change(low_rank(dense(tiny_base)))
    adapter = save_peft(tmp_path / "a", tensors, tiny_base, **options)
    with pytest.raises(GraftError) as raised:
        graft.adopt(adapter, tmp_path / "run")
    assert all(piece in str(raised.value) for piece in pieces), raised.value
    assert not (tmp_path / "run").exists()


def test_options_that_choose_layers_as_peft_does(tiny_base, tmp_path) -> None:
    whole = low_rank(dense(tiny_base))
    fifth = "layers.1.self_attn.q_proj"
    choices: list[tuple[Callable[[str], bool], dict[str, object]]] = [
        (lambda key: "layers.1." in key, {"layers_to_transform": 1}),
        (
            lambda key: "layers.0." in key,
            {"layers_to_transform": [0], "layers_pattern": ["layers"]},
        ),
        (lambda key: fifth not in key, {"exclude_modules": [fifth]}),
        (lambda key: "q_proj" in key, {"target_modules": r".*\.q_proj"}),
    ]
    for number, (keep, options) in enumerate(choices):
        tensors = {key: value for key, value in whole.items() if keep(key)}
        adapter = save_peft(tmp_path / f"a{number}", tensors, tiny_base, **options)
        report = graft.adopt(adapter, tmp_path / f"run{number}")
        assert report.layers == len(tensors) // 2


def test_patterns_that_are_written_for_the_files_own_names(tiny_base, tmp_path) -> None:
    tensors = low_rank(dense(tiny_base))
    inside = renamed("model.layers", "model.language_model.layers")(tensors)
    pattern = {"^model.language_model.layers.1.self_attn.q_proj": 4}
    adapter = save_peft(tmp_path / "a", inside, tiny_base, alpha_pattern=pattern)
    graft.adopt(adapter, tmp_path / "run")
    for key in tensors:
        if "layers.1.self_attn.q_proj.lora_A" in key:
            tensors[key] = tensors[key] / 2
    assert (
        distance(logits(graft.load(tmp_path / "run")[0]), merged(dense(tiny_base), tensors)) < SAME
    )


def test_names_that_fit_no_place_or_several_have_none() -> None:
    names = {"model.layers.0.q", "vision.layers.0.q", "model.norm.weight"}
    placed = place_tensors(["base_model.model.layers.0.q.lora_A.weight"], names, "model")
    assert placed.keys == {
        "base_model.model.layers.0.q.lora_A.weight": Place("model.layers.0.q", "lora_A.weight")
    }
    placed = place_tensors(["a.norm.weight"], names, "model")
    assert not placed.keys and "without its prefix 'a.'" in placed.problems[0]
    placed = place_tensors(["norm.weight", "tower.norm.weight"], names, "model")
    assert list(placed.keys) == ["norm.weight"] and "prefix" not in placed.problems[0]
    placed = place_tensors(["x.lora_A.weight"], {"model.x", "x"}, "model")
    assert not placed.keys and placed.problems


def test_one_tensor_under_two_names_is_one_where_both_hold_the_same() -> None:
    keys = ["base_model.model.lm_head.weight", "base_model.model.lm_head.modules_to_save.weight"]
    placed = place_tensors(keys, {"lm_head", "lm_head.weight"}, "model", lambda *_: True)
    assert placed.keys == {keys[0]: Place("lm_head", "weight")} and not placed.problems
    assert place_tensors(keys, {"lm_head", "lm_head.weight"}, "model", lambda *_: False).problems
