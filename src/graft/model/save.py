"""Writing a model folder: a plain Hugging Face one, or a quantised one in graft's container."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from graft.adapters.attach import adapted_layers, frozen_layers
from graft.errors import GraftError
from graft.files.read import read_json
from graft.files.write import new_folder, write_json
from graft.formats.registry import describe_format
from graft.layers.frozen import FrozenLinear
from graft.layers.registry import kind_of
from graft.model.factors import factor_ranks
from graft.model.folder import (
    CONFIG_MARKER,
    FORMAT_VERSION,
    GENERATION_FILE,
    QUANTISATION_FILE,
)
from graft.model.internals import stays_float32
from graft.model.load import LoadedModel
from graft.model.tensor_file import WRITABLE, FileTensor, OnTensor, write_tensor_file
from graft.model.tokenizer_itself import PLAIN_CLASS, tokenizer_note
from graft.model.weight_sets import SINGLE_FILE


def save_model(
    loaded: LoadedModel,
    folder: Path,
    dtype: torch.dtype | Literal["exact"] | None = None,
    beside: Mapping[str, object] | None = None,
) -> None:
    """Write model and tokenizer to a new folder; raises GraftError when that fails.

    Without quantised or factored layers the folder is a plain Hugging Face one, in `dtype`
    (default: the dtype that the model computes in; `exact`: each tensor in the source's where that
    loses nothing), which AutoModelForCausalLM loads. With quantised layers it
    holds the packed tensors as they are, `graft.json` with each layer's format, and the other
    tensors in the dtype that the source had where that loses nothing. Factored layers are there as
    their factors, with their ranks in `graft.json`. `beside` are values of JSON
    files that belong into it, by their names.
    """
    beside = beside or {}
    model = loaded.model
    if any(True for _ in adapted_layers(model)):
        raise GraftError("the model carries adapters; merge or remove them before saving it")
    quantised = {
        name: describe_format(layer.weight_format)
        for name, layer in frozen_layers(model)
        if layer.weight_format.quantised
    }
    factors = factor_ranks(model)
    if not quantised and not factors:
        save_plain_model(loaded, folder, dtype or loaded.dtype, beside=beside)
        return
    if not quantised:
        _save_factors(loaded, folder, dtype or loaded.dtype, factors, beside)
        return
    packed = {
        f"{name}.{key}"
        for name, layer in frozen_layers(model)
        if name in quantised
        for key in layer.packed
    }
    tensors = {
        name: tensor if name in packed else narrowed(tensor, loaded.source_dtype)
        for name, tensor in named_tensors(model)
    }
    with new_folder(folder) as part:
        digest = save_tensors(tensors, part / SINGLE_FILE)
        write_model_files(loaded, part, loaded.dtype, True)
        write_quantisation(part, quantised, loaded.source_dtype, digest, factors)
        _write_beside(part, beside)


def _save_factors(
    loaded: LoadedModel,
    folder: Path,
    dtype: torch.dtype | Literal["exact"],
    factors: Mapping[str, int],
    beside: Mapping[str, object],
) -> None:
    """Write a folder like a plain one, but for the factors that some of its layers are."""
    with new_folder(folder) as part:
        digest = write_tensor_file(part / SINGLE_FILE, list(_plain_tensors(loaded, dtype)))
        said = loaded.source_dtype if dtype == "exact" else dtype
        write_model_files(replace(loaded, source_dtype=said), part, said, True)
        write_quantisation(part, {}, said, digest, factors)
        _write_beside(part, beside)


def _write_beside(folder: Path, beside: Mapping[str, object]) -> None:
    for name, value in beside.items():
        write_json(folder / name, value)


def save_plain_model(
    loaded: LoadedModel,
    folder: Path,
    dtype: torch.dtype | Literal["exact"],
    on_tensor: OnTensor | None = None,
    beside: Mapping[str, object] | None = None,
) -> None:
    """Write model and tokenizer to a new plain Hugging Face folder in `dtype`; see `save_model`.

    Each layer is dequantised when its turn comes, so that one of them at a time is in memory.
    Raises GraftError when the folder cannot be written.
    """
    with new_folder(folder) as part:
        write_tensor_file(part / SINGLE_FILE, list(_plain_tensors(loaded, dtype)), on_tensor)
        write_model_files(loaded, part, loaded.source_dtype if dtype == "exact" else dtype)
        _write_beside(part, beside or {})


def _plain_tensors(
    loaded: LoadedModel, dtype: torch.dtype | Literal["exact"]
) -> Iterator[FileTensor]:
    layers, seen = dict(frozen_layers(loaded.model)), set()
    for name, tensor in named_tensors(loaded.model):
        layer_name, _, part = name.rpartition(".")
        layer = layers.get(layer_name)
        if dtype == "exact":
            target = narrowed(tensor, loaded.source_dtype).dtype
            yield FileTensor(name, tuple(tensor.shape), target, partial(tensor.to, target))
        elif layer is None or part == "bias" or not layer.weight_format.quantised:
            kept = not tensor.is_floating_point()
            kept = kept or stays_float32(loaded.model, name, dtype)
            target = tensor.dtype if kept else dtype
            yield FileTensor(name, tuple(tensor.shape), target, partial(tensor.to, target))
        elif layer_name not in seen:  # once, for all of its packed tensors
            seen.add(layer_name)
            sizes = torch.empty(layer.out_features, layer.in_features, device="meta")
            kind = kind_of(layer)
            shape = tuple(kind.stored(layer, sizes).shape)
            weight = f"{layer_name}.{kind.weight}"
            yield FileTensor(weight, shape, dtype, partial(_dense, layer, dtype))


def round_as_saved(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a model without quantised layers the values that `save_plain_model` stores in `dtype`.

    What that changes nothing of stays where it is, memory-mapped or not.
    """
    for name, parameter in model.named_parameters():
        floating = parameter.is_floating_point() and parameter.dtype != dtype
        if floating and not stays_float32(model, name, dtype):
            rounded = parameter.data.to(dtype).to(parameter.dtype)
            if not torch.equal(rounded, parameter.data):
                parameter.data = rounded


