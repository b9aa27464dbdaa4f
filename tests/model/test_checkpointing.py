"""Recomputing changes no bit of a gradient, and what is kept is not computed again."""

from __future__ import annotations

import gc
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from graft.adapters.attach import adapter_parameters, attach_adapter, frozen_layers, replace_module
from graft.adapters.config import AdapterConfig
from graft.errors import GraftError
from graft.formats.base import WeightFormat
from graft.formats.registry import make_format
from graft.kernels.backend import native_library
from graft.model.running.attention import use_own_attention
from graft.model.running.checkpointing import (
    CHECKPOINTING,
    Checkpointing,
    _kind,
    _out_features,
    _Policy,
    enable_checkpointing,
    keeps_attention,
    keeps_product,
)
from graft.model.running.loss import target_loss
from graft.model.targets import freeze_layers, select_targets

HIDDEN, LAYERS, LENGTH = 64, 3, 21
_TOKENS = {"vocab_size": 90, "bos_token_id": 0, "eos_token_id": 0}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=172,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            **_TOKENS,
        )
    )


def gpt2() -> PreTrainedModel:
    """Drops out a tenth of the embeddings, attention weights and block outputs."""
    return GPT2LMHeadModel(GPT2Config(n_embd=HIDDEN, n_layer=LAYERS, n_head=4, **_TOKENS))


