"""A tokenizer made of what a GGUF file says of it, to cut text as llama.cpp does."""

from __future__ import annotations

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from graft.errors import GraftError
from graft.model.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from graft.model.gguf.tokens import TokenList
from graft.text import quoted
from graft.understood import understood

_ALIKE = {
    "gpt-2": "phi-2 mpt olmo jais jina-es jina-de jina-v2-es jina-v2-de trillion granite-docling",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2",
    "dbrx": "smaug-bpe",
    "qwen2": "deepseek-r1-qwen stablelm2 megrez",
    "smollm": "starcoder refact command-r codeshell minerva-7b exaone",
    "gpt-4o": "llama4",
}
"""Names of llama.cpp's pre-tokenizers by the one that cuts alike."""
_OWN = {name: own for own, names in _ALIKE.items() for name in names.split()}
_TABLE = {row.name: row for row in PRE_TOKENIZERS}
_SPACE = "▁"
_LONGEST = 256
"""Letters of a token of SentencePiece's, which has 16 unless told otherwise."""
_TYPES = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
"""What is cut out of a text before anything is merged."""


def make_tokenizer(tokens: TokenList, where: object) -> PreTrainedTokenizerBase:
    """Return the tokenizer; raises GraftError for one that graft cannot make.

    where: the file, for messages.
    """
    makers = {"gpt2": _byte_level, "llama": _pieces}
    if tokens.model not in makers:
        raise GraftError(
            f"{where}: its tokenizer is {quoted(tokens.model)}; graft makes one of "
            f"{' and '.join(makers)}: give the folder of the model's tokenizer (--tokenizer)"
        )
    count = _without_padding(tokens)
    vocabulary = {text: index for index, text in enumerate(tokens.texts[:count])}
    if len(vocabulary) < count:
        raise GraftError(f"{where}: two of its tokens are alike; give the tokenizer's folder")
    with understood(where, "holds a tokenizer that cannot be made"):
        backend = makers[tokens.model](tokens, vocabulary)
        # All at once: each call goes through all that were added before.
        backend.add_tokens(
            [
                AddedToken(
                    tokens.texts[index],
                    special=tokens.types[index] != TokenType.USER_DEFINED,
                    normalized=False,
                )
                for index in tokens.of_type(*_TYPES)
            ]
        )
        _surround(backend, tokens)
        names = {f"{name}_token": tokens.texts[id_] for name, id_ in tokens.special_ids.items()}
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend, clean_up_tokenization_spaces=False, **names
        )
        made.chat_template = tokens.chat_template
        made.decode(made("a word")["input_ids"])
    assert isinstance(made, PreTrainedTokenizerBase)
    return made


def _without_padding(tokens: TokenList) -> int:
    """Return how many tokens there are before those that llama.cpp's converter fills up with."""
    count = len(tokens.texts)
    while count and tokens.types[count - 1] == TokenType.UNUSED:
        count -= 1
    return count


def pre_tokenizer(name: str) -> PreTokenizer | None:
    """Return what llama.cpp does under a name; None for what graft does not know."""
    return _TABLE.get(_OWN.get(name, name))


def _byte_level(tokens: TokenList, vocabulary: dict[str, int]) -> Tokenizer:
    pre = pre_tokenizer(tokens.pre)
    if pre is None:
        raise GraftError(
            f"its pre-tokenizer is {quoted(tokens.pre)}, which graft does not know; give the "
            "folder of the model's tokenizer (--tokenizer)"
        )
    pairs = (merge.partition(" ") for merge in tokens.merges)
    merges = [(left, right) for left, _, right in pairs]
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignores_merges))
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(tokens: TokenList, vocabulary: dict[str, int]) -> Tokenizer:
    if not tokens.scores:
        raise GraftError("its tokens have no scores")
    unknown = tokens.special_ids.get("unk")
    model = BPE(
        vocab=vocabulary,
        merges=_merges_by_score(tokens, vocabulary),
        unk_token=None if unknown is None else tokens.texts[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    first = [normalizers.Prepend(_SPACE)] if tokens.add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if tokens.add_space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return backend


def _merges_by_score(tokens: TokenList, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return every pair whose union is a token, that of the highest score first.

    SentencePiece joins the neighbours whose union has the highest score.
    """
    usual = {tokens.texts[index] for index in tokens.of_type(TokenType.NORMAL)}
    longest = max(map(len, usual), default=0)
    if longest > _LONGEST:
        raise GraftError(
            f"one of its tokens has {longest:,} letters; expected at most {_LONGEST}: give the "
            "folder of the model's tokenizer (--tokenizer)"
        )
    found = [
        (-tokens.scores[vocabulary[text]], text[:cut], text[cut:])
        for text in usual
        for cut in range(1, len(text))
        if text[:cut] in usual and text[cut:] in usual
    ]
    found.sort(key=lambda one: (one[0], vocabulary[one[1] + one[2]], vocabulary[one[1]]))
    return [(left, right) for _, left, right in found]


def _surround(backend: Tokenizer, tokens: TokenList) -> None:
    """Put BOS before and EOS after a text, where the file says so."""
    ids = tokens.special_ids
    before = [tokens.texts[ids["bos"]]] if tokens.add_bos and "bos" in ids else []
    after = [tokens.texts[ids["eos"]]] if tokens.add_eos and "eos" in ids else []
    if before or after:
        backend.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(text, backend.token_to_id(text)) for text in {*before, *after}],
        )
