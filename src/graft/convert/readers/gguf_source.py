"""GGUF files, as llama.cpp writes them: which tensor of the file is which of the model.

Embeddings and the output head, of whatever type, are dequantised to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from graft.convert.base import Reader
from graft.convert.config import ConvertConfig
from graft.convert.grids.gguf_layers import dense_rows, read_layer
from graft.convert.grids.integers import Rounding
from graft.convert.source import PlainTensor, ReadLayer, Source
from graft.errors import GraftError, raise_problems
from graft.model.families import family_of
from graft.model.gguf.config import gguf_config
from graft.model.gguf.file import FLOATS, GgufFile, GgufTensor, is_read, read_gguf
from graft.model.gguf.keys import unknown_keys
from graft.model.gguf.layout import gguf_layout, rotary_heads, rows_from_gguf
from graft.model.gguf.load import gguf_places
from graft.model.gguf.parts import first_part
from graft.model.gguf.rope import ROPE_FACTORS
from graft.model.gguf.tokenizer import make_tokenizer
from graft.model.gguf.tokens import TokenList, read_tokens
from graft.model.gguf.words import compare_tokenizer
from graft.model.subject import build_skeleton
from graft.model.targets import linear_layers
from graft.model.weight_sets import PICKLES
from graft.text import listed, quoted


class GgufReader(Reader):
    """Files of llama.cpp."""

    def reads_file(self, file: Path) -> bool:
        """Return whether it is called .gguf, or is a folder whose weights are all in such files."""
        if not file.is_dir():
            return file.suffix == ".gguf"
        others = (*PICKLES, "*.safetensors")
        return bool(_files(file)) and not any(any(file.glob(pattern)) for pattern in others)

    def open_file(self, file: Path, asked: ConvertConfig) -> tuple[Source, Path]:
        """Return what is in the file, or in the only one of a folder."""
        if file.is_dir():
            found = _files(file)
            if len(found) > 1:
                names = listed(one.name for one in found)
                raise GraftError(f"{file} holds several GGUF files; name one of them: {names}")
            file = found[0]
        return gguf_source(file), file


def _files(folder: Path) -> list[Path]:
    """Return the GGUF files of a folder, of one in parts the first."""
    files = sorted(file for file in folder.glob("*.gguf") if file.is_file())
    return list({first_part(file).name: file for file in reversed(files)}.values())[::-1]


def gguf_source(path: Path) -> Source:
    """Return what is in a GGUF file; raises GraftError for types and tensors that have no place."""
    file = read_gguf(path)
    model = build_skeleton(gguf_config(file), tensors=len(file.tensors))
    found = _Found(file, model, frozenset(linear_layers(model)))
    for name, target, module in gguf_places(model):
        for part, parameter in module.named_parameters(recurse=False):
            found.add(name, module, part, parameter, f"{target}.{part}")
    found.check()
    return Source(
        "GGUF",
        model,
        found.layers,
        found.tensors,
        found.rounding,
        tuple(found.dequantised),
        found.notes(),
        *_words(read_tokens(file), path),
    )


def _words(
    tokens: TokenList | None, path: Path
) -> tuple[Callable[[], Tokenizer], Callable[[Tokenizer], list[str]]] | tuple[()]:
    """Return what makes the file's tokenizer, and what compares another with it."""
    if tokens is None:
        return ()
    return partial(make_tokenizer, tokens, path), lambda given: compare_tokenizer(
        tokens, given, path
    )


@dataclass
class _Found:
    """What was matched so far of a file with the model."""

    file: GgufFile
    model: PreTrainedModel
    linear: frozenset[str]
    layers: dict[str, ReadLayer] = field(default_factory=dict)
    tensors: dict[str, PlainTensor] = field(default_factory=dict)
    rounding: Rounding = field(default_factory=Rounding)
    dequantised: list[str] = field(default_factory=list)
    places: set[str] = field(default_factory=set)
    """Names in the file of all that the model has."""
    no_biases: list[str] = field(default_factory=list)
    """Layers that have a bias in Transformers and none in the file."""

    def add(
        self, name: str, module: nn.Module, part: str, parameter: nn.Parameter, key: str
    ) -> None:
        """Take a parameter of a module from the tensor `key`.

        What is missing is left to the writer, which names it in the model's own words.
        """
        self.places.add(key)
        tensor = self.file.tensors.get(key)
        if tensor is None:
            if part == "bias" and gguf_layout(self.model.config).bias_settings:
                self.no_biases.append(name)
                self.tensors[f"{name}.{part}"] = _zeros(tuple(parameter.shape))
            return
        if not is_read(tensor.type):
            return
        order = _order(name, tensor, self.model)
        adds_one = family_of(self.model.config).norms_add_one and "norm" in name
        if tensor.type in FLOATS:
            self.tensors[f"{name}.{part}"] = _plain(tensor, order, adds_one)
        elif part != "weight" or len(tensor.shape) != 2:
            self.tensors[f"{name}.{part}"] = _plain(tensor, order, adds_one, tensor.type.name)
        elif name not in self.linear:
            self.tensors[f"{name}.{part}"] = _plain(tensor, order, adds_one)
            self.dequantised.append(name)
        else:
            self.layers[name] = partial(read_layer, key, tensor, order, self.rounding)

    def check(self) -> None:
        """Raise GraftError for types that are not read, and tensors that have no place."""
        unread: dict[GGMLQuantizationType, list[str]] = {}
        for name, tensor in self.file.tensors.items():
            if not is_read(tensor.type):
                unread.setdefault(tensor.type, []).append(name)
        problems = [
            f"{len(names)} tensors are {kind.name} ({quoted(names[0])} ...), which is not read; "
            "take the file in another type, or start from the unquantised model"
            for kind, names in unread.items()
        ]
        if gguf_layout(self.model.config).paired_rotary:
            self.places.add(ROPE_FACTORS)
        strange = [name for name in self.file.tensors if name not in self.places]
        if strange:
            problems.append(
                f"{len(strange)} tensors have no place in a {self.file.architecture} "
                f"({', '.join(map(quoted, strange[:3]))} ...)"
            )
        raise_problems(problems, str(self.file.path))

    def notes(self) -> list[str]:
        """Return what is worth telling of the file."""
        types = ", ".join(f"{count} {kind}" for kind, count in self.file.types().items())
        notes = [f"tensors of the file by type: {types}"]
        if self.no_biases:
            notes.append(
                f"{len(self.no_biases)} layers that have no bias in the file got one of zeros "
                f"({self.no_biases[0]} ...)"
            )
        return notes + unknown_keys(self.file)


def _order(name: str, tensor: GgufTensor, model: PreTrainedModel) -> Tensor | None:
    """Return for each row of the module the file's row that holds it, where they differ."""
    heads = rotary_heads(name, model.config)
    if heads is None or tensor.shape[0] % (2 * heads):
        return None
    return rows_from_gguf(tensor.shape[0], heads)


def _plain(
    tensor: GgufTensor, order: Tensor | None, adds_one: bool, quantisation: str = ""
) -> PlainTensor:
    def make() -> Tensor:
        dense = dense_rows(tensor, order)
        # llama.cpp multiplies by what is in the file, such a norm by 1 + weight.
        return dense - 1 if adds_one else dense

    dtype = FLOATS.get(tensor.type, torch.float32)
    return PlainTensor(tensor.shape, dtype, make, quantisation)


def _zeros(shape: tuple[int, ...]) -> PlainTensor:
    return PlainTensor(shape, torch.float32, partial(torch.zeros, shape))


GGUF = GgufReader()
