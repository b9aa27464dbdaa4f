"""graft's own GGUF reader: a file written by the export, back as a model with frozen layers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graft.adapters.attach import replace_module
from graft.errors import GraftError, raise_problems
from graft.formats.linear import FrozenLinear
from graft.model.gguf_layout import (
    Q4_1_FORMAT,
    ROPE_PARAMETERS_KEY,
    decode_q4_1,
    gguf_names,
    rope_factors,
    rotary_heads,
    rows_from_gguf,
)

_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_CORRUPT = (ValueError, IndexError, KeyError, OverflowError, MemoryError, struct.error)
"""What gguf's reader raises on a malformed file (UnicodeDecodeError is a ValueError)."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file; its data stays memory-mapped until it is asked for."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    """As PyTorch counts: rows first."""
    data: npt.NDArray[Any]

    def bytes(self) -> Tensor:
        """Return a copy of the data, uint8 [rows, bytes of a row]."""
        return torch.from_numpy(np.array(self.data).view(np.uint8))

    def dense(self) -> Tensor:
        """Return an unquantised tensor in the dtype of the file."""
        return self.bytes().view(_FLOATS[self.type]).view(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of a file by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a metadata value; raises GraftError when it is missing or not of that type."""
        found = self.metadata.get(key, default)
        # Python counts a bool as an int; GGUF does not.
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise GraftError(
                f"{self.path}: metadata {key} is {found!r}; expected {kind.__name__}; export the "
                "file again"
            )
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """Return a float32 metadata value as the shortest decimal that it is the float32 of."""
        return float(str(np.float32(self.value(key, float, default))))


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF file's metadata and memory-map its tensors.

    Raises GraftError when the file is missing, truncated or malformed.
    """
    if not path.is_file():
        raise GraftError(f"{path}: no such file")
    try:
        with np.errstate(over="ignore"):  # sizes of a damaged file
            reader = gguf.GGUFReader(path)
            metadata = {name: field.contents() for name, field in reader.fields.items()}
    except _CORRUPT as error:
        raise GraftError(
            f"{path}: not a complete GGUF file ({error}); export or download it again"
        ) from error
    tensors = {
        tensor.name: GgufTensor(
            tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape)), tensor.data
        )
        for tensor in reader.tensors
    }
    return GgufFile(path, metadata, tensors)