def gemma2() -> PreTrainedModel:
    """Has a norm between its MLP and the sum."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=HIDDEN,
            intermediate_size=172,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            pad_token_id=0,
            **_TOKENS,
        )
    )


MODELS = {"llama": llama, "gpt2": gpt2}
METHODS: dict[str, tuple[AdapterConfig, WeightFormat | None]] = {
    "lora": (AdapterConfig(method="lora", rank=4), None),
    "lora-dropout": (AdapterConfig(method="lora", rank=4, dropout=0.2), None),
    "dora": (AdapterConfig(method="lora", rank=4, dora=True), None),
    "dora-dropout": (
        AdapterConfig(method="qlora", rank=4, dora=True, dropout=0.2),
        make_format("nf4"),
    ),
    "qlora": (AdapterConfig(method="qlora", rank=4), make_format("nf4", {"double_quant": True})),
    "qlora-dropout": (AdapterConfig(method="qlora", rank=4, dropout=0.2), make_format("nf4")),
    "qalora": (AdapterConfig(method="qalora", rank=4), make_format("int")),
    "qalora-scales": (AdapterConfig(method="qalora", rank=4, grid_rank=2), make_format("int")),
    "affine": (AdapterConfig(method="affine"), make_format("int")),
    "merge_aware": (AdapterConfig(method="merge_aware"), make_format("latent")),
}


def adapted(family: str, method: str, checkpointing: Checkpointing) -> PreTrainedModel:
    """Return the same model and adapter in training mode for every choice."""
    torch.manual_seed(3)
    model = MODELS[family]().requires_grad_(False)
    config, weight_format = METHODS[method]
    names = select_targets(model, ())
    freeze_layers(model, names)
    if weight_format is not None:
        for name, layer in list(frozen_layers(model)):
            packed = weight_format.pack(layer.dense_weight())
            replace_module(model, name, layer.replaced(weight_format, packed))
    attach_adapter(model, names, config)
    for parameter in adapter_parameters(model, "default").values():
        nn.init.normal_(parameter, std=0.05)
    enable_checkpointing(model, checkpointing)
    return model.train()


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(90, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids, ids


class _Count(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    def products(self) -> int:
        """Return the forward products of frozen layers."""
        named = [name for name in self.calls if name.startswith("graft::") and "linear" in name]
        return sum(self.calls[name] for name in named)

    def attention(self) -> int:
        names = [name for name in self.calls if name.startswith("aten::_scaled_dot_product")]
        return sum(self.calls[name] for name in names if "backward" not in name)


def step(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor], _Count, _Count]:
    """Return loss, gradients, and what ran forward and backward."""
    with torch.no_grad():
        target_loss(model, *batch())  # the first call looks at the model
    torch.manual_seed(11)
    with _Count() as forward:
        loss, _ = target_loss(model, *batch())
    with _Count() as backward:
        loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), named, forward, backward


@pytest.mark.parametrize("checkpointing", ["products", "half", "layers"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", MODELS)
def test_gradients_are_equal_bit_for_bit(family, method, checkpointing) -> None:
    expected_loss, expected, _, _ = step(adapted(family, method, "none"))
    loss, gradients, _, _ = step(adapted(family, method, checkpointing))
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys() and gradients
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_full_training_gets_the_same_gradients(checkpointing) -> None:
    def full(choice: Checkpointing) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = llama().train()
        enable_checkpointing(model, choice)
        return step(model)[1]

    expected = full("none")
    for name, gradient in full(checkpointing).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("method", ["qlora", "qlora-dropout", "qalora"])
@pytest.mark.parametrize("family", MODELS)
def test_what_is_kept_is_not_computed_again(family, method) -> None:
    recomputed = {}
    for choice in CHECKPOINTING:
        _, _, forward, backward = step(adapted(family, method, choice))
        recomputed[choice] = (backward.products(), backward.attention())
    in_a_layer = {"llama": 7, "gpt2": 4}[family]
    assert forward.products() == in_a_layer * LAYERS
    # Attention that drops out weights (GPT-2's) is unfused on a CPU.
    attention = LAYERS if family == "llama" else 0
    assert forward.attention() == attention
    assert recomputed["none"] == recomputed["products"] == (0, 0)
    narrowing = {"llama": 3, "gpt2": 1}[family]  # k, v and down; c_proj of the MLP
    # up; of GPT-2's two wide products the second
    assert recomputed["half"] == (LAYERS, 0)
    assert recomputed["layers"] == ((in_a_layer - narrowing) * LAYERS, attention)


def kept_bytes(family: str, checkpointing: Checkpointing) -> int:
    """Return the memory of the outputs that the layers keep of a forward pass."""
    model = adapted(family, "qlora", checkpointing)
    with torch.no_grad():
        target_loss(model, *batch())
    gc.collect()
    loss, _ = target_loss(model, *batch())
    kept = [one.val for one in gc.get_objects() if type(one).__name__ == "_VersionWrapper"]
    storages = {one.data_ptr(): one.untyped_storage() for one in kept if isinstance(one, Tensor)}
    loss.backward()
    return sum(storage.nbytes() for storage in storages.values() if storage.nbytes() > 4)


@pytest.mark.parametrize("checkpointing", ["products", "half", "layers"])
@pytest.mark.parametrize(("family", "forgotten"), [("llama", LAYERS), ("gpt2", 0), ("gemma2", 0)])
def test_a_last_output_that_is_only_added_is_not_kept(
    family, forgotten, checkpointing, monkeypatch
) -> None:
    """Dropout (GPT-2's) or a norm (Gemma 2's) between the product and the sum reads it again."""
    monkeypatch.setitem(MODELS, "gemma2", gemma2)
    found = kept_bytes(family, checkpointing)
    monkeypatch.setattr("graft.model.running.checkpointing.forget_output", lambda *_: None)
    everything = kept_bytes(family, checkpointing)
    assert everything - found == forgotten * 4 * 2 * LENGTH * HIDDEN
    assert everything > 0


@pytest.mark.skipif(native_library.why_unavailable() is not None, reason="no native backend")
def test_own_attention_is_kept_where_pytorch_s_would_be() -> None:
    found, recomputed = {}, {}
    for choice in CHECKPOINTING:
        model = adapted("llama", "qlora", choice)
        assert use_own_attention(model)
        _, found[choice], forward, backward = step(model)
        assert forward.calls["graft::attention"] == LAYERS and forward.attention() == 0
        recomputed[choice] = backward.calls["graft::attention"]
    assert recomputed == {"none": 0, "products": 0, "half": 0, "layers": LAYERS}
    for gradients in found.values():
        assert gradients.keys() == found["none"].keys()
        assert all(torch.equal(gradients[name], found["none"][name]) for name in gradients)


def test_a_pass_without_gradients_recomputes_nothing() -> None:
    model = adapted("llama", "qlora", "layers").eval()
    with torch.no_grad():
        expected, _ = target_loss(model, *batch())
        with _Count() as training:
            loss, _ = target_loss(model.train(), *batch())
    assert torch.equal(loss, expected)
    assert training.products() == 7 * LAYERS


def test_the_first_layer_s_input_gets_no_gradient() -> None:
    counts = {}
    for choice in CHECKPOINTING:
        _, _, _, backward = step(adapted("llama", "qlora", choice))
        counts[choice] = backward.calls["graft::grad_input"]
    assert len(set(counts.values())) == 1, "checkpointing asks for more input gradients"


def test_unfused_attention_that_drops_out() -> None:
    def gradients(choice: Checkpointing) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = llama().train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        enable_checkpointing(model, choice)
        return step(model)[1]

    expected = gradients("none")
    for choice in ("products", "half", "layers"):
        for name, gradient in gradients(choice).items():
            assert torch.equal(gradient, expected[name]), name


class _Features(TorchDispatchMode):
    """Compares what a product's shapes alone say of its outputs with the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(_kind(func), int):
            before: Any = SimpleNamespace()  # as torch 2.11 asks: there is no output yet
            after: Any = SimpleNamespace(op_output=output)
            assert _out_features(before, func, args) == _out_features(after, func, args), func
            self.seen.add(func.name().partition(".")[0])
        return output


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", MODELS)
def test_outputs_have_the_features_that_their_shapes_alone_say(family: str, method: str) -> None:
    model = adapted(family, method, "none")
    with _Features() as features:
        model(input_ids=batch()[0])
    assert any(name.startswith("graft::") for name in features.seen)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fused_attention_that_drops_out_runs_again_for_its_random_numbers(dropout) -> None:
    query = torch.empty(2, 4, LENGTH, 16, device="meta")
    context: Any = SimpleNamespace(is_recompute=False, op_output=None)
    fused = torch.ops.aten._scaled_dot_product_flash_attention.default
    masked = torch.ops.aten._scaled_dot_product_efficient_attention.default
    calls = {
        "position": (fused, (query, query, query, dropout, True), {}),
        "name": (masked, (query, query, query, None, True), {"dropout_p": dropout}),
    }
    for op, args, kwargs in calls.values():
        kept = _Policy("products", HIDDEN)(context, op, *args, **kwargs)
        assert (kept == CheckpointPolicy.MUST_SAVE) == (dropout == 0)


def test_which_products_are_kept() -> None:
    # Llama 7B: q, gate, down, LoRA's two
    shapes = [(4096, 4096), (4096, 11008), (11008, 4096), (4096, 16), (16, 4096)]
    kept = {choice: [keeps_product(choice, 4096, *s) for s in shapes] for choice in CHECKPOINTING}
    assert kept == {
        "none": [False] * 5,
        "products": [True, True, True, True, False],
        "half": [True, True, True, True, False],
        "layers": [False, False, True, True, False],
    }
    # Of several wide ones every second.
    found = [keeps_product("half", 4096, 4096, 11008, before) for before in range(4)]
    assert found == [True, False, True, False]
    assert keeps_attention("products", 4096, 256) and keeps_attention("half", 4096, 256)
    assert not keeps_attention("layers", 4096, 4096)
    assert keeps_attention("layers", 4096, 8192)


def test_a_model_that_cannot_recompute_says_so() -> None:
    model = llama()
    model.supports_gradient_checkpointing = False
    enable_checkpointing(model, "none")
    with pytest.raises(GraftError, match="cannot recompute its layers; use --checkpointing none"):
        enable_checkpointing(model, "products")
