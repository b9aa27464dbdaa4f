"""Attention whose queries and keys graft rotates: Transformers' results, names and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from graft.model.families import FAMILIES
from graft.model.running.attention import use_own_attention
from graft.model.running.rotary import RotaryAttention, replace_attention, use_own_rotary

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_bias": True,
}
IDS = torch.randint(96, (2, 23), generator=torch.Generator().manual_seed(2))
ROTATED = [row.model_type for row in FAMILIES.values() if row.attention]


def model_of(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **changes))
    assert use_own_attention(model)
    return model.requires_grad_(True)


def outcome(model: PreTrainedModel) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(IDS, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("family", ROTATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_names_and_gradients_are_transformers_own(family: str, dtype: torch.dtype) -> None:
    windowed = {"sliding_window": 5} if family == "mistral" else {}
    model = model_of(family, **windowed).to(dtype)
    expected, names = outcome(model), list(model.state_dict())
    assert replace_attention(model) == 2
    assert sum(isinstance(module, RotaryAttention) for module in model.modules()) == 2
    assert list(model.state_dict()) == names
    found = outcome(model)
    assert torch.equal(found[0], expected[0])
    for ours, theirs in zip(found, expected, strict=True):  # sums in another order, of some
        assert (ours - theirs).norm() <= 2 * torch.finfo(dtype).eps * theirs.norm()
    assert replace_attention(model) == 0
    # With the keys of earlier tokens, as when it generates.
    model.eval()
    generated = model.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 8)


def test_a_window_bounds_how_far_it_looks_back() -> None:
    model = model_of("mistral", sliding_window=5)
    replace_attention(model)
    ids = IDS[:1].clone()
    before = model(ids, use_cache=False).logits[0, -1]
    ids[0, 0] = (ids[0, 0] + 1) % 96  # beyond two layers' windows
    assert torch.equal(model(ids, use_cache=False).logits[0, -1], before)


def test_nothing_is_replaced_where_no_kernel_is_quicker() -> None:
    assert use_own_rotary(model_of("llama")) == 0


def test_another_attention_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.model.running.rotary.backend_of", lambda name, device: "triton")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    assert use_own_rotary(model) == 0