def load_gguf_model(path: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Rebuild a Llama from a GGUF file, to compute in `dtype`; nothing in it is trainable.

    Q4_1 tensors become frozen layers in IntGroupFormat(bits=4, group_size=32), so the file is
    evaluated by the very kernels that trained it. Raises GraftError for a malformed file, another
    architecture, and types other than Q4_1, F32, F16 and BF16.
    """
    file = read_gguf(path)
    config = _config(file)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    _check(file, model)
    for name, target, module in list(_places(model)):
        if module is model.lm_head and config.tie_word_embeddings:
            continue
        heads = rotary_heads(name, config)
        weight = file.tensors[f"{target}.weight"]
        bias = file.tensors.get(f"{target}.bias")
        order = None if heads is None else rows_from_gguf(weight.shape[0], heads)
        frozen_bias = None if bias is None else _ordered(bias.dense(), order).to(dtype)
        if weight.type is GGMLQuantizationType.Q4_1:
            packed = decode_q4_1(_ordered(weight.bytes(), order))
            rows, columns = weight.shape
            layer = FrozenLinear(columns, rows, Q4_1_FORMAT, packed, frozen_bias)
            replace_module(model, name, layer)
            continue
        module.weight = nn.Parameter(_ordered(weight.dense(), order).to(dtype), False)
        if frozen_bias is not None:
            module.bias = nn.Parameter(frozen_bias, False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.config.dtype = dtype
    return model.eval()


def _ordered(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else rows[order]


def _places(model: LlamaForCausalLM) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (name, GGUF name without '.weight', module) of every module with a weight."""
    gguf_name = gguf_names(model.config)
    for name, module in model.named_modules():
        if dict(module.named_parameters(recurse=False)):
            target = gguf_name(name)
            assert target is not None
            yield name, target, module


def _config(file: GgufFile) -> LlamaConfig:
    architecture = file.value("general.architecture", str)
    if architecture != "llama":
        raise GraftError(
            f"{file.path}: architecture is {architecture!r}; graft reads GGUF files of "
            "architecture 'llama'"
        )
    sizes = {
        field: file.value(f"llama.{key}", int)
        for field, key in (
            ("hidden_size", "embedding_length"),
            ("intermediate_size", "feed_forward_length"),
            ("num_hidden_layers", "block_count"),
            ("num_attention_heads", "attention.head_count"),
            ("num_key_value_heads", "attention.head_count_kv"),
            ("head_dim", "attention.key_length"),
            ("vocab_size", "vocab_size"),
            ("max_position_embeddings", "context_length"),
        )
    }
    problems = [f"{field} is 0; expected at least 1" for field, size in sizes.items() if size < 1]
    # Also keeps a damaged count from building millions of layers.
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if sizes["num_hidden_layers"] != len(blocks):
        problems.append(
            f"metadata says {sizes['num_hidden_layers']} blocks, the tensors make {len(blocks)}"
        )
    raise_problems(problems, f"{file.path}")
    settings: dict[str, Any] = sizes | {
        f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return LlamaConfig(
        **settings,
        rms_norm_eps=file.number("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope_parameters(file),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def _rope_parameters(file: GgufFile) -> dict[str, Any]:
    if ROPE_PARAMETERS_KEY in file.metadata:
        try:
            rope = json.loads(file.value(ROPE_PARAMETERS_KEY, str))
        except json.JSONDecodeError as error:
            raise GraftError(
                f"{file.path}: metadata {ROPE_PARAMETERS_KEY} is no JSON ({error}); export the "
                "file again"
            ) from error
        return dict(rope)
    if "rope_freqs.weight" in file.tensors:
        raise GraftError(
            f"{file.path}: has rotary factors but no {ROPE_PARAMETERS_KEY}; graft reads scaled "
            "rotary frequencies only from files that it wrote"
        )
    theta = file.number("llama.rope.freq_base", 10000.0)
    scaling = file.value("llama.rope.scaling.type", str, "none")
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling != "linear":
        raise GraftError(
            f"{file.path}: rope scaling is {scaling!r}; graft reads none, linear and its own llama3"
        )
    factor = file.number("llama.rope.scaling.factor")
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _check(file: GgufFile, model: LlamaForCausalLM) -> None:
    """Raise GraftError that lists every missing, unknown or misshapen tensor."""
    expected: dict[str, tuple[int, ...]] = {}
    for _, target, module in _places(model):
        for part, parameter in module.named_parameters(recurse=False):
            expected[f"{target}.{part}"] = tuple(parameter.shape)
    if model.config.tie_word_embeddings:
        expected.pop("output.weight")
    factors = rope_factors(model.config)
    if factors is not None:
        expected["rope_freqs.weight"] = tuple(factors.shape)
    problems = [f"tensor {name} is missing" for name in expected if name not in file.tensors]
    for name, tensor in file.tensors.items():
        shape = expected.get(name)
        if shape is None:
            problems.append(f"tensor {name} has no place in a Llama")
        elif tensor.shape != shape:
            problems.append(f"tensor {name} is {list(tensor.shape)}; expected {list(shape)}")
        elif tensor.type not in _readable(name, shape):
            problems.append(
                f"tensor {name} is {tensor.type.name}; graft reads "
                f"{', '.join(kind.name for kind in _readable(name, shape))} there"
            )
    raise_problems(problems, f"{file.path}")
    if factors is not None and not torch.equal(file.tensors["rope_freqs.weight"].dense(), factors):
        raise GraftError(
            f"{file.path}: rope_freqs.weight does not follow from {ROPE_PARAMETERS_KEY}; export "
            "the file again"
        )


def _readable(name: str, shape: tuple[int, ...]) -> tuple[GGMLQuantizationType, ...]:
    linear = len(shape) == 2 and name != "token_embd.weight"
    return (*_FLOATS, GGMLQuantizationType.Q4_1) if linear else tuple(_FLOATS)
