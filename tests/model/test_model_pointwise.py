"""graft's norms and gates in transformers' models: the same results, names and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from graft.kernels.backend import native_library
from graft.model.running import pointwise
from graft.model.running.pointwise import GatedMLP, RMSNorm, own_gates, own_norms, use_own_pointwise

pytestmark = pytest.mark.skipif(
    native_library.why_unavailable() is not None,
    reason=f"native backend: {native_library.why_unavailable()}",
)

FAMILIES = "glm4 granite llama mistral mixtral olmo2 phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3"
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
IDS = torch.randint(96, (2, 23), generator=torch.Generator().manual_seed(2))


def model_of(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 + torch.rand_like(parameter))
    model.get_input_embeddings().requires_grad_(True)
    return model.eval()


def outcome(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and the gradient that reaches the embeddings."""
    weight = model.get_input_embeddings().weight
    weight.grad = None
    logits = model(IDS, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), weight.grad.clone()


@pytest.mark.parametrize("family", FAMILIES.split())
def test_results_names_and_gradients_are_transformers_own(family: str) -> None:
    model = model_of(family)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    expected, names = outcome(model), list(model.state_dict())
    norms, gates = len(own_norms(model)), len(own_gates(model))
    assert norms + gates > 0
    assert use_own_pointwise(model) == norms + gates
    found = [type(module) for module in model.modules()]
    assert (found.count(RMSNorm), found.count(GatedMLP)) == (norms, gates)
    assert list(model.state_dict()) == names
    for ours, theirs in zip(outcome(model), expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert use_own_pointwise(model) == 0


def test_in_bfloat16() -> None:
    model = model_of("llama").bfloat16()
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    expected = outcome(model)
    use_own_pointwise(model)
    for ours, theirs in zip(outcome(model), expected, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_what_is_left_alone() -> None:
    """Norms that train; other activations; a model with code of its own; no backend."""
    model = model_of("llama", hidden_act="gelu")
    assert own_gates(model) == []
    assert use_own_pointwise(model) == 0  # every norm trains
    frozen = model_of("llama").requires_grad_(False)
    frozen.model.norm.weight.requires_grad_(True)
    assert use_own_pointwise(frozen) == 4 + 2
    assert not isinstance(frozen.model.norm, RMSNorm)
    own = model_of("llama").requires_grad_(False)
    for module in own.modules():
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {"__module__": "somebody_elses"})
    assert use_own_pointwise(own) == 0


def test_nothing_is_replaced_without_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not pointwise.has_own_pointwise(torch.device("meta"))
    monkeypatch.setattr(pointwise, "has_own_pointwise", lambda device: False)
    assert use_own_pointwise(model_of("llama").requires_grad_(False)) == 0
