"""What save_pretrained writes of a model with packed or adapted layers is that very model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from transformers import AutoModelForCausalLM

from graft.adapters.attach import adapter_parameters, attach_adapter
from graft.adapters.config import AdapterConfig
from graft.api.load import load as load_public
from graft.errors import GraftError
from graft.formats.registry import make_format
from graft.model.save import save_model
from graft.model.saving import saved_whole
from graft.model.targets import freeze_layers, select_targets

KINDS = ["lora", "dora", "qalora", "nf4", "int8"]


@pytest.fixture
def adapted(load):
    """A function of (family, kind): a model with packed layers, adapters, or both."""

    def make(family: str, kind: str, **options: object):
        packed = {"qalora": "int", "nf4": "nf4", "int8": "int8"}.get(kind)
        if packed is not None:
            options["weight_format"] = make_format(packed)
        model = load(family, **options).model
        if kind in ("lora", "dora", "qalora"):
            names = select_targets(model, ())
            freeze_layers(model, names)
            attach_adapter(model, names, AdapterConfig(method=kind, rank=2))
            generator = torch.Generator().manual_seed(3)
            for parameter in adapter_parameters(model, "default").values():
                moved = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.data += moved.to(parameter.dtype)
        return saved_whole(model)

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "qwen2"])
def test_from_pretrained_reads_the_same_model(family, kind, adapted, logits, tmp_path) -> None:
    model = adapted(family, kind)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(model).__name__ == type(saved).__name__
    torch.testing.assert_close(logits(saved), logits(model), rtol=0, atol=2e-5)


def test_what_a_model_computes_in_rounds_no_merged_weight(adapted, tmp_path) -> None:
    model = adapted("llama", "lora", dtype="bfloat16")
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj"
    expected = model.get_submodule(name).effective_weight().float()
    assert torch.equal(saved.get_submodule(name).weight, expected)


@pytest.mark.parametrize("way", ["copied", "pickled"])
def test_a_copy_saves_so_too(way, adapted, logits, tmp_path) -> None:
    model = adapted("llama", "qalora")
    if way == "copied":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(logits(other), logits(model))
    other.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(saved), logits(model), rtol=0, atol=2e-5)


def test_a_state_is_taken_when_it_is_the_models_own(adapted, logits, tmp_path) -> None:
    # Trainer gives it, by name or, in earlier versions, in its place.
    model = adapted("llama", "lora")
    model.save_pretrained(tmp_path / "named", state_dict=model.state_dict())
    model.save_pretrained(tmp_path / "placed", True, model.state_dict())
    for folder in ("named", "placed"):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        torch.testing.assert_close(logits(saved.eval()), logits(model), rtol=0, atol=2e-5)
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    for state in (other, {}):
        with pytest.raises(GraftError, match="not this model's"):
            model.save_pretrained(tmp_path / "other", state_dict=state)
    assert not (tmp_path / "other").exists()


def test_a_merged_state_is_no_state_to_go_on_with(adapted, logits, tmp_path) -> None:
    model = adapted("llama", "lora")
    before = logits(model)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with pytest.raises(GraftError, match="no adapter to go on with"):
        model.load_state_dict(saved.state_dict(), strict=False)
    model.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), before)


def test_what_load_returns_saves_so(load, checkpoint, logits, tmp_path) -> None:
    plain, _ = load_public(checkpoint("llama"))
    assert type(plain) is type(AutoModelForCausalLM.from_pretrained(checkpoint("llama")))
    save_model(load("llama", weight_format=make_format("nf4")), tmp_path / "packed")
    packed, _ = load_public(tmp_path / "packed", dtype="float32")
    packed.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(saved), logits(packed), rtol=0, atol=2e-5)
