"""Several adapters on one base: added, weighted, switched, off, merged and unmerged in memory."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.api.adapters_of_one_base import LAYERS, a_lora, tuned
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

import graft
from graft.adapters.attach import adapted_layers, frozen_layers
from graft.api.adapter.extract import extract_adapter
from graft.cli.main import main
from graft.errors import GraftError
from graft.evaluate.generate import decodes_natively
from graft.kernels.backend.native_library import why_unavailable
from graft.model.lora_files import read_lora

IDS = torch.arange(40, 64)[None]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def two(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    first = a_lora(folder / "first", str(tiny_base), rank=4, seed=1, scaling=2.0)
    return first, a_lora(folder / "se.cond", str(tiny_base), rank=6, seed=2, scaling=1.5)


@pytest.fixture(scope="module")
def run(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of qalora, whose base is quantised."""
    out = tmp_path_factory.mktemp("run") / "run"
    config = graft.TrainConfig(
        model=str(tiny_base),
        data=str(rows),
        out=str(out),
        steps=4,
        learning_rate=0.05,
        device="cpu",
    )
    graft.finetune(config)
    return out


def with_updates(base: Path, adapters: dict[Path, float]) -> PreTrainedModel:
    """A plain model with the weighted updates added to its weights."""
    model, _ = graft.load(base, "float32", "cpu")
    with torch.no_grad():
        for folder, weight in adapters.items():
            for name, layer in read_lora(folder).layers.items():
                A, B = layer.update()
                model.get_submodule(name).weight += (weight * (B @ A)).float()
    return model


def test_updates_are_added_each_times_its_weight(two: tuple[Path, Path], tiny_base: Path) -> None:
    model, _ = graft.load(tiny_base, "float32", "cpu")
    names = [graft.load_adapter(model, folder) for folder in two]
    assert names == ["first", "se_cond"] == graft.adapter_names(model)
    expected = logits(with_updates(tiny_base, dict.fromkeys(two, 1.0)))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    graft.set_adapters(model, {"first": 0.5, "se_cond": -2.0})
    assert graft.active_adapters(model) == {"first": 0.5, "se_cond": -2.0}
    weighted = logits(with_updates(tiny_base, {two[0]: 0.5, two[1]: -2.0}))
    torch.testing.assert_close(logits(model), weighted, rtol=0, atol=1e-5)
    graft.set_adapters(model, ["se_cond"])
    alone = logits(with_updates(tiny_base, {two[1]: 1.0}))
    torch.testing.assert_close(logits(model), alone, rtol=0, atol=1e-5)
    assert (weighted - expected).abs().max() > 0.1


def test_without_adapters_it_is_the_model_of_before_bit_for_bit(
    two: tuple[Path, Path], tiny_base: Path
) -> None:
    model, _ = graft.load(tiny_base, "float32", "cpu")
    before = logits(model)
    kinds = {name: type(module) for name, module in model.named_modules() if name}
    for folder in two:
        graft.load_adapter(model, folder)
    both = logits(model)
    with graft.no_adapters(model):
        assert torch.equal(logits(model), before)
        assert {name: type(one) for name, one in model.named_modules() if name} == kinds
        assert graft.adapter_names(model) == ["first", "se_cond"]
    assert torch.equal(logits(model), both)
    graft.remove_adapter(model, "first")
    assert graft.adapter_names(model) == ["se_cond"]
    graft.set_adapters(model, [])
    model.to(torch.float64).to(torch.float32)  # the plain modules get other storage
    graft.set_adapters(model, ["se_cond"])
    alone = logits(with_updates(tiny_base, {two[1]: 1.0}))
    torch.testing.assert_close(logits(model), alone, rtol=0, atol=1e-5)
    graft.remove_adapter(model, "se_cond")
    assert torch.equal(logits(model), before) and not graft.adapter_names(model)


