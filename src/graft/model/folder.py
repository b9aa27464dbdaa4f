"""What a model folder says of itself: configuration, tokenizer, the formats of packed layers."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from graft.errors import GraftError, raise_problems
from graft.files.digest import check_digest
from graft.files.read import LARGE_JSON_BYTES, read_json, typed
from graft.formats.base import WeightFormat
from graft.formats.registry import parse_format
from graft.model.foreign import check_counts, check_files, check_rotary
from graft.model.hub import from_hub
from graft.model.tokenizer_file import check_growth
from graft.model.tokenizer_itself import as_the_file_says
from graft.text import quoted
from graft.understood import understood

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
QUANTISATION_FILE = "graft.json"
FORMAT_VERSION = 1
CONFIG_MARKER = {"packed_by": "graft"}
"""The quantization_config of a folder with quantised or factored layers. Readers without graft must
refuse it rather than start from random weights: transformers ignores a quant_method that it does
not know, with a warning, but raises when there is none."""

_WEIGHTS = "*.safetensors"
_FETCHED = [_WEIGHTS, "*.json", "*.model", "*.txt", "*.jinja", "README.md"]
"""What is downloaded of a model on the hub: weights as safetensors alone."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def find_folder(model: str, config_alone: bool = False) -> Path:
    """Return the local folder of a model; a hub id is downloaded, or only its config.json.

    Raises GraftError when there is neither such a folder nor such a hub id.
    """
    folder = Path(model)
    if not folder.is_dir():
        return from_hub(model, [CONFIG_FILE] if config_alone else _FETCHED)
    if not (folder / CONFIG_FILE).is_file():
        raise GraftError(f"{folder} has no {CONFIG_FILE}: it is no Hugging Face model folder")
    return folder


def find_text_folder(model: str) -> Path:
    """Return the local folder of a model's tokenizer, which may be all that is in it.

    Of a hub id nothing else is downloaded but its configuration. Raises as `find_folder`.
    """
    folder = Path(model)
    if not folder.is_dir():
        return from_hub(model, [pattern for pattern in _FETCHED if pattern != _WEIGHTS])
    if not any((folder / name).is_file() for name in (CONFIG_FILE, *_TOKENIZER_FILES)):
        raise GraftError(f"{folder} has neither {' nor '.join((CONFIG_FILE, *_TOKENIZER_FILES))}")
    return folder


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the model's configuration; raises GraftError when it is damaged or unknown."""
    check_files(folder)
    raw = read_json(folder / CONFIG_FILE)
    # MLX has the second name, and in newer folders both.
    quantisation = raw.get("quantization_config", raw.get("quantization"))
    if quantisation is not None and quantisation != CONFIG_MARKER:
        # Which tools are read, and the way out for the others, is what the command says.
        raise GraftError(
            f"{folder} is quantised by another tool ({json.dumps(quantisation):.100}); graft "
            "starts from unquantised weights or from a folder in its own format; bring it in with: "
            f"graft convert {folder} --out NEW_FOLDER"
        )
    if quantisation is not None and not (folder / QUANTISATION_FILE).is_file():
        raise GraftError(f"{folder} is a quantised folder without its {QUANTISATION_FILE}")
    if raw.get("auto_map") and not trust_remote_code and _is_unknown(raw.get("model_type")):
        raise GraftError(
            f"{folder} is a {quoted(raw.get('model_type'))}, which only Python code in that folder "
            "knows; graft runs it with --trust-remote-code alone: read the code before you do"
        )
    check_counts(raw, folder / CONFIG_FILE)
    check_rotary(raw, folder / CONFIG_FILE)
    with understood(folder / CONFIG_FILE):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # Our marker must not reach transformers, which refuses it.
    if quantisation is not None:
        del config.quantization_config
    return config


def without_padding_beyond(
    settings: PreTrainedConfig | GenerationConfig, rows: object
) -> int | None:
    """Take away a pad_token_id that is beyond a model's rows of embeddings, and return it.

    Whoever adds a token for padding and resizes nothing leaves one, and no such embedding is built.
    """
    padding = getattr(settings, "pad_token_id", None)
    if not isinstance(padding, int) or not isinstance(rows, int) or padding < rows:
        return None
    settings.pad_token_id = None
    return padding


