"""llama.cpp runs what graft exports: same tokens, same logits, same continuations.

llama.cpp rounds the activations of a Q4_1 product to 8 bits, so the logits of quantised models are
close and not equal; unquantised models agree to float32 rounding. Its cache of keys and values,
float16 by default, is kept in float32 here: it has nothing to do with the file.
"""

from __future__ import annotations

import copy
import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graft.adapters.attach import frozen_layers, replace_module
from graft.export.gguf.write import export_gguf
from graft.formats.dense import DenseFormat
from graft.formats.int_group import IntGroupFormat
from graft.model.load import load_model
from graft.model.targets import freeze_layers, select_targets

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="needs llama-cpp-python: make test-peers installs it"
)

CASES = [
    ("babyllama-361-1m", 4, 32),
    ("babyllama-361-1m", 3, 32),
    ("babyllama-361-1m", 2, 32),
    ("stories260k", 4, 32),
    ("mixed-13m", 4, 32),
    ("mixed-13m", 2, 64),
]
SURE = (("babyllama-361-1m", 4), ("babyllama-361-1m", 3))
"""Models that are sure enough of their next token for all greedy continuations to be equal."""
NEAR_TIE = 0.1
"""Where the two best logits are nearer than this, llama.cpp's 8-bit activations may swap them."""
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces first,  two inside and one last ",
    "tabs\tand\n\nnew lines\r\n  \n end",
    "She didn't; they'll, I'VE: 3.14159 + 12345 = $100% (e.g. a_b) [x] {y} <z>",
    "naïve café, Ünïcode, 日本語, Привет, 🎉🎉 and \u200b",
    "name[The Eagle], eatType[coffee shop], priceRange[less than £20]",
    "CamelCase snake_case kebab-case http://example.org/?q=1&r=2",
    "a",
    "\n",
]
SPECIAL_TEXTS = ["One story.</s>Another</s>", "Once<|im_start|>upon\n<|im_end|>a time<|endoftext|>"]
"""Texts with the models' special tokens, which llama.cpp knows as such only when asked."""


