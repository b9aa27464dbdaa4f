"""Embedding and head stay in bfloat16 where the model computes in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft.adapters.config import AdapterConfig
from graft.api.load import load as load_public
from graft.api.original import take_the_rest
from graft.formats.registry import make_format
from graft.kernels.backend import native_library
from graft.layers.narrow import NarrowEmbedding, NarrowLinear, narrow
from graft.model import narrow as module
from graft.model.load import load_model
from graft.model.running.loss import target_loss
from graft.model.save import save_model
from graft.plan.skeleton import plan_model

pytestmark = pytest.mark.skipif(
    native_library.why_unavailable() is not None, reason="the native kernels were not built"
)

Checkpoint = Callable[..., Path]


def ends(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def loaded(folder: Path, **options: object) -> PreTrainedModel:
    return load_model(str(folder), **({"dtype": "float32", "device": "cpu"} | options)).model


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
def test_what_is_stored_narrow_stays_so_and_computes_the_same(
    checkpoint: Checkpoint,
    family: str,
    tokens: Tensor,
    logits: Callable[[PreTrainedModel], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint(family, torch.bfloat16)
    model = loaded(folder)
    assert [type(end) for end in ends(model)] == [NarrowEmbedding, NarrowLinear]
    assert {end.get_parameter("weight").dtype for end in ends(model)} == {torch.bfloat16}
    shared = ends(model)[0].get_parameter("weight") is ends(model)[1].get_parameter("weight")
    assert shared == (family == "llama-tied")
    monkeypatch.setattr(module, "keep_narrow", lambda *_: None)
    monkeypatch.setattr("graft.model.load.keep_narrow", lambda *_: None)
    wide = loaded(folder)
    assert ends(wide)[0].get_parameter("weight").dtype == torch.float32
    assert torch.equal(ends(model)[0](tokens), ends(wide)[0](tokens))
    torch.testing.assert_close(logits(model), logits(wide), rtol=1e-4, atol=1e-5)
    for one in (model, wide):
        one.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        target_loss(one, tokens, tokens)[0].backward()
    grads = [one.model.layers[0].mlp.up_proj.weight.grad for one in (model, wide)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_what_must_be_wide_is_wide(checkpoint: Checkpoint) -> None:
    plain = [nn.Embedding, nn.Linear]
    for model in (
        loaded(checkpoint("llama")),
        loaded(checkpoint("llama", torch.float16)),
        loaded(checkpoint("llama", torch.bfloat16), dtype="bfloat16"),
        loaded(checkpoint("llama", torch.bfloat16), trains_whole=True),
    ):
        assert [type(end) for end in ends(model)] == plain
    assert type(ends(loaded(checkpoint("gpt2", torch.bfloat16)))[1]) is nn.Linear


def test_a_folder_that_is_written_holds_the_same_tensors(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint("llama", torch.bfloat16)
    save_model(
        load_model(
            str(folder), weight_format=make_format("nf4", {}), dtype="float32", device="cpu"
        ),
        tmp_path / "saved",
    )
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "saved"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name], after[name])


def test_the_plan_counts_what_is_loaded(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama", torch.bfloat16)
    planned = plan_model(
        str(folder),
        weight_format=make_format("nf4", {}),
        adapter=AdapterConfig(method="qlora"),
        dtype="float32",
        device="cpu",
    )
    model = loaded(folder, weight_format=make_format("nf4", {}))
    packed = sum(p.nbytes for p in model.parameters() if p.dtype == torch.uint8)
    others = [p for p in model.parameters() if p.dtype == torch.bfloat16]
    assert sum(p.numel() for p in others) == 2 * 320 * 80 and packed
    assert planned.counts.other_bytes < 4 * sum(p.numel() for p in others)


def test_the_plan_counts_a_shared_weight_once(checkpoint: Checkpoint) -> None:
    planned = plan_model(
        str(checkpoint("llama-tied", torch.bfloat16)),
        weight_format=make_format("nf4", {}),
        adapter=AdapterConfig(method="qlora"),
        dtype="float32",
        device="cpu",
    )
    embedding, head = ends(planned.model)
    assert embedding.get_parameter("weight") is head.get_parameter("weight")
    assert planned.counts.other_bytes < 4 * 320 * 80


def test_a_weight_from_a_wider_original_is_not_rounded(checkpoint: Checkpoint) -> None:
    for family in ("llama", "llama-tied"):
        model, wide = loaded(checkpoint(family, torch.bfloat16)), loaded(checkpoint(family))
        take_the_rest(model, wide, ())
        for own, other in zip(ends(model), ends(wide), strict=True):
            assert torch.equal(own.get_parameter("weight"), other.get_parameter("weight"))


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_whoever_loads_a_model_gets_plain_modules(
    checkpoint: Checkpoint, family: str, tokens: Tensor, tmp_path: Path
) -> None:
    folder = checkpoint(family, torch.bfloat16)
    model, _ = load_public(folder, dtype="float32", device="cpu")
    assert [type(end) for end in ends(model)] == [nn.Embedding, nn.Linear]
    shared = ends(model)[0].get_parameter("weight") is ends(model)[1].get_parameter("weight")
    assert shared == (family == "llama-tied") and model.dtype == torch.float32
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert model.to(torch.bfloat16)(input_ids=tokens).logits.dtype == torch.bfloat16


def test_another_class_is_refused() -> None:
    with pytest.raises(TypeError, match="LayerNorm"):
        narrow(nn.LayerNorm(4))