def test_the_same_of_transposed_layers(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 320, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(base)
    other = tuned(base, tmp_path / "tuned", lambda name: ".c_" in name, size=0.1)
    extract_adapter(base, other, tmp_path / "adapter", energy=1.0)
    model, _ = graft.load(base, "float32", "cpu")
    before, expected = logits(model), logits(graft.load(other, "float32", "cpu")[0])
    graft.load_adapter(model, tmp_path / "adapter")
    assert (logits(model) - expected).abs().max() < 1e-4 < (before - expected).abs().max()
    graft.set_adapters(model, [])
    assert torch.equal(logits(model), before)


def test_unmerging_gives_the_very_bits_back(
    two: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    model, _ = graft.load(tiny_base, "float32", "cpu")
    for folder in two:
        graft.load_adapter(model, folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model)
    assert not decodes_natively(model, 20)
    errors = graft.merge_in_memory(model)
    assert set(errors) == set(LAYERS)
    assert max(error.relative_to_update for error in errors.values()) < 1e-5
    merged = logits(model)
    assert not torch.equal(merged, before)
    torch.testing.assert_close(merged, before, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    if why_unavailable() is None:
        assert decodes_natively(model, 20)
    for switch in (
        lambda: graft.set_adapters(model, []),
        lambda: graft.remove_adapter(model, "first"),
        lambda: graft.load_adapter(model, two[0], "again"),
        lambda: graft.merge_in_memory(model),
    ):
        with pytest.raises(GraftError, match="merged in memory; unmerge them first"):
            switch()
    graft.unmerge(model)
    assert torch.equal(logits(model), before)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    torch.testing.assert_close(logits(saved), before, rtol=0, atol=1e-5)
    with graft.no_adapters(model):
        model.save_pretrained(tmp_path / "off")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "off", dtype=torch.float32)
    assert torch.equal(logits(saved), logits(graft.load(tiny_base, "float32", "cpu")[0]))


def test_a_grid_adapter_merges_exactly_and_has_no_weight(run: Path, tiny_base: Path) -> None:
    model, _ = graft.load(run, "float32", "cpu")
    before = logits(model)
    packed = {name: layer.packed for name, layer in frozen_layers(model)}
    errors = graft.merge_in_memory(model)
    assert all(error.exact for error in errors.values())
    assert torch.equal(logits(model), before)
    graft.unmerge(model)
    assert torch.equal(logits(model), before)
    for name, layer in frozen_layers(model):
        assert all(one is layer.packed[key] for key, one in packed[name].items())
    with pytest.raises(GraftError, match="'default' moves scales and offsets"):
        graft.set_adapters(model, {"default": 0.5})
    with graft.no_adapters(model):
        base, _ = graft.load(run / "base", "float32", "cpu")
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), before)


