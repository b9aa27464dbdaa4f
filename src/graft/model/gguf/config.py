"""The configuration of a model from a GGUF file's metadata."""

from __future__ import annotations

from itertools import islice
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from graft.errors import GraftError, raise_problems
from graft.model.families import FAMILIES, Family, GgufLayout
from graft.model.gguf.file import GgufFile
from graft.model.gguf.header import Array
from graft.model.gguf.keys import check_kind, key_problems
from graft.model.gguf.rope import read_rope
from graft.text import listed, quoted
from graft.understood import understood

_SPECIAL = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))


def _read_families() -> dict[str, tuple[Family, GgufLayout]]:
    """Return the families that are read, by llama.cpp's architecture."""
    rows = ((family, family.gguf) for family in FAMILIES.values())
    return {
        layout.architecture: (family, layout) for family, layout in rows if layout and layout.read
    }


def gguf_config(file: GgufFile) -> PretrainedConfig:
    """Return the configuration.

    Raises GraftError where the metadata do not make one, or say what graft does not compute.
    """
    check_kind(file)
    architecture, known = file.architecture, _read_families()
    if architecture not in known:
        raise GraftError(
            f"{file.path}: architecture is {quoted(architecture)}; graft reads GGUF files of "
            f"{', '.join(known)}"
        )
    family, layout = known[architecture]
    sizes = _sizes(file, architecture)
    raise_problems(_problems(file, architecture, sizes), f"{file.path}")
    settings: dict[str, Any] = sizes | {
        f"{name}_token_id": special_id(file, key, sizes["vocab_size"]) for name, key in _SPECIAL
    }
    whole = sizes["head_dim"] * sizes["num_attention_heads"] == sizes["hidden_size"]
    if layout.optional_head_dim and whole:
        del settings["head_dim"]
    for setting, layer in layout.bias_settings.items():
        ending = f".{layer}.bias"
        settings[setting] = any(
            name.startswith("blk.") and name.endswith(ending) for name in file.tensors
        )
    settings |= layout.settings
    settings["rms_norm_eps"] = file.number(f"{architecture}.attention.layer_norm_rms_epsilon")
    settings["tie_word_embeddings"] = "output.weight" not in file.tensors
    with understood(file.path):
        config = CONFIG_MAPPING[family.model_type](**settings)
    config.rope_parameters = read_rope(file, config)
    return config


def special_id(file: GgufFile, name: str, tokens: int) -> int | None:
    """Return the id of a special token; None where the file names none, or one beyond the list."""
    found = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return found if type(found) is int and 0 <= found < tokens else None


def _sizes(file: GgufFile, architecture: str) -> dict[str, int]:
    def size(key: str, default: int | None = None) -> int:
        found = file.metadata.get(f"{architecture}.{key}")
        if isinstance(found, Array):
            return _one_for_all(file, f"{architecture}.{key}")
        number: int = file.value(f"{architecture}.{key}", int, default)
        return number

    hidden, heads = size("embedding_length"), size("attention.head_count")
    embedding = file.tensors.get("token_embd.weight")
    return {
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        # Where all is as usual, llama.cpp's converter leaves these out.
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": size("attention.key_length", hidden // max(heads, 1)),
        "vocab_size": size("vocab_size", None if embedding is None else embedding.shape[0]),
        "max_position_embeddings": size("context_length"),
    }


def _one_for_all(file: GgufFile, key: str) -> int:
    """Return the number that an array has for every layer."""
    found = set(file.numbers(key) or ())
    if len(found) != 1 or type(next(iter(found))) is not int:
        raise GraftError(
            f"{file.path}: metadata {key} differs from layer to layer ({listed(sorted(found), 5)})"
            "; graft reads models of equal layers"
        )
    number: int = found.pop()
    return number


def _problems(file: GgufFile, architecture: str, sizes: dict[str, int]) -> list[str]:
    problems = [
        f"{field} is {found}; expected at least 1" for field, found in sizes.items() if found < 1
    ]
    # Also keeps a damaged count from building millions of layers.
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    count = sizes["num_hidden_layers"]
    if count != len(blocks):
        missing = (f"blk.{n}" for n in range(count) if str(n) not in blocks)
        problems.append(
            f"metadata says {count} blocks, the tensors make {len(blocks)} (missing: "
            f"{listed(islice(missing, 10))})"
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        found = file.metadata.get(f"{architecture}.{key}", sizes["head_dim"])
        if found != sizes["head_dim"]:
            problems.append(
                f"metadata {architecture}.{key} is {quoted(found)}, and heads are "
                f"{sizes['head_dim']} wide; graft reads models where the two are equal"
            )
    for key, least in (("attention.layer_norm_rms_epsilon", 0.0), ("rope.freq_base", 1e-6)):
        stated = file.metadata.get(f"{architecture}.{key}")
        if isinstance(stated, float) and stated < least:
            problems.append(
                f"metadata {architecture}.{key} is {stated:g}; expected at least {least:g}"
            )
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Array) and tokens.count != sizes["vocab_size"]:
        problems.append(
            f"tokenizer.ggml.tokens has {tokens.count} tokens, and the model "
            f"{sizes['vocab_size']} embeddings"
        )
    return problems + key_problems(file, sizes["head_dim"], sizes["max_position_embeddings"])
