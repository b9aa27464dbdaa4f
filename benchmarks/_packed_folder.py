"""Writing a quantised model folder of any size, without ever holding the model in memory.

The weights are random: one matrix of each shape is quantised, and each layer gets its codes,
shifted by some bytes so that no two layers are equal, and its statistics as they are.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from _shapes import LlamaShape
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from graft.files.write import write_json
from graft.formats.base import WeightFormat, storage_bytes
from graft.formats.registry import describe_format
from graft.model.folder import CONFIG_MARKER, FORMAT_VERSION, QUANTISATION_FILE
from graft.model.weight_files import INDEX_FILE

SHARD_BYTES = 5 * 10**9

_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
_STANDARD_DEVIATION = 0.02


def packed_bytes(shape: LlamaShape, weight_format: WeightFormat) -> int:
    """Return the size of the folder's tensors, embeddings and head in bf16 included."""
    layer = sum(storage_bytes(weight_format, *size) for size in shape.linears().values())
    vectors = 2 * shape.layers + 1
    dense = 2 * shape.vocabulary * shape.hidden + vectors * shape.hidden
    return shape.layers * layer + 2 * dense


def write_packed_folder(folder: Path, shape: LlamaShape, weight_format: WeightFormat) -> None:
    """Write the folder; graft.json, by which a complete one is known, comes last.

    What was written goes to the disk and leaves the page cache, so that it is read anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = shape.config().to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": CONFIG_MARKER,
    }
    write_json(folder / "config.json", config)
    _write_tokenizer(folder)
    writer = _Writer(shape, weight_format)
    shards = list(_shards(writer))
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, tensors, writer)
        weight_map |= {tensor.name: name for tensor in tensors}
    total = packed_bytes(shape, weight_format)
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    layers = {layer: describe_format(weight_format) for layer in writer.layers}
    description = {"format_version": FORMAT_VERSION, "source_dtype": "bfloat16", "layers": layers}
    write_json(folder / QUANTISATION_FILE, description)


@dataclass(frozen=True)
class _Entry:
    """A tensor of a shard: its name, and what its bytes are made from."""

    name: str
    kind: str | tuple[int, int]
    """matrix or vector; or the shape of the linear layer that it belongs to."""
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class _Writer:
    """The tensors of the model in order, and their data."""

    def __init__(self, shape: LlamaShape, weight_format: WeightFormat) -> None:
        self.shape, self.weight_format = shape, weight_format
        self.layers = {
            f"model.layers.{number}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}": size
            for number in range(shape.layers)
            for name, size in shape.linears().items()
        }
        torch.manual_seed(0)
        self.packed = {
            size: weight_format.pack(_random(size)) for size in dict.fromkeys(self.layers.values())
        }
        self.matrix = _random((shape.vocabulary, shape.hidden))
        self.vector = torch.ones(shape.hidden, dtype=torch.bfloat16)

    def entries(self) -> Iterator[_Entry]:
        table, vector = (self.shape.vocabulary, self.shape.hidden), (self.shape.hidden,)
        yield _Entry("model.embed_tokens.weight", "matrix", "", table, torch.bfloat16)
        for layer, size in self.layers.items():
            for key, spec in self.weight_format.storage(*size).items():
                yield _Entry(f"{layer}.{key}", size, key, spec.shape, spec.dtype)
            if layer.endswith("q_proj"):
                for norm in ("input_layernorm", "post_attention_layernorm"):
                    name = f"{layer.removesuffix('.self_attn.q_proj')}.{norm}.weight"
                    yield _Entry(name, "vector", "", vector, torch.bfloat16)
        yield _Entry("model.norm.weight", "vector", "", vector, torch.bfloat16)
        yield _Entry("lm_head.weight", "matrix", "", table, torch.bfloat16)

    def data(self, entry: _Entry) -> Iterator[memoryview]:
        """Yield the tensor's bytes."""
        if isinstance(entry.kind, str):
            yield _bytes(self.matrix if entry.kind == "matrix" else self.vector)
            return
        content = _bytes(self.packed[entry.kind][entry.key])
        shift = 0
        if entry.key == "codes":
            shift = random.Random(entry.name).randrange(len(content))
        yield content[shift:]
        yield content[:shift]


def _random(shape: tuple[int, int]) -> Tensor:
    bound = _STANDARD_DEVIATION * 3**0.5
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _shards(writer: _Writer) -> Iterator[list[_Entry]]:
    """Yield the tensors of each file, ordered as safetensors orders them: aligned, then by name."""
    shard: list[_Entry] = []
    for entry in writer.entries():
        if sum(one.bytes for one in shard) + entry.bytes > SHARD_BYTES:
            yield sorted(shard, key=lambda one: (-one.dtype.itemsize, one.name))
            shard = []
        shard.append(entry)
    yield sorted(shard, key=lambda one: (-one.dtype.itemsize, one.name))


def _write_shard(path: Path, tensors: list[_Entry], writer: _Writer) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in tensors:
        begin, end = end, end + entry.bytes
        place = {"shape": list(entry.shape), "data_offsets": [begin, end]}
        header[entry.name] = {"dtype": _CODES[entry.dtype], **place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in tensors:
            for piece in writer.data(entry):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.replace(temporary, path)


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, which a model folder must have; the benchmark draws token ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=2048
    )
    fast.save_pretrained(folder)
