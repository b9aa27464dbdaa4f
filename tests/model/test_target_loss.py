"""The loss against a float64 loop over the targets."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from graft.adapters.attach import attach_adapter
from graft.adapters.config import AdapterConfig
from graft.model.running.loss import IGNORED, chunk_tokens, cross_entropy, splits, target_loss
from graft.model.targets import freeze_layers


def looped_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    total, count = 0.0, 0
    for row, wanted in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for position in range(1, len(wanted)):
            if wanted[position] == IGNORED:
                continue
            scores = row[position - 1]
            top = max(scores)
            log_sum = top + math.log(sum(math.exp(score - top) for score in scores))
            total += log_sum - scores[wanted[position]]
            count += 1
    return total, count


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_is_the_sum_over_the_targets(family, load, logits, tokens) -> None:
    model = load(family).model
    labels = tokens.clone()
    labels[0, :5] = IGNORED
    labels[1, 9:] = IGNORED
    with torch.no_grad():
        loss, count = target_loss(model, tokens, labels)
    expected, expected_count = looped_loss(logits(model), labels)
    assert count == expected_count == (13 - 5) + 8
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_first_token_is_never_a_target(load, tokens) -> None:
    model = load("llama").model
    labels = torch.full_like(tokens, IGNORED)
    labels[:, 0] = tokens[:, 0]
    with torch.no_grad():
        loss, count = target_loss(model, tokens, labels)
    assert (loss.item(), count) == (0.0, 0)


def test_padding_on_the_right_changes_nothing(load, tokens) -> None:
    model = load("llama").model
    padded = torch.cat([tokens, torch.zeros(2, 6, dtype=torch.long)], dim=1)
    labels = torch.cat([tokens, torch.full((2, 6), IGNORED)], dim=1)
    with torch.no_grad():
        (short, count), (long, padded_count) = (
            target_loss(model, tokens, tokens),
            target_loss(model, padded, labels),
        )
    assert count == padded_count == 24
    assert long.item() == pytest.approx(short.item(), rel=1e-5)


def test_softmax_is_in_float32_for_a_bfloat16_model(load, logits, tokens) -> None:
    model = load("llama", dtype="bfloat16").model
    with torch.no_grad():
        loss, _ = target_loss(model, tokens, tokens)
    expected, _ = looped_loss(logits(model), tokens)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# the chunks ---------------------------------------------------------------------------------------

_SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, tie_word_embeddings=False)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, tie_word_embeddings=True)),
    "softcapped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_SMALL, head_dim=8, final_logit_softcapping=2.0)
    ),
    "scaled": lambda: GraniteForCausalLM(GraniteConfig(**_SMALL, logits_scaling=7.0)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ),
}


class _LogitsFromTheInput(LlamaForCausalLM):
    """The logits depend on the input tokens beside the last hidden states."""

    def forward(self, input_ids, use_cache=None, logits_to_keep=0):
        out = super().forward(
            input_ids=input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep
        )
        kept = input_ids[:, logits_to_keep] if isinstance(logits_to_keep, Tensor) else input_ids
        out.logits = out.logits + 0.1 * kept[..., None]
        return out


class _WithoutPositions(LlamaForCausalLM):
    """Computes all logits, always."""

    def forward(self, input_ids, use_cache=None):
        return super().forward(input_ids=input_ids, use_cache=use_cache)


def small_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(50, (3, 17), generator=generator)
    labels = ids.where(torch.rand(3, 17, generator=generator) < 0.7, IGNORED)
    return ids, labels


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (loss / 3).backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def full_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """The loss from all logits at once, in float64 all the way."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
    return functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def assert_as_full_logits(model: nn.Module) -> None:
    """Compare loss and gradients with those of a float64 copy of the model."""
    model.eval()
    ids, labels = small_batch()
    loss, _ = target_loss(model, ids, labels)
    ours = gradients(model, loss)
    truth = copy.deepcopy(model).double()
    expected_loss = full_loss(truth, ids, labels)
    expected = gradients(truth, expected_loss)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert ours.keys() == expected.keys() and ours
    for name, gradient in expected.items():
        error = (ours[name].double() - gradient).norm()
        assert error <= 2e-5 * gradient.norm() + 1e-6, name


@pytest.fixture
def chunks_of_seven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.model.running.loss.chunk_tokens", lambda vocabulary, device: 7)
    monkeypatch.setattr("graft.model.running.loss.BLOCK_LOGITS", 3 * 50)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.usefixtures("chunks_of_seven")
def test_gradients_are_those_of_all_logits(name: str, frozen_head: bool) -> None:
    model = MODELS[name]()
    model.get_output_embeddings().requires_grad_(not frozen_head)
    assert_as_full_logits(model)
    assert splits(model, small_batch()[0])


@pytest.mark.usefixtures("chunks_of_seven")
def test_gradients_of_an_adapted_head() -> None:
    model = MODELS["llama"]().requires_grad_(False)
    freeze_layers(model, ["lm_head"])
    attach_adapter(model, ["lm_head"], AdapterConfig(method="lora", rank=3))
    adapter = model.lm_head.adapter("default")
    nn.init.normal_(adapter.B)
    assert_as_full_logits(model)  # the hidden states need no gradient
    assert adapter.A.grad is not None


@pytest.mark.parametrize("kind", [_LogitsFromTheInput, _WithoutPositions, OPTForCausalLM])
def test_a_model_with_another_way_to_its_logits_runs_as_a_whole(kind) -> None:
    config = LlamaConfig(**_SMALL)
    if kind is OPTForCausalLM:  # its body is never called: the decoder inside it is
        config = OPTConfig(
            vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, dropout=0.0,
        )  # fmt: skip
    model = kind(config)
    assert_as_full_logits(model)
    ids, labels = small_batch()
    assert not splits(model, ids)
    nothing, count = target_loss(model, ids, torch.full_like(labels, IGNORED))
    assert (nothing.item(), count) == (0.0, 0)