@contextmanager
def running(path: Path, tokens: int = 256) -> Iterator[llama_cpp.Llama]:
    engine = llama_cpp.Llama(
        str(path),
        n_ctx=tokens,
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    try:
        yield engine
    finally:
        engine.close()


def their_logits(engine: llama_cpp.Llama, ids: list[int]) -> torch.Tensor:
    engine.reset()
    engine.eval(ids)
    return torch.from_numpy(np.array(engine.scores[: len(ids)])).double()


def their_continuation(engine: llama_cpp.Llama, ids: list[int], length: int) -> list[int]:
    engine.reset()
    engine.eval(ids)
    made = []
    for _ in range(length):
        made.append(int(np.argmax(engine.scores[engine.n_tokens - 1])))
        engine.eval(made[-1:])
    return made


def our_continuations(model: LlamaForCausalLM, prompts: list[list[int]], length: int) -> list:
    ids, width = torch.tensor(prompts), len(prompts[0])
    cache = None
    with torch.no_grad():
        for _ in range(length):
            step = ids if cache is None else ids[:, -1:]
            output = model(step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
    return ids[:, width:].tolist()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-bit")
def exported(request, shared_models, tmp_path_factory):
    name, bits, group_size = request.param
    loaded = load_model(
        str(shared_models / name), weight_format=IntGroupFormat(bits, group_size), dtype="float32"
    )
    path = tmp_path_factory.mktemp("gguf") / f"{name}.gguf"
    export_gguf(loaded.model, loaded.tokenizer, path, unquantised="F32", name=name)
    with running(path) as engine:
        yield loaded.model, loaded.tokenizer, engine, (name, bits)


def story_ids(tokenizer, text: str, length: int) -> list[int]:
    """Ids of a story with BOS before it, also where the tokenizer itself puts none."""
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][
        :length
    ]


def test_tokenisation(exported, stories):
    _, tokenizer, engine, _ = exported
    for text in TEXTS + stories[:20]:
        found = engine.tokenize(text.encode(), add_bos=True, special=False)
        assert found == tokenizer(text)["input_ids"], text
    for text in SPECIAL_TEXTS:
        found = engine.tokenize(text.encode(), add_bos=True, special=True)
        assert found == tokenizer(text)["input_ids"], text


def test_logits_and_perplexity(exported, stories):
    model, tokenizer, engine, _ = exported
    losses, divergence, count = [0.0, 0.0], 0.0, 0
    for text in stories[:40]:
        ids = story_ids(tokenizer, text, 128)
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        theirs = their_logits(engine, ids).log_softmax(-1)
        divergence += (ours.exp() * (ours - theirs)).sum().item()
        targets = torch.tensor(ids[1:]).unsqueeze(-1)
        for which, found in enumerate((ours, theirs)):
            losses[which] -= found[:-1].gather(-1, targets).sum().item()
        count += len(ids)
    assert divergence / count <= 1e-3
    ours_ppl, theirs_ppl = (np.exp(loss / (count - 40)) for loss in losses)
    assert abs(theirs_ppl / ours_ppl - 1) <= 0.005


def test_greedy_continuations(exported, stories):
    model, tokenizer, engine, case = exported
    prompts = [story_ids(tokenizer, text, 24) for text in stories[:20]]
    ours = our_continuations(model, prompts, 64)
    theirs = [their_continuation(engine, prompt, 64) for prompt in prompts]
    gaps = []
    for prompt, our, their in zip(prompts, ours, theirs, strict=True):
        if our != their:
            same = next(i for i in range(64) if our[i] != their[i])
            with torch.no_grad():
                logits = model(torch.tensor([prompt + our[:same]])).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            gaps.append(round(best - second, 3))
    assert all(gap < NEAR_TIE for gap in gaps), gaps
    assert case not in SURE or not gaps, gaps


def test_same_weights_unquantised(exported, stories, tmp_path):
    """Without 8-bit activations the two agree far more closely: the weights are the same."""
    model, tokenizer, _, _ = exported
    plain = copy.deepcopy(model)
    for name, layer in list(frozen_layers(plain)):
        weight = {"weight": layer.dense_weight()}
        replace_module(plain, name, layer.replaced(DenseFormat(), weight))
    export_gguf(plain, tokenizer, tmp_path / "t.gguf", unquantised="F32", name="plain")
    ids = story_ids(tokenizer, stories[0], 128)
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    with running(tmp_path / "t.gguf") as engine:
        theirs = their_logits(engine, ids).log_softmax(-1)
    assert (ours.exp() * (ours - theirs)).sum(-1).mean() <= 1e-9


TINY = {
    "grouped-query": {"num_key_value_heads": 2},
    "wide-heads": {"head_dim": 32, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def byte_level(
    pre_tokenizer, ignore_merges: bool = False, texts: list[str] = TEXTS * 3, size: int = 400
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def tiny_llama(**changes) -> LlamaForCausalLM:
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 400,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, 1.0, 0.2)
    return model


@pytest.mark.parametrize("shape", TINY)
def test_unquantised_logits(shape, tmp_path):
    ours, theirs = both_logits(tiny_llama(**TINY[shape]), tmp_path / "t.gguf")
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


ARCHITECTURES = ["tied-llama", "mistral", "qwen2", "tied-qwen2", "qwen3", "gemma", "phi3"]
ARCHITECTURES += ["yarn-llama", "yarn-mistral", "yarn-qwen2", "yarn-qwen3"]
LATER = ["gemma2", "gemma3"]
GELU = ["gemma", "gpt2", "gpt2-erf", "falcon-7b", "falcon-11b", "falcon-40b", "falcon-many-keys"]
GELU += ["phi", "tied-phi", *LATER]
"""ggml looks GELU up in a table of float16 numbers."""


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", sorted({*ARCHITECTURES, *GELU}))
def test_architectures(name, bits, tiny_model, tmp_path):
    model = tiny_model(name, vocab_size=400, initializer_range=0.1)
    if bits is not None:
        freeze_all(model, IntGroupFormat(bits, 32))
    ours, theirs = both_logits(model, tmp_path / "t.gguf")
    if bits is None:
        bound = 1e-3 if name in GELU else 1e-5
        bound *= model.config.num_hidden_layers / 2
        assert (ours - theirs).abs().max() <= bound * ours.abs().max()
    kl = ours.softmax(-1) * (ours.log_softmax(-1) - theirs.log_softmax(-1))
    # Their random norms of 2 in place of 1 make more of the roundings to 8 bits.
    assert kl.sum(-1).mean() <= (0.1 if name in LATER and bits else 1e-3)


@pytest.mark.parametrize("name", LATER)
def test_later_gemmas_without_gelu(name, tiny_model, tmp_path):
    """Their norms, windows, caps and rotary settings, to float32 rounding."""
    model = tiny_model(name, vocab_size=400, initializer_range=0.1)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    ours, theirs = both_logits(model, tmp_path / "t.gguf")
    assert (ours - theirs).abs().max() <= 3e-5 * ours.abs().max()


@pytest.mark.parametrize("tokens", [200, 400], ids=["short", "long"])
def test_longrope(tokens, tiny_model, tmp_path):
    """Within the original context, and in a longer text with the other factors."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256}
    rope["short_factor"] = [1.0 + 0.1 * i for i in range(8)]
    rope["long_factor"] = [1.0 + 1.0 * i for i in range(8)]
    sizes = {"max_position_embeddings": 1024, "original_max_position_embeddings": 256}
    sizes |= {"sliding_window": None, "vocab_size": 400, "initializer_range": 0.1}
    model = tiny_model("phi3", **sizes, rope_parameters=rope)
    context = 256 if tokens <= 256 else 512
    ours, theirs = both_logits(model, tmp_path / "t.gguf", tokens, context)
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def freeze_all(model, weight_format) -> None:
    freeze_layers(model, select_targets(model, ()))
    for name, layer in list(frozen_layers(model)):
        packed = weight_format.pack(layer.dense_weight())
        replace_module(model, name, layer.replaced(weight_format, packed))


def both_logits(
    model, path: Path, tokens: int = 100, context: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and llama.cpp's of so many random tokens."""
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    export_gguf(model, tokenizer, path, unquantised="F32", name="tiny")
    ids = torch.randint(0, 300, (tokens,)).tolist()
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0].double()
    with running(path, context) as engine:
        return ours, their_logits(engine, ids)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(regex: str):
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), last])