def test_what_does_not_fit_leaves_the_model_as_it_was(
    two: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    model, _ = graft.load(tiny_base, "float32", "cpu")
    before = logits(model)
    lora = read_lora(two[0])
    foreign = tmp_path / "foreign"
    from graft.model.lora_files import LoraFiles, write_lora

    renamed = {f"other.{name}": layer for name, layer in lora.layers.items()}
    write_lora(LoraFiles(renamed, "elsewhere"), foreign)
    with pytest.raises(GraftError, match="belongs to no linear layer"):
        graft.load_adapter(model, foreign)
    assert torch.equal(logits(model), before)
    assert not any(True for _ in frozen_layers(model))
    graft.load_adapter(model, two[0])
    with pytest.raises(GraftError, match="did you mean 'first'"):
        graft.set_adapters(model, ["frist"])
    assert graft.active_adapters(model) == {"first": 1.0}
    with pytest.raises(GraftError, match="already has an adapter named 'first'"):
        graft.load_adapter(model, two[1], "first")
    assert graft.load_adapter(model, two[0]) == "first_2"
    assert len([*adapted_layers(model)]) == len(LAYERS)


# The commands -------------------------------------------------------------------------------------


def test_generate_and_eval_take_adapters_or_none(
    two: tuple[Path, Path],
    run: Path,
    tiny_base: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*words: object) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    def loss(*words: object) -> float:
        return json.loads(said("eval", *words, "--data", rows, "--json", "--dtype", "float32"))[
            "loss"
        ]

    prompt = ["--prompt", "the lamp", "--max-new-tokens", 12]
    plain = said("generate", tiny_base, *prompt)
    both = said("generate", tiny_base, *prompt, "--adapter", two[0], "--adapter", two[1])
    assert both != plain
    off = ["--adapter-weights", 0, "0.0"]
    assert said("generate", tiny_base, *prompt, "--adapter", *two, *off) == plain
    summed = with_updates(tiny_base, dict.fromkeys(two, 1.0))
    summed.save_pretrained(tmp_path / "summed")
    for file in tiny_base.glob("*token*"):
        shutil.copy(file, tmp_path / "summed")
    assert said("generate", tmp_path / "summed", *prompt) == both
    assert loss(tiny_base, "--adapter", *two) == pytest.approx(loss(tmp_path / "summed"), abs=1e-5)
    raw = [*prompt, "--raw"]
    assert said("generate", run, *raw, "--no-adapter") == said("generate", run / "base", *raw)
    assert said("generate", run, *raw) != said("generate", run, *raw, "--no-adapter")
    assert loss(run, "--no-adapter") == loss(run / "base")
    # A run's adapter on its base is the run, prompts dressed as its rows were.
    assert said("generate", run / "base", *prompt, "--adapter", run) == said(
        "generate", run, *prompt
    )
    assert main(["generate", str(run), *map(str, prompt), "--no-adapter", "--adapter", "x"]) == 1
    assert "contradict each other" in capsys.readouterr().err
    named = shutil.copytree(two[0], tmp_path / "named")
    own = json.loads((named / "graft_adapter.json").read_text())
    (named / "graft_adapter.json").write_text(json.dumps(own | {"base": "another"}))
    assert main(["eval", str(tiny_base), "--data", str(rows), "--adapter", str(named)]) == 0
    assert "was trained on another; here it is put on" in capsys.readouterr().err


def test_no_adapter_of_a_dense_run_is_the_original_bit_for_bit(
    tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    from graft.api.run.folder import load_any

    config = graft.TrainConfig(
        model=str(tiny_base),
        data=str(rows),
        out=str(tmp_path / "run"),
        steps=2,
        method="lora",
        device="cpu",
        learning_rate=0.05,
    )
    graft.finetune(config)
    original = logits(load_any(tiny_base, "float32", "cpu").model)
    off = load_any(tmp_path / "run", "float32", "cpu", with_adapter=False).model
    assert torch.equal(logits(off), original) and not [*frozen_layers(off)]
    assert not torch.equal(logits(load_any(tmp_path / "run", "float32", "cpu").model), original)


def test_chat_switches_adapters(
    two: tuple[Path, Path],
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [
        "the",
        "/adapter first",
        "the",
        "/adapter none",
        "the",
        "/adapter frist",
        "/adapters",
        "/adapter first se_cond",
        "the",
        "/adapter",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    words = ["chat", tiny_base, "--adapter", *two, "--max-new-tokens", 6]
    assert main([str(word) for word in words]) == 0
    out, err = capsys.readouterr()
    answers = out.replace("> ", "").splitlines()
    monkeypatch.setattr("sys.stdin", io.StringIO("the\n"))
    assert main(["chat", str(tiny_base), "--max-new-tokens", "6"]) == 0
    plain = capsys.readouterr().out.replace("> ", "").splitlines()[0]
    assert len(answers) >= 4 and answers[2] == plain
    assert answers[0] == answers[3] and len({*answers[:3]}) == 3
    assert "/adapter NAME ... turns adapters on" in err
    assert "first: on\nse_cond: off" in err and "did you mean 'first'" in err
