"""Tiny tokenizers of each family's kind: its normalizer, its pre-tokenizer, its way to begin."""

from __future__ import annotations

import json
from collections.abc import Callable

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CORPUS = [
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n    def __init__(self):\n        pass\n",
    "the model, the answer and the question; it's 12,345 words.  Two  spaces\tand a tab.\r\n\r\n",
    "Der schnelle Fuchs über den Fluß, où l'été naïf. «Да» – сказал он. 漢字とかな。 العربية हिन्दी",
    "### Instruction:\nAnswer.\n\n### Response:\n yes\n no\n  indented\n\tonce more\n\n\n",
    "[INST] ask [/INST] tell </think>\n\n<think>\n x = [1, 2, 3]; y != z && w || !v ... ??? :-)",
] * 8

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, bos: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _begun(tokenizer) if bos else tokenizer


def _begun(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def gpt2() -> Tokenizer:
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), bos=False)


def gpt2_with_a_space() -> Tokenizer:
    """As RoBERTa's and older ones: each text begins with a space."""
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True), bos=False)


def llama3() -> Tokenizer:
    return _byte_level(_split_bytes(GPT4), bos=True)


def qwen() -> Tokenizer:
    tokenizer = _byte_level(_split_bytes(GPT4.replace("{1,3}", "")), bos=False)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def tekken() -> Tokenizer:
    return _byte_level(_split_bytes(TEKKEN), bos=True)


def falcon() -> Tokenizer:
    return _byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.Digits(individual_digits=False),
            ]
        ),
        bos=False,
    )


def _sentencepiece(
    normalizer: normalizers.Normalizer | None, scheme: str | None, *, strips: bool = True
) -> Tokenizer:
    """Pieces are learnt word by word, bytes stand for other characters, all of a text is merged."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    told = json.loads(learner.to_str())["model"]
    vocabulary = told["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(pair) for pair in told["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(SPECIAL)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if scheme is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*spaces, *[decoders.Strip(" ", 1, 0)] * strips])
    return _begun(tokenizer)


def llama2() -> Tokenizer:
    """SentencePiece as it was written at first: a normalizer puts a space before every part."""
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return _sentencepiece(normalizers.Sequence(spaces), None)


def mistral() -> Tokenizer:
    return _sentencepiece(None, "first")


def gemma() -> Tokenizer:
    """SentencePiece that puts nothing before a text."""
    return _sentencepiece(normalizers.Replace(" ", "▁"), None, strips=False)


def t5() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    family.__name__: family
    for family in (
        *(gpt2, gpt2_with_a_space, llama3, qwen, tekken, falcon),
        *(llama2, mistral, gemma, t5, bert),
    )
}

LOSSLESS = ("gpt2", "llama3", "tekken", "falcon", "llama2", "mistral", "gemma")
"""Those whose tokens spell any text to the letter (llama2's one without special tokens in it)."""


class _Quiet(PreTrainedTokenizerFast):
    def __repr__(self) -> str:
        return "a tokenizer"


def build(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a family, with <s> where it begins texts with it."""
    tokenizer = FAMILIES[name]()
    begins = tokenizer.post_processor is not None
    return _Quiet(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>" if begins else None)
