"""Writing what a source holds as the folder that `graft.model.save` would have written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from graft.convert.config import ConvertConfig
from graft.convert.source import DenseLayer, PlainTensor, QuantisedLayer, Source, of_layer
from graft.convert.ties import with_own_heads
from graft.errors import GraftError, Problems, raise_problems
from graft.files.write import new_folder
from graft.formats.base import WeightFormat, storage_bytes
from graft.formats.registry import describe_format, settings_of
from graft.layers.registry import find_kind, kind_of
from graft.model.load import LoadedModel
from graft.model.names import check_unplaced, partners
from graft.model.save import write_model_files, write_quantisation
from graft.model.targets import linear_layers, linear_shape
from graft.model.tensor_file import WRITABLE, FileTensor, OnTensor, write_tensor_file
from graft.model.weight_sets import SINGLE_FILE

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
    asked: ConvertConfig = ConvertConfig()
    dense: Counter[str] = field(default_factory=Counter)
    """What --dequantise makes floats, by what the source holds."""

    @property
    def dense_dtype(self) -> torch.dtype:
        """The dtype of what --dequantise makes floats."""
        return cast(torch.dtype, getattr(torch, self.asked.dequantised_dtype))

    @property
    def source_dtype(self) -> torch.dtype:
        """The dtype that config.json gives, or else most of the unquantised tensors have.

        Where layers were dequantised it is theirs, so that no reader narrows them.
        """
        if self.dense:
            return self.dense_dtype
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


def plan_conversion(source: Source, asked: ConvertConfig) -> ConversionPlan:
    """Match everything in the source with the model.

    Raises GraftError with every tensor that is missing, misshapen or in a form that graft does not
    hold.
    """
    plan = ConversionPlan(source, dequantised=list(source.dequantised), asked=asked)
    problems, unheld = Problems(), dict[str, list[str]]()
    same = partners(source.model)
    plan.source = source = with_own_heads(source)
    model = source.model
    linear, tied = linear_layers(model), set(model.all_tied_weights_keys)
    used: set[str] = set()
    held = {*source.tensors, *(f"{name}.weight" for name in source.layers)}

    def find(entries: Mapping[str, Value], name: str, part: str = "") -> Value | None:
        """Return the entry of a tensor or, without that part, of its layer: of another that is tied
        to it, where that one is held alone."""
        for key in (name,) if name in held else same.get(name, ()):
            if (entry := key.removesuffix(part)) in entries and key.endswith(part):
                used.add(entry)
                return entries[entry]
        return None

    for name, tensor in model.state_dict().items():
        owner, _, part = name.rpartition(".")
        if name in tied:
            used |= {name, owner}
            continue
        read_layer = find(source.layers, name, ".weight") if part == "weight" else None
        plain = None if read_layer else find(source.tensors, name)
        with problems.collecting():
            if read_layer is not None:
                module = model.get_submodule(owner)
                with of_layer(owner):
                    in_features, out_features = _sizes(module, tensor)
                    layer = read_layer(out_features, in_features)
                if owner not in linear:
                    plan.dequantised.append(owner)
                    make = _dequantising(owner, layer, out_features, in_features)
                    plan.tensors.append(FileTensor(name, tuple(tensor.shape), torch.float32, make))
                elif isinstance(layer, QuantisedLayer) and not asked.dequantise:
                    plan.formats[owner] = layer.weight_format
                    plan.tensors += _packed(owner, layer, out_features, in_features)
                else:
                    if isinstance(layer, DenseLayer) and not asked.dequantise:
                        unheld.setdefault(layer.quantisation, []).append(owner)
                    make = _dequantising(owner, layer, out_features, in_features)
                    stored = partial(_as_stored, module, make, plan.dense_dtype)
                    shape = tuple(tensor.shape)
                    plan.tensors.append(FileTensor(name, shape, plan.dense_dtype, stored))
                    plan.dense[_words(layer)] += 1
            elif plain is not None:
                if plain.quantisation and not asked.dequantise:
                    unheld.setdefault(plain.quantisation, []).append(name)
                if plain.quantisation:
                    plan.dense[plain.quantisation] += 1
                    plain = replace(
                        plain, dtype=plan.dense_dtype, make=_narrowing(plain, plan.dense_dtype)
                    )
                plan.tensors.append(_plain(name, plain, tensor))
            else:
                raise GraftError(f"tensor {name} is missing")
    left = [key for key in (*source.layers, *source.tensors) if key not in used]
    plan.left_out = left
    with problems.collecting():
        _check_left_out(source, left)
    del problems.found[_ADVICE:]
    problems.found += [
        f"{len(names)} weights are {quantisation} ({names[0]} ...), which graft's formats do not "
        "hold; add --dequantise to bring them in as floats, or start from the unquantised model"
        for quantisation, names in unheld.items()
    ]
    problems.raise_all("nothing was written")
    return plan


def _sizes(module: torch.nn.Module, weight: Tensor) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer, or of a matrix in another module.

    Such are embeddings, and what sends tokens to experts.
    """
    if find_kind(module) is not None:
        return linear_shape(module)
    if weight.dim() != 2:
        raise GraftError(f"its weight is quantised, and is {list(weight.shape)}; expected a matrix")
    return weight.shape[1], weight.shape[0]


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


def _dequantising(
    name: str, layer: QuantisedLayer | DenseLayer, out_features: int, in_features: int
) -> Callable[[], Tensor]:
    """Return what makes the weight float32, which holds every quantised weight."""

    def make() -> Tensor:
        if isinstance(layer, QuantisedLayer):
            packed = _made(name, layer)
            return layer.weight_format.unpack(packed, out_features, in_features, torch.float32)
        with of_layer(name):
            return _finite(name, layer.make())

    return make


def _as_stored(module: torch.nn.Module, make: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    """Return the weight of a linear layer as its module holds it, which GPT-2's do transposed."""
    return _finite("it", kind_of(module).stored(module, make()).to(dtype).contiguous())


def _narrowing(tensor: PlainTensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: _finite("it", tensor.make().to(dtype))


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise GraftError(f"{name} is not finite in {tensor.dtype}; download it again")
    return tensor


def _words(layer: QuantisedLayer | DenseLayer) -> str:
    """Return what the source holds, for the report."""
    if isinstance(layer, DenseLayer):
        return layer.quantisation
    return in_words(layer.weight_format)


_IN_WORDS = {"bits": "{} bits", "group_size": "groups of {}", "double_quant": "double quantised"}
"""What is said of a setting of a format."""


def in_words(weight_format: WeightFormat) -> str:
    """Return a format with its settings, for the report."""
    settings = settings_of(weight_format)
    said = [words.format(settings[key]) for key, words in _IN_WORDS.items() if settings.get(key)]
    return ", ".join([weight_format.name, *said])


def _made(name: str, layer: QuantisedLayer) -> Mapping[str, Tensor]:
    with of_layer(name):
        packed = layer.make()
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


def _check_left_out(source: Source, names: list[str]) -> None:
    """Raise GraftError where what has no place in the model may change what it computes."""
    raise_problems(
        [
            f"{name} is quantised, and the model of config.json has no such layer"
            for name in names
            if name in source.layers
        ][:20],
        "tensors without a place, which change what is computed",
    )
    plain = {name: source.tensors[name].make for name in names if name in source.tensors}
    check_unplaced(source.model, plain)


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