def _dense(layer: FrozenLinear, dtype: torch.dtype) -> Tensor:
    return kind_of(layer).stored(layer, layer.dense_weight(torch.float32)).to(dtype)


def write_quantisation(
    folder: Path,
    layers: Mapping[str, Mapping[str, Any]],
    source_dtype: torch.dtype,
    digest: str,
    factors: Mapping[str, int] | None = None,
) -> None:
    """Write graft.json, which makes a folder a quantised one.

    layers: what `describe_format` says of each quantised layer's format, by name. digest: SHA-256
    of model.safetensors. factors: the ranks of factored layers.
    """
    description = {
        "format_version": FORMAT_VERSION,
        "source_dtype": str(source_dtype).removeprefix("torch."),
        "sha256": {SINGLE_FILE: digest},
        "layers": layers,
        **({"factors": factors} if factors else {}),
    }
    write_json(folder / QUANTISATION_FILE, description)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Write a safetensors file as that library does, byte for byte; return its SHA-256.

    Wide dtypes come first, then names in their order, so equal tensors give equal files.
    """
    order = sorted(tensors.items(), key=lambda item: (WRITABLE.index(item[1].dtype), item[0]))
    files = [
        FileTensor(name, tuple(tensor.shape), tensor.dtype, partial(_same, tensor))
        for name, tensor in order
    ]
    return write_tensor_file(path, files)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the model once, under the name that Hugging Face files give it.

    Dense frozen layers give their weight back as the module stored it that they stand for; packed
    ones give their packed tensors; a tensor tied to another is left out.
    """
    dense = {
        name: layer for name, layer in frozen_layers(model) if not layer.weight_format.quantised
    }
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        layer_name, _, part = name.rpartition(".")
        layer = dense.get(layer_name) if part == "weight" else None
        if layer is None:
            yield name, tensor
        else:
            kind = kind_of(layer)
            yield f"{layer_name}.{kind.weight}", kind.stored(layer, tensor)


def narrowed(tensor: Tensor, source: torch.dtype) -> Tensor:
    """Return the tensor in the source's dtype where that changes no value."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize <= source.itemsize:
        return tensor
    narrow = tensor.to(source)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def write_model_files(
    loaded: LoadedModel, folder: Path, dtype: torch.dtype, quantised: bool = False
) -> None:
    """Write what a model folder holds beside its weights: config.json, tokenizer, generation."""
    config = plain_config(loaded)
    config["dtype"] = str(loaded.source_dtype if quantised else dtype).removeprefix("torch.")
    config["architectures"] = [type(loaded.model).__name__]
    if quantised:
        config["quantization_config"] = CONFIG_MARKER
    write_json(folder / "config.json", config)
    write_tokenizer_files(loaded, folder)


def plain_config(loaded: LoadedModel) -> dict[str, Any]:
    """Return the configuration without where it was read and by which version of Transformers."""
    config: dict[str, Any] = loaded.model.config.to_dict()
    return {
        key: value
        for key, value in config.items()
        if key not in ("_name_or_path", "transformers_version")
    }


def write_tokenizer_files(loaded: LoadedModel, folder: Path) -> None:
    """Write the tokenizer with its chat template, and the defaults of generation."""
    write_words(loaded.tokenizer, loaded.model.generation_config, folder)


def write_words(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, folder: Path
) -> None:
    """Write a tokenizer and the defaults of generation that belong to it into a folder."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # Of a full disk the tokenizers library says so with Exception itself, and no kind of it.
        if type(error) is not Exception:
            raise
        raise OSError(errno.EIO, f"the tokenizer: {error}") from error
    if tokenizer_note(tokenizer) is not None:
        # Any version of Transformers then reads tokenizer.json as it is.
        settings = read_json(folder / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": PLAIN_CLASS})
    if generation is not None:
        # Not by save_pretrained, which refuses what many folders say, and Transformers takes.
        generation.to_json_file(folder / GENERATION_FILE)
