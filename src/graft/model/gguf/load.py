"""graft's own GGUF reader: a file written by the export, back as a model with frozen layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graft.adapters.attach import replace_module
from graft.errors import GraftError, raise_problems
from graft.layers.frozen import FrozenLinear
from graft.model.foreign import modules_within
from graft.model.gguf.config import gguf_config
from graft.model.gguf.file import FLOATS, GgufFile, read_gguf
from graft.model.gguf.layout import (
    Q4_1_FORMAT,
    decode_q4_1,
    gguf_names,
    rotary_heads,
    rows_from_gguf,
)
from graft.model.gguf.rope import ROPE_FACTORS
from graft.text import quoted
from graft.understood import understood


def load_gguf_model(path: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Rebuild a Llama from a GGUF file, to compute in `dtype`; nothing in it is trainable.

    Q4_1 tensors become frozen layers in IntGroupFormat(bits=4, group_size=32), so the file is
    evaluated by the very kernels that trained it. Raises GraftError for a malformed file, another
    architecture, and types other than Q4_1, F32, F16 and BF16.
    """
    file = read_gguf(path)
    architecture = file.value("general.architecture", str)
    if architecture != "llama":
        raise GraftError(
            f"{path}: architecture is {quoted(architecture)}; graft reads GGUF files of "
            "architecture 'llama' as they are: bring others in with graft convert"
        )
    config = gguf_config(file)
    assert isinstance(config, LlamaConfig)
    with (
        understood(path, "makes no model that can be built"),
        modules_within(len(file.tensors)),
        torch.device("meta"),
    ):
        model = LlamaForCausalLM(config)
    _check(file, model)
    for name, target, module in list(gguf_places(model)):
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


def gguf_places(model: PreTrainedModel) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (name, GGUF name without '.weight', module) of every module that GGUF has a name for.

    Gemma's output head has none: it is always the embedding.
    """
    gguf_name = gguf_names(model.config)
    for name, module in model.named_modules():
        target = gguf_name(name) if dict(module.named_parameters(recurse=False)) else None
        if target is not None:
            yield name, target, module


def _check(file: GgufFile, model: LlamaForCausalLM) -> None:
    """Raise GraftError that lists every missing, unknown or misshapen tensor."""
    expected: dict[str, tuple[int, ...]] = {}
    for _, target, module in gguf_places(model):
        for part, parameter in module.named_parameters(recurse=False):
            expected[f"{target}.{part}"] = tuple(parameter.shape)
    if model.config.tie_word_embeddings:
        expected.pop("output.weight")
    problems = [f"tensor {name} is missing" for name in expected if name not in file.tensors]
    for name, tensor in file.tensors.items():
        if name == ROPE_FACTORS:
            continue  # the configuration was made of them
        shape = expected.get(name)
        if shape is None:
            problems.append(f"tensor {quoted(name)} has no place in a Llama")
        elif tensor.shape != shape:
            problems.append(f"tensor {name} is {list(tensor.shape)}; expected {list(shape)}")
        elif tensor.type not in _readable(name, shape):
            problems.append(
                f"tensor {name} is {tensor.type.name}; graft reads "
                f"{', '.join(kind.name for kind in _readable(name, shape))} there"
            )
    raise_problems(problems[:20], f"{file.path}")


def _readable(name: str, shape: tuple[int, ...]) -> tuple[GGMLQuantizationType, ...]:
    linear = len(shape) == 2 and name != "token_embd.weight"
    return (*FLOATS, GGMLQuantizationType.Q4_1) if linear else tuple(FLOATS)
