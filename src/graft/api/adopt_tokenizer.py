"""The tokenizer that came with an adapter: its files over those of the base, what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from graft.errors import GraftError
from graft.files.read import read_json, read_text
from graft.files.write import make_folders
from graft.model.folder import GENERATION_FILE, read_generation_config, read_tokenizer
from graft.model.foreign import check_files
from graft.model.save import write_words
from graft.text import quoted

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
_SETTINGS = ("tokenizer_config.json",)
_PARTS = ("special_tokens_map.json", "added_tokens.json", "merges.txt")
_TEMPLATE = "chat_template.jinja"
_OLD_TEMPLATE = "chat_template.json"
_TEMPLATES = (_TEMPLATE, _OLD_TEMPLATE, "additional_chat_templates")
_SPECIAL = {"eos_token": "end of sequence", "bos_token": "beginning", "pad_token": "padding"}
_TOLD = 5


@dataclass(frozen=True)
class BroughtTokenizer:
    """A tokenizer that is not the base's."""

    folder: Path
    """Where it was put together, with the defaults of generation that belong to it."""
    differs: str
    """In words."""


def bring_tokenizer(
    adapter: Path,
    base: Path,
    config: PreTrainedConfig,
    scratch: Path,
    trust_remote_code: bool = False,
) -> BroughtTokenizer | None:
    """Put the tokenizer of an adapter together in the folder `scratch`, where it is not the base's.

    An adapter that brings a vocabulary brings all; of one that brings parts (a chat template,
    settings, special or added tokens) the rest is the base's. Raises GraftError when the parts make
    no tokenizer.
    """
    check_files(adapter)
    own = _files(adapter, (*_VOCABULARIES, *_SETTINGS, *_PARTS, *_TEMPLATES))
    if not own and not (adapter / GENERATION_FILE).is_file():
        return None
    there = _files(base, _VOCABULARIES)
    old = read_tokenizer(base, trust_remote_code, config) if there else None
    tokenizer = old
    if own:
        tokenizer = _put_together(adapter, base, config, scratch / "parts", trust_remote_code)
        if tokenizer.chat_template is None and old is not None:
            tokenizer.chat_template = old.chat_template
    if tokenizer is None:
        return None
    before = read_generation_config(base)
    generation = read_generation_config(adapter) or _following(before, config, old, tokenizer)
    differs = _differences(old, tokenizer)
    if read_generation_config(adapter) is not None and not _equal(before, generation):
        differs.append("the defaults of generation")
    if not differs:
        return None
    folder = scratch / "tokenizer"
    write_words(tokenizer, generation, folder)
    return BroughtTokenizer(folder, ", ".join(differs))


def _files(folder: Path, names: Iterable[str]) -> list[Path]:
    return sorted({path for name in names for path in folder.glob(name)})


