"""What --train chooses: kinds, ranges of layers, names; and that no gradient goes below it."""

from __future__ import annotations

import pytest
import torch

from graft.adapters.config import AdapterConfig
from graft.adapters.registry import method_of
from graft.errors import GraftError
from graft.model.running.attention import use_own_attention
from graft.model.running.checkpointing import CHECKPOINTING, enable_checkpointing
from graft.model.running.pointwise import use_own_pointwise
from graft.model.running.rotary import use_own_rotary
from graft.model.trained import select_trained, trained_note, what_trains


def names_of(model) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_no_word_chooses_everything(load) -> None:
    model = load("llama-tied").model
    assert select_trained(model, ()) == names_of(model)


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (["norms"], lambda name: "norm" in name),
        (["embeddings"], lambda name: "embed_tokens" in name),
        (["lm_head"], lambda name: name.startswith("lm_head")),
        (["attention"], lambda name: ".self_attn." in name),
        (["mlp"], lambda name: ".mlp." in name),
        (["layers.1-1"], lambda name: ".layers.1." in name),
        (["layers.-0"], lambda name: ".layers.0." in name),
        (["layers.0-.attention"], lambda name: ".self_attn." in name),
        (["layers.1-.q_proj"], lambda name: ".layers.1.self_attn.q_proj" in name),
        (["layers.1"], lambda name: ".layers.1." in name),
        (["q_proj", "model.norm.weight"], lambda name: "q_proj" in name or "model.norm" in name),
        (["up_proj.weight"], lambda name: "up_proj" in name),
        ([" norms , lm_head,"], lambda name: "norm" in name or "lm_head" in name),
        ([r".*\.[qv]_proj,norms"], lambda name: "norm" in name or name[-13:-8] in "q_proj v_proj"),
        ([r"model\.layers\.\d{1,2}\.mlp"], lambda name: ".mlp." in name),
    ],
)  # fmt: skip
def test_kinds_ranges_names_and_expressions_of_a_llama(words, chosen, load) -> None:
    model = load("llama").model
    expected = [name for name in names_of(model) if chosen(name)]
    assert expected and select_trained(model, words) == expected


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (["norms"], lambda name: ".ln_" in name),
        (["biases"], lambda name: name.endswith(".bias")),
        (["embeddings"], lambda name: ".wte" in name or ".wpe" in name),
        (["attention"], lambda name: ".attn." in name),
        (["mlp"], lambda name: ".mlp." in name),
        (["layers.1-"], lambda name: ".h.1." in name),
    ],
)
def test_the_same_words_choose_in_a_family_of_other_names(words, chosen, load) -> None:
    model = load("gpt2").model
    expected = [name for name in names_of(model) if chosen(name)]
    assert expected and select_trained(model, words) == expected


def test_norms_of_heads_are_both_norms_and_attention(load) -> None:
    model = load("gemma3").model
    both = {name for name in names_of(model) if ".q_norm" in name or ".k_norm" in name}
    assert both <= {*select_trained(model, ["norms"])} & {*select_trained(model, ["attention"])}


def test_a_tied_head_is_the_embedding_and_the_note_says_so(load) -> None:
    model = load("llama-tied").model
    names = select_trained(model, ["lm_head"])
    assert names == ["model.embed_tokens.weight"] == select_trained(model, ["embeddings"])
    note = trained_note(model, names)
    assert "lm_head.weight is model.embed_tokens.weight" in note
    count = model.get_parameter(names[0]).numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,} of {total:,} ({100 * count / total:.3g} %) parameters" in note


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("normes", "did you mean 'norms'"),
        ("q_prj", "did you mean 'q_proj'"),
        ("layers.1-7", "layers 0 to 1"),
        ("layers.1-0", "layers 0 to 1"),
        ("biases", "this model has no biases; it has norms, embeddings, lm_head, attention, mlp"),
        ("factors", "this model has no factors"),
        ("proj", "Kinds: norms"),
        ("(", "no valid regular expression"),
    ],
)
def test_a_word_that_chooses_nothing_is_refused_with_what_there_is(word, says, load) -> None:
    with pytest.raises(GraftError) as raised:
        select_trained(load("llama").model, [word, "norms"])
    assert says in str(raised.value)


def test_targets_of_runs_before_train_mean_what_they_meant(load) -> None:
    model = load("gpt2").model
    config = AdapterConfig(method="full", targets=("attn.c_proj",))
    assert what_trains(model, config) == [name for name in names_of(model) if "attn.c_proj" in name]
    both = AdapterConfig(method="full", targets=("c_fc",), train=("norms",))
    assert method_of(both).problems(both) and not method_of(config).problems(config)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_gradient_is_computed_below_the_lowest_trained_layer(
    family, checkpointing, load, tokens
) -> None:
    model = load(family).model
    config = AdapterConfig(method="full", train=("layers.1-1.mlp",))
    use_own_attention(model)
    enable_checkpointing(model, checkpointing)
    trained = method_of(config).make_trainable(model, what_trains(model, config), config)
    use_own_pointwise(model)
    use_own_rotary(model)
    layers = [model.get_submodule(name.partition(".1.")[0]) for name in trained][0]
    seen: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(layers):
        layer.register_forward_hook(
            lambda _, __, output, index=index: seen.__setitem__(
                index, output[0] if isinstance(output, tuple) else output
            )
        )
    model.train()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert seen[0].grad_fn is None and not seen[0].requires_grad
    assert seen[1].grad_fn is not None
    with_gradient = {name for name, one in model.named_parameters() if one.grad is not None}
    assert with_gradient == {name.replace(".base", "") for name in trained}
