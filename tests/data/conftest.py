"""Small byte-level tokenizers, whose truth can be written down by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def make_tokenizer(
    *,
    bos: bool = True,
    eos: str | None = "</s>",
    writes_eos: bool = False,
    merges: Sequence[tuple[str, str]] = (),
    trim_offsets: bool = False,
    chat_template: str | None = None,
    more_special: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
) -> PreTrainedTokenizerFast:
    """Every byte is a token, plus the merges and special tokens; <s> comes first when bos."""
    vocabulary = {
        token: index for index, token in enumerate([*BYTES, *("".join(pair) for pair in merges)])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>"] * bos + [eos] * (eos is not None) + list(more_special)
    tokenizer.add_special_tokens(special)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos or writes_eos:
        used = ["<s>"] * bos + [str(eos)] * writes_eos
        steps.append(
            processors.TemplateProcessing(
                single=("<s> " if bos else "") + "$A" + (f" {eos}" if writes_eos else ""),
                special_tokens=[(token, tokenizer.token_to_id(token)) for token in used],
            )
        )
    tokenizer.post_processor = processors.Sequence(steps)
    named = {"bos_token": "<s>"} if bos else {}
    if eos is not None:
        named["eos_token"] = eos
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, <s> first, eos </s>, no chat template."""
    return make_tokenizer()


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., str]:
    """Write lines to a file and return its path."""

    def write(name: str, *lines: str) -> str:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write