def _is_unknown(model_type: object) -> bool:
    return not isinstance(model_type, str) or model_type not in CONFIG_MAPPING


def parse_config(raw: Mapping[str, Any], folder: Path) -> PreTrainedConfig:
    """Return the configuration that a config.json of that folder holds; raises as `read_config`."""
    check_counts(raw, folder / CONFIG_FILE)
    check_rotary(raw, folder / CONFIG_FILE)
    with understood(folder / CONFIG_FILE):
        return CONFIG_MAPPING[str(raw.get("model_type"))].from_dict(dict(raw))


def read_tokenizer(
    folder: Path, trust_remote_code: bool = False, config: PreTrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; its configuration is read too, unless it is given.

    Raises GraftError when the folder has none, or one that cannot encode a word.
    """
    check_files(folder)
    for name in _TOKENIZER_SETTINGS:
        if (folder / name).is_file():
            read_json(folder / name)  # whose messages are plainer
    for file in folder.glob("tokenizer.*json"):  # there may be others, for older versions
        check_growth(file)
    with understood(folder, "has no tokenizer that can be loaded"):
        read = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, config=config
        )
        tokenizer = as_the_file_says(read, folder)
        ids = tokenizer("a word")["input_ids"]
        tokenizer.decode(ids)
    return tokenizer


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Return the defaults of generation, where the folder has any; raises GraftError for none."""
    file = folder / GENERATION_FILE
    if not file.is_file():
        return None
    stored = read_json(file)
    problems = [
        f"{name} is {quoted(stored[name])}; expected the number of a token, or several"
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if not _are_tokens(stored.get(name))
    ]
    raise_problems(problems, str(file))
    with understood(file):
        return GenerationConfig.from_dict(stored)


def _are_tokens(value: object) -> bool:
    """Return whether a value is None, a token's number, or a list of them."""
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    # Some files say -1 for none.
    return all(type(number) is int and -1 <= number < 2**31 for number in numbers)


def check_weights(folder: Path) -> None:
    """Raise GraftError when the weights of a folder that graft quantised are not what it wrote.

    Folders of earlier versions do not say what that was.
    """
    for name, digest in (read_quantisation(folder).sha256 or {}).items():
        check_digest(folder / Path(name).name, digest)


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What graft.json says."""

    format_version: int
    layers: Mapping[str, Any]
    """What `describe_format` says of each quantised layer."""
    source_dtype: str | None = None
    """That of the weights before they were packed."""
    sha256: Mapping[str, str] | None = None
    """Of each weight file; folders of earlier versions do not say it."""
    factors: Mapping[str, Any] | None = None
    """The rank of each layer that is two low-rank factors, `down` and `up` under its name; those of
    the factors that are quantised are layers in their own right."""


def read_quantisation(folder: Path) -> Quantisation:
    """Return what graft.json says; raises GraftError when it is damaged or of another version."""
    file = folder / QUANTISATION_FILE
    found = read_json(file, LARGE_JSON_BYTES)
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise GraftError(
            f"{file} has format_version {quoted(version)}; this version of graft reads "
            f"{FORMAT_VERSION}: update graft, or quantise again"
        )
    return typed(found, Quantisation, file)


def stored_formats(folder: Path, known: Collection[str] | None = None) -> dict[str, WeightFormat]:
    """Return the formats of the layers of a folder that graft quantised; empty for any other.

    known: names of the model's layers, of which each that graft.json names must be one.
    Raises GraftError with every entry that is not understood.
    """
    file = folder / QUANTISATION_FILE
    if not file.is_file():
        return {}
    formats, problems = {}, []
    for name, layer in read_quantisation(folder).layers.items():
        if known is not None and name not in known:
            problems.append(f"{quoted(name)} is no linear layer of this model")
        elif not isinstance(layer, dict) or not isinstance(layer.get("format"), str):
            problems.append(f"{quoted(name)} names no format")
        else:
            try:
                formats[name] = parse_format(layer)
            except GraftError as error:
                problems.append(f"{quoted(name)}: {error}")
    raise_problems(problems[:20], f"{file}, which may be from another version of graft")
    return formats