def _put_together(
    adapter: Path, base: Path, config: PreTrainedConfig, place: Path, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the adapter's files, of the base's where it has none of a kind."""
    whole = bool(_files(adapter, _VOCABULARIES))
    settings = _files(adapter, _SETTINGS)
    names = (*_VOCABULARIES, *_SETTINGS, *_PARTS)
    chosen = {path.name: path for path in _files(base, () if whole else names)}
    if whole and not settings:
        chosen |= {path.name: path for path in _files(base, _SETTINGS)}
    laid = (*_VOCABULARIES, *_SETTINGS, *(_PARTS if whole else ()))
    chosen |= {path.name: path for path in _files(adapter, laid)}
    if settings and not whole:
        for name in _PARTS[:2]:  # of the base, and its settings say the same no longer
            chosen.pop(name, None)
    if not _files(adapter, _VOCABULARIES) and not _files(base, _VOCABULARIES):
        raise GraftError(
            f"{adapter} has parts of a tokenizer ({', '.join(sorted(chosen))}) and no vocabulary, "
            f"and neither has its base, {base}"
        )
    make_folders(place)
    for name, path in chosen.items():
        shutil.copyfile(path, place / name)
    tokenizer = read_tokenizer(place, trust_remote_code, config)
    if not whole:
        _add_parts(tokenizer, adapter, bool(settings))
    template = _template(adapter)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _add_parts(tokenizer: PreTrainedTokenizerBase, adapter: Path, with_settings: bool) -> None:
    """Add what an adapter without a vocabulary says of added and of special tokens."""
    file = adapter / "added_tokens.json"
    added = read_json(file) if file.is_file() else {}
    for token, number in sorted(added.items(), key=lambda item: str(item[1])):
        tokenizer.add_tokens([token])
        if tokenizer.convert_tokens_to_ids(token) != number:
            raise GraftError(
                f"{file} gives {quoted(token)} the number {quoted(number)}; on the base's "
                f"vocabulary it is {tokenizer.convert_tokens_to_ids(token)}: take the tokenizer "
                "that the adapter was trained with into its folder"
            )
    file = adapter / "special_tokens_map.json"
    if file.is_file() and not with_settings:
        special = {key: _content(value) for key, value in read_json(file).items()}
        tokenizer.add_special_tokens({key: value for key, value in special.items() if value})


def _content(value: Any) -> Any:
    """Return the text of a special token, which some files give with its options."""
    if isinstance(value, dict):
        return str(value.get("content") or "")
    if isinstance(value, list):
        return [_content(one) for one in value]
    return str(value or "")


def _template(adapter: Path) -> str | None:
    """Return the chat template that lies in a file of its own."""
    if (adapter / _TEMPLATE).is_file():
        return read_text(adapter / _TEMPLATE)
    if (adapter / _OLD_TEMPLATE).is_file():
        found = read_json(adapter / _OLD_TEMPLATE).get("chat_template")
        return found if isinstance(found, str) else None
    return None


def _following(
    before: GenerationConfig | None,
    config: PreTrainedConfig,
    old: PreTrainedTokenizerBase | None,
    new: PreTrainedTokenizerBase,
) -> GenerationConfig:
    """Return the base's defaults of generation, ending where the new tokenizer's texts end too."""
    generation = before or GenerationConfig.from_model_config(config)
    ending = new.eos_token_id
    if ending is None or (old is not None and old.eos_token == new.eos_token):
        return generation
    ends = generation.eos_token_id
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    special = set(new.added_tokens_decoder)
    same = [
        number
        for number in known
        if number != ending
        and number in special
        and (old is None or old.convert_ids_to_tokens(number) == new.convert_ids_to_tokens(number))
    ]
    generation.eos_token_id = [ending, *same] if same else ending
    return generation


def _differences(old: PreTrainedTokenizerBase | None, new: PreTrainedTokenizerBase) -> list[str]:
    """Return in words what of a tokenizer is not the base's."""
    if old is None:
        return ["all of it, as the base has none"]
    before, after = old.get_vocab(), new.get_vocab()
    found = []
    if old.chat_template != new.chat_template:
        found.append("the chat template")
    for key, words in _SPECIAL.items():
        was, now = getattr(old, key), getattr(new, key)
        if was != now:
            found.append(f"the {words} token {quoted(now)} (the base has {quoted(was)})")
    added = sorted(set(after) - set(before), key=lambda token: after[token])
    if added:
        named = ", ".join(map(quoted, added[:_TOLD]))
        more = f" and {len(added) - _TOLD} more" if len(added) > _TOLD else ""
        found.append(f"{len(added)} added token{'s'[: len(added) - 1]} ({named}{more})")
    lost = set(before) - set(after)
    if lost:
        found.append(f"{len(lost)} tokens fewer")
    moved = sum(before[token] != after[token] for token in set(before) & set(after))
    if moved:
        found.append(f"the numbers of {moved} tokens")
    if not found and _machinery(old) != _machinery(new):
        found.append("how it splits or decodes a text")
    return found


def _machinery(tokenizer: PreTrainedTokenizerBase) -> object:
    """Return all that a tokenizer does; how a batch is cut or filled up is no part of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer).__name__, sorted(tokenizer.special_tokens_map.items(), key=str)
    found = json.loads(backend.to_str())
    return {key: value for key, value in found.items() if key not in ("truncation", "padding")}


def _equal(before: GenerationConfig | None, after: GenerationConfig) -> bool:
    return before is not None and before.to_diff_dict() == after.to_diff_dict()