def test_evaluation_gives_the_numbers_of_training() -> None:
    model, (ids, labels) = MODELS["llama"](), small_batch()
    training, _ = target_loss(model, ids, labels)
    with torch.no_grad():
        evaluation, _ = target_loss(model, ids, labels)
    assert torch.equal(training.detach(), evaluation)
    assert not evaluation.requires_grad


def test_rows_can_be_batched_in_any_way() -> None:
    model, (ids, labels) = MODELS["llama"](), small_batch()
    whole, count = target_loss(model, ids, labels)
    together = gradients(model, whole)
    parts = [target_loss(model, ids[i : i + 1], labels[i : i + 1]) for i in range(3)]
    apart = gradients(model, sum(loss for loss, _ in parts))
    assert count == sum(part_count for _, part_count in parts)
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=1e-4, atol=1e-5)


def test_dropout_draws_what_the_whole_model_draws() -> None:
    model, (ids, labels) = MODELS["gpt2"](), small_batch()  # drops out a tenth everywhere
    model.train()
    torch.manual_seed(5)
    ours = gradients(model, target_loss(model, ids, labels)[0])
    torch.manual_seed(5)
    expected = gradients(model, full_loss(model, ids, labels))
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


def test_looking_at_a_model_changes_nothing_in_it() -> None:
    model, (ids, _) = MODELS["gpt2"](), small_batch()
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert splits(model, ids)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.transformer._forward_hooks


def test_no_targets_give_no_gradient() -> None:
    model, (ids, labels) = MODELS["llama"](), small_batch()
    loss, count = target_loss(model, ids, torch.full_like(labels, IGNORED))
    assert (loss.item(), count) == (0.0, 0)
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_an_impossible_target_costs_infinitely_much() -> None:
    logits, losses = torch.tensor([[0.0, 1.0, -200.0]]), torch.empty(1)
    cross_entropy(logits, torch.tensor([2]), losses, None)
    assert losses.item() == pytest.approx(201 + math.log(1 + math.exp(-1)), rel=1e-6)
    cross_entropy(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]), losses, None)
    assert losses.item() == math.inf
    cross_entropy(torch.tensor([[math.nan, 0.0]]), torch.tensor([1]), losses, None)
    assert math.isnan(losses.item())


class _Largest(TorchDispatchMode):
    """Records the largest output of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_logits_than_a_chunk_has(dtype: torch.dtype) -> None:
    vocabulary, tokens = 40_000, 4 * 160
    changes = {"vocab_size": vocabulary, "hidden_size": 16, "max_position_embeddings": 160}
    model = LlamaForCausalLM(LlamaConfig(**(_SMALL | changes))).to(dtype)
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    ids = torch.randint(vocabulary, (4, 160))
    chunk = chunk_tokens(vocabulary, torch.device("cpu"))
    assert 128 <= chunk <= 2**25 / (4 * vocabulary) < tokens / 3
    for grad in (True, False):
        with torch.set_grad_enabled(grad), _Largest() as largest:
            loss, _ = target_loss(model, ids, ids)
            if grad:
                loss.backward()
        weight = vocabulary * 16
        assert weight < largest.elements <= chunk * vocabulary
    assert model.model.layers[0].self_attn.q_proj.weight.grad.any()


@pytest.mark.parametrize("vocabulary", [50, 32_000, 128_256, 262_144])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_chunk_is_neither_large_nor_slow(vocabulary: int, device: str) -> None:
    tokens = chunk_tokens(vocabulary, torch.device(device))
    assert 128 <= tokens <= 512
    assert tokens == 128 or 4 * tokens * vocabulary <= 32 * 2**20


class _EndsWithTanh(nn.Linear):
    """A head whose last operation keeps the logits for its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


@pytest.mark.usefixtures("chunks_of_seven")
def test_logits_that_a_gradient_needs_are_not_written_over() -> None:
    model = MODELS["llama"]()
    head = model.get_output_embeddings()
    ended = _EndsWithTanh(head.in_features, head.out_features, bias=False)
    ended.weight = head.weight
    model.set_output_embeddings(ended)
    assert_as_full_logits(model)
    assert splits(model, small_batch()[0])


def test_logits_lie_once_in_memory() -> None:
    """Their gradient takes their place, and goes back through the head without a copy."""
    model = LlamaForCausalLM(LlamaConfig(**(_SMALL | {"vocab_size": 40_000, "hidden_size": 16})))
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    ids = torch.randint(40_000, (1, 20))
    target_loss(model, ids, ids)
    with _Count(19 * 40_000) as count:
        target_loss(model, ids, ids)
    assert count.fresh == 1


class _Count(TorchDispatchMode):
    """Counts the places in memory where outputs of as many numbers were put."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.fresh = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {leaf.data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.numel() == self.elements:
                self.fresh += leaf.data_ptr() not in given
        return out


def test_bfloat16_gradients_are_as_good_as_those_of_all_logits() -> None:
    model, (ids, labels) = MODELS["llama"]().to(torch.bfloat16), small_batch()
    truth = copy.deepcopy(model).double()
    expected = gradients(truth, full_loss(truth, ids, labels))
    theirs = gradients(model, full_loss(model, ids, labels))
    ours = gradients(model, target_loss(model, ids, labels)[0])
    for name, gradient in expected.items():
        error, usual = ((g[name].double() - gradient).norm() for g in (ours, theirs))
        assert error <= 1.3 * usual, name
