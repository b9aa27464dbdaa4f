"""Whether a tokenizer that is given beside a GGUF file is that of the file."""

from __future__ import annotations

import json

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from graft.errors import GraftError, raise_problems
from graft.model.gguf.tokenizer import make_tokenizer
from graft.model.gguf.tokens import TokenList
from graft.model.probe import probe_texts
from graft.text import listed, quoted
from graft.understood import tokenizing

_SPACE = "▁"
_SHOWN = 3
_NAMES = {"bos": "BOS", "eos": "EOS", "unk": "UNK", "pad": "PAD"}


def check_tokens(tokens: TokenList, tokenizer: PreTrainedTokenizerBase, where: object) -> list[str]:
    """Return notes on tokens that only one of the two has.

    Raises GraftError where an id is another token, or the merges are others: the model was trained
    with other ids than the tokenizer makes. where: the file, for messages.
    """
    ours = {index: token for token, index in tokenizer.get_vocab().items()}
    unused, added = set(tokens.of_type(TokenType.UNUSED)), tokenizer.added_tokens_decoder
    differing = [
        f"id {index} is {quoted(text)} in the file and {quoted(ours[index])} in the tokenizer"
        for index, text in enumerate(tokens.texts)
        if index in ours and index not in unused and not _alike(text, ours[index], index in added)
    ]
    problems = differing[:_SHOWN]
    if len(differing) > _SHOWN:
        problems.append(f"and {len(differing) - _SHOWN:,} other ids are other tokens too")
    raise_problems(problems + _merge_problems(tokens, tokenizer), _heading(where))
    return _one_sided(tokens, ours, unused)


def _heading(where: object) -> str:
    return (
        f"the tokenizer is not that of {where}; give the one of the same model, or leave it out to "
        "take what the file holds"
    )


def _alike(theirs: str, ours: str, added: bool) -> bool:
    # llama.cpp's converter writes added tokens with spaces, and some of them without those around.
    spaced = ours.replace(_SPACE, " ")
    return theirs in (ours, spaced) or (added and theirs.strip() == spaced.strip() != "")


def _merge_problems(tokens: TokenList, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if tokens.model != "gpt2" or not tokens.merges or not tokenizer.is_fast:
        return []
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    ours = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    if ours == tokens.merges:
        return []
    pairs = enumerate(zip(tokens.merges, ours, strict=False))
    found = next((f" ({a!r} and {b!r} stand at {at})" for at, (a, b) in pairs if a != b), "")
    return [
        f"the file has {len(tokens.merges):,} merges, the tokenizer {len(ours):,}, which are not "
        f"the same{found}"
    ]


def _one_sided(tokens: TokenList, ours: dict[int, str], unused: set[int]) -> list[str]:
    notes = []
    missing = [i for i in range(len(tokens.texts)) if i not in ours and i not in unused]
    if missing:
        texts = listed((tokens.texts[index] for index in missing), _SHOWN)
        notes.append(f"{len(missing)} tokens of the file are not in the tokenizer: {texts}")
    padding = sum(index not in ours for index in unused)
    if padding:
        notes.append(f"{padding} ids of the file are padding, which the tokenizer does not have")
    named = [index for index in unused if index in ours and ours[index] != tokens.texts[index]]
    if named:
        texts = listed((ours[index] for index in named), _SHOWN)
        notes.append(f"{len(named)} ids that the file does not use are tokens: {texts}")
    beyond = sorted(index for index in ours if index >= len(tokens.texts))
    if beyond:
        texts = listed((ours[index] for index in beyond), _SHOWN)
        notes.append(
            f"{len(beyond)} tokens of the tokenizer lie beyond the {len(tokens.texts)} of the "
            f"file: {texts}"
        )
    return notes


def compare_tokenizer(
    tokens: TokenList, tokenizer: PreTrainedTokenizerBase, where: object
) -> list[str]:
    """Return in words how the tokenizer differs from the file's; raises as `check_tokens`.

    What both make of probe texts is compared too, where graft can make the file's.
    """
    notes = check_tokens(tokens, tokenizer, where)
    for name, said in _NAMES.items():
        theirs, ours = tokens.special_ids.get(name), getattr(tokenizer, f"{name}_token_id")
        if theirs is not None and theirs != ours:
            notes.append(f"{said} is {theirs} in the file and {ours} in the tokenizer")
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    control, unknown = (
        {tokens.texts[index] for index in tokens.of_type(kind)}
        for kind in (TokenType.CONTROL, TokenType.UNKNOWN)
    )
    if only := sorted((control ^ special) - unknown):
        notes.append(f"special tokens in only one of file and tokenizer: {listed(only, 5)}")
    if tokens.chat_template is not None and tokens.chat_template != tokenizer.chat_template:
        notes.append("the chat template of the file is another; the tokenizer's is kept")
    return notes + _cuts(tokens, tokenizer, where)


def _cuts(tokens: TokenList, tokenizer: PreTrainedTokenizerBase, where: object) -> list[str]:
    try:
        own = make_tokenizer(tokens, where)
    except GraftError as error:
        return [f"how the file's tokenizer cuts text was not compared: {error}"]
    texts = probe_texts()
    with tokenizing():
        whole = [ids_of("a")["input_ids"] for ids_of in (own, tokenizer)]
        cut = [text for text in texts if _ids(own, text) != _ids(tokenizer, text)]
    if cut:
        found = (
            f"{len(cut)} of {len(texts)} probe texts are cut otherwise than by the file's "
            f"tokenizer, such as {quoted(cut[0], 60)}"
        )
        if 2 * len(cut) > len(texts):
            raise GraftError(f"{_heading(where)}: {found}")
        return [found]
    if whole[0] != whole[1]:
        return [f"around 'a' the file's tokenizer makes {whole[0]}, the given one {whole[1]}"]
    return [f"{len(texts)} probe texts are cut into the same ids as by the file's tokenizer"]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
