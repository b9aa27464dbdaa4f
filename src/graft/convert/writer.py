"""Writing what a source holds as the folder that `graft.model.save` would have written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from graft.convert.source import PlainTensor, QuantisedLayer, Source
from graft.errors import GraftError, Problems, raise_problems
from graft.files.write import new_folder
from graft.formats.base import WeightFormat, storage_bytes
from graft.formats.registry import describe_format
from graft.model.load import LoadedModel
from graft.model.save import write_model_files, write_quantisation
from graft.model.targets import linear_layers, linear_shape
from graft.model.tensor_file import WRITABLE, FileTensor, OnTensor, write_tensor_file
from graft.model.weight_files import SINGLE_FILE

_ADVICE = 20
"""Problems that are listed; thousands of layers may share one."""

Value = TypeVar("Value")


@dataclass
class ConversionPlan:
    """What will be written; no weight has been read yet."""

    source: Source
    tensors: list[FileTensor] = field(default_factory=list)
    formats: dict[str, WeightFormat] = field(default_factory=dict)
    """The quantised layers, in the model's order."""
    dequantised: list[str] = field(default_factory=list)
    """What the source holds quantised and the folder does not: embeddings, the output head."""
    left_out: list[str] = field(default_factory=list)
    """Tensors of the source that have no place in the model."""

    @property
    def source_dtype(self) -> torch.dtype:
        """The dtype that config.json gives, or else most of the unquantised tensors have."""
        named = self.source.model.config.dtype
        if isinstance(named, torch.dtype):
            return named
        dtypes = [tensor.dtype for tensor in self.source.tensors.values()]
        counts = Counter(dtype for dtype in dtypes if dtype.is_floating_point)
        return counts.most_common(1)[0][0] if counts else torch.float32

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantised layers, scales and offsets included; None when there are none."""
        shapes = {
            name: linear_shape(self.source.model.get_submodule(name)) for name in self.formats
        }
        weights = sum(rows * columns for rows, columns in shapes.values())
        bits = sum(
            8 * storage_bytes(self.formats[name], out_features, in_features)
            for name, (in_features, out_features) in shapes.items()
        )
        return bits / weights if weights else None


def plan_conversion(source: Source) -> ConversionPlan:
    """Match everything in the source with the model.

    Raises GraftError with every tensor that is missing, misshapen or in a form that graft does not
    hold.
    """
    plan, problems = ConversionPlan(source, dequantised=list(source.dequantised)), Problems()
    model = source.model
    linear, tied = linear_layers(model), set(model.all_tied_weights_keys)
    prefix = model.base_model_prefix + "."
    used: set[str] = set()

    def find(entries: Mapping[str, Value], name: str) -> Value | None:
        """Return the entry of that name: with or without the model's prefix."""
        for key in (name, name.removeprefix(prefix), prefix + name):
            if key in entries:
                used.add(key)
                return entries[key]
        return None

    for name, tensor in model.state_dict().items():
        owner, _, part = name.rpartition(".")
        if name in tied:
            used |= {name, owner}
            continue
        read_layer = find(source.layers, owner) if part == "weight" else None
        plain = None if read_layer else find(source.tensors, name)
        with problems.collecting():
            if read_layer is not None:
                in_features, out_features = _sizes(model.get_submodule(owner), tensor)
                layer = read_layer(out_features, in_features)
                if owner in linear:
                    plan.formats[owner] = layer.weight_format
                    plan.tensors += _packed(owner, layer, out_features, in_features)
                else:
                    plan.dequantised.append(owner)
                    plan.tensors.append(_dense(name, layer, out_features, in_features))
            elif plain is not None:
                plan.tensors.append(_plain(name, plain, tensor))
            else:
                raise GraftError(f"tensor {name} is missing")
    left = [key for key in (*source.layers, *source.tensors) if key not in used]
    plan.left_out = left
    with problems.collecting():
        _check_left_out(source, left)
    del problems.found[_ADVICE:]
    problems.raise_all("nothing was written")
    return plan


def _sizes(module: torch.nn.Module, weight: Tensor) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer, or of an embedding's table."""
    if isinstance(module, torch.nn.Embedding):
        return weight.shape[1], weight.shape[0]
    return linear_shape(module)


def _packed(
    name: str, layer: QuantisedLayer, out_features: int, in_features: int
) -> Iterator[FileTensor]:
    """Yield a layer's packed tensors; it is made when the first is asked for, and given away."""
    made: dict[str, Tensor] = {}

    def part(key: str) -> Tensor:
        if not made:
            made.update(_made(name, layer))
        return made.pop(key)

    for key, spec in layer.weight_format.storage(out_features, in_features).items():
        yield FileTensor(f"{name}.{key}", spec.shape, spec.dtype, partial(part, key))


def _dense(name: str, layer: QuantisedLayer, out_features: int, in_features: int) -> FileTensor:
    """Return the weight dequantised to float32, which holds every quantised weight."""

    def make() -> Tensor:
        packed = _made(name, layer)
        return layer.weight_format.unpack(packed, out_features, in_features, torch.float32)

    return FileTensor(name, (out_features, in_features), torch.float32, make)


def _made(name: str, layer: QuantisedLayer) -> Mapping[str, Tensor]:
    try:
        packed = layer.make()
    except GraftError as error:
        raise GraftError(f"{name}: {error}") from error
    odd = [
        part
        for part, tensor in packed.items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if odd:
        raise GraftError(f"{name}: {' and '.join(odd)} are not finite; download it again")
    return packed


def _plain(name: str, tensor: PlainTensor, place: Tensor) -> FileTensor:
    shape = tuple(place.shape)
    if tensor.shape != shape:
        raise GraftError(
            f"{name} has shape {list(tensor.shape)}; config.json makes it {list(shape)}"
        )
    alike = tensor.dtype.is_floating_point == place.is_floating_point()
    if tensor.dtype not in WRITABLE or not alike:
        raise GraftError(f"{name} is {tensor.dtype}; graft keeps 16, 32 and 64-bit floats")
    return FileTensor(name, shape, tensor.dtype, tensor.make)


_COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias)")
"""Tensors that older checkpoints hold and the model computes: rotary frequencies, GPT-2's masks."""


def _check_left_out(source: Source, names: list[str]) -> None:
    """Raise GraftError where what has no place in the model may change what it computes."""
    tied = set(source.model.all_tied_weights_keys)
    problems = []
    for name in names:
        if name in source.layers:
            problems.append(f"{name} is quantised, and the model of config.json has no such layer")
        elif name in tied or _COMPUTED.fullmatch(name):
            continue
        elif bool(source.tensors[name].make().any()):
            problems.append(f"{name} is not zero, and the model of config.json has no such tensor")
    raise_problems(problems[:20], "tensors without a place, which change what is computed")


def write_conversion(
    plan: ConversionPlan,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    folder: Path,
    on_tensor: OnTensor | None = None,
) -> None:
    """Write the new folder, one tensor in memory at a time.

    Raises GraftError, and leaves no folder, when a layer's statistics do not fit or the disk is
    full.
    """
    model, dtype = plan.source.model, plan.source_dtype
    model.generation_config = generation_config or model.generation_config
    with new_folder(folder) as part:
        digest = write_tensor_file(part / SINGLE_FILE, plan.tensors, on_tensor)
        loaded = LoadedModel(model, tokenizer, folder, dtype, dtype)
        write_model_files(loaded, part, dtype, bool(plan.formats))
        if plan.formats:
            layers = {name: describe_format(chosen) for name, chosen in plan.formats.items()}
            write_quantisation(part, layers, dtype, digest)