def falcon_steps():
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
        (split_by(LLAMA3), True),
        (split_by(LLAMA3.replace("{1,3}", "")), False),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
            False,
        ),
        (falcon_steps(), False),
    ],
    ids=["gpt-2", "llama-bpe", "qwen2", "smollm", "falcon"],
)
def test_byte_level_tokenisation(pre_tokenizer, ignore_merges, tmp_path):
    tokenizer = byte_level(pre_tokenizer, ignore_merges)
    export_gguf(tiny_llama(), tokenizer, tmp_path / "t.gguf", unquantised="F16", name="tiny")
    with running(tmp_path / "t.gguf", 128) as engine:
        for text in TEXTS:
            found = engine.tokenize(text.encode(), add_bos=True, special=False)
            assert found == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("kind", ["gpt-2", "phi", "falcon"])
def test_tokenisation_of_real_text(kind, shared_data, stories, tmp_path):
    """Vocabularies of 2,000 tokens, Phi's with added tokens for runs of spaces and of tabs."""
    with gzip.open(shared_data / "wikitext-2" / "wiki.valid.tokens.gz", "rt") as file:
        wiki = file.read(200_000)
    texts = [*TEXTS, *stories[:200], *wiki.splitlines()[:400], wiki[:20_000]]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = falcon_steps() if kind == "falcon" else plain
    tokenizer = byte_level(steps, texts=texts, size=2_000)
    if kind == "phi":
        runs = [letter * count for letter in (" ", "\t") for count in range(31, 1, -1)]
        tokenizer.add_tokens([AddedToken(run, normalized=False) for run in runs])
    model = tiny_llama(vocab_size=len(tokenizer))
    export_gguf(model, tokenizer, tmp_path / "t.gguf", unquantised="F16", name="tiny")
    code = "def f(x):\n    if x:\n\t\treturn  [1,   2]" + " " * 70 + "# 1234567 or 12, x²\n"
    with running(tmp_path / "t.gguf", 128) as engine:
        for text in [*texts, code]:
            found = engine.tokenize(text.encode(), add_bos=True, special=False)
            assert found == tokenizer(text)["input_ids"], text
