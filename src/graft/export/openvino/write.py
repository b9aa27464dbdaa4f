"""Writing a merged model of the Llama family for OpenVINO, its integers as u4 or u8 constants.

A quantised weight is Constant u4 [out, groups, group_size], Convert, Subtract a float zero point,
Multiply by the scale, Reshape: OpenVINO keeps it in 4 bits when it runs.

OpenVINO's own constants lie in memory until the whole graph is written. So the graph is made with
parameters in the places of the weights, which are written one at a time behind the small constants
in openvino_model.bin, and the parameters in openvino_model.xml become constants at those offsets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from graft.errors import raise_problems
from graft.export.decoder_graph import DecoderGraph, Node, Size
from graft.export.layers import (
    FolderReport,
    config_problems,
    format_problems,
    int_format,
    layer_problems,
    model_ids,
    package_problems,
    scales,
    short_group_notes,
    side_by_side,
    stored_dtype,
    whole_groups,
    zero_points,
)
from graft.export.openvino.graph_file import saved_graph
from graft.export.openvino.tokenizers import write_openvino_tokenizer
from graft.files.write import new_folder
from graft.formats.base import WeightFormat
from graft.formats.int_group import GROUP_SIZES
from graft.layers.frozen import FrozenLinear
from graft.model.families import exported
from graft.model.load import LoadedModel
from graft.model.save import write_model_files
from graft.model.tensor_file import FileTensor, OnTensor, starts, write_tensors

GRAPH, DATA = "openvino_model.xml", "openvino_model.bin"
BITS = (2, 3, 4, 8)
"""2- and 3-bit codes are kept in 4 bits."""
_ALIGNED = 64
"""Where a weight begins, so that a mapped file can be computed with as it is."""
_HINT = (
    "OpenVINO computes in bf16 on processors that have it; for the same answers compile the model "
    "with INFERENCE_PRECISION_HINT=f32"
)

_ENDLESS = (
    "no token ends an answer; OpenVINO GenAI generates only where generation_config.json names one "
    "(eos_token_id)"
)


def check_openvino_plan(config: PretrainedConfig, weight_format: WeightFormat) -> list[str]:
    """Return every reason why a model in that format cannot be exported, before it exists."""
    problems = package_problems("openvino") + config_problems(config, "OpenVINO", exported("graph"))
    return problems + format_problems(weight_format, "OpenVINO", BITS, GROUP_SIZES)


def check_openvino(model: PreTrainedModel) -> list[str]:
    """Return every reason why this model cannot be exported; reads no weights."""
    problems = package_problems("openvino")
    problems += config_problems(model.config, "OpenVINO", exported("graph"))
    return problems + layer_problems(model, "OpenVINO", BITS, GROUP_SIZES)


def export_openvino(
    loaded: LoadedModel, folder: Path, on_tensor: OnTensor | None = None
) -> FolderReport:
    """Write openvino_model.xml and .bin, the configurations and the tokenizer as a folder.

    Everything is computed in float32; an unquantised weight is stored in the source's 16 bits where
    they hold it, which widen without loss. The tokenizer is there as Transformers reads it, and as
    OpenVINO's own models where openvino-tokenizers is installed and has a form of it. One weight at
    a time is in memory; the folder appears under its name only when it is complete. Raises
    GraftError, with every reason, before anything is written.
    """
    raise_problems(check_openvino(loaded.model), "cannot export to OpenVINO")
    ops = _OpenVinoOps(loaded.source_dtype)
    DecoderGraph(loaded.model, ops).build()
    with new_folder(folder) as part:
        with saved_graph(ops.model(), part / GRAPH) as tree:
            small = (part / DATA).read_bytes()
            small += bytes(-len(small) % _ALIGNED)
            write_tensors(
                part / DATA, ops.stored, header=small, alignment=_ALIGNED, on_tensor=on_tensor
            )
            _place_constants(tree, ops.stored, len(small))
        write_model_files(loaded, part, torch.float32)
        told = write_openvino_tokenizer(part, int(loaded.model.config.vocab_size))
    short = tuple(ops.float32_layers)
    if not model_ids(loaded).ends:
        told = (*told, _ENDLESS)
    notes = (*short_group_notes("OpenVINO", short), *told)
    return FolderReport(short, (_HINT, *notes))


def _place_constants(
    tree: ElementTree.ElementTree[Any], stored: Sequence[FileTensor], begin: int
) -> None:
    """Make constants of the parameters that stand for the stored tensors, which begin there."""
    places = dict(zip((tensor.name for tensor in stored), starts(stored, _ALIGNED), strict=True))
    sizes = {tensor.name: tensor.bytes for tensor in stored}
    for layer in tree.iterfind("./layers/layer[@type='Parameter']"):
        name, data = layer.attrib["name"], layer.find("data")
        if name in places:
            assert data is not None
            layer.set("type", "Const")
            data.set("offset", str(begin + places.pop(name)))
            data.set("size", str(sizes[name]))
    assert not places, "every stored tensor has its place in the graph"
    for written_by in tree.findall("./rt_info"):  # which version of OpenVINO
        tree.getroot().remove(written_by)


class _OpenVinoOps:
    """`GraphOps` as nodes of OpenVINO's operation set 13."""

    def __init__(self, source: torch.dtype) -> None:
        import openvino
        from openvino import opset13

        self._source = source
        self.stored: list[FileTensor] = []
        """The weights, in the order in which they lie in the file."""
        self.float32_layers: list[str] = []
        self._ov, self._set = openvino, opset13
        self._parameters: list[Any] = []
        self._weights: list[Any] = []
        self._results: list[Any] = []
        self._kept: list[Any] = []
        self._empty: dict[tuple[int, int], Node] = {}
        self._tables: dict[int, Node] = {}
        self._wholes: dict[tuple[int, ...], Node] = {}

    def model(self) -> Any:
        """Return the finished model, its nodes named by their place: equal models, equal files."""
        inputs = self._parameters + self._weights
        model = self._ov.Model(self._results, self._kept, inputs, "decoder")
        for index, node in enumerate(model.get_ordered_ops()):
            if re.fullmatch(r"\w+_\d+", node.get_friendly_name()):  # OpenVINO's own running number
                node.set_friendly_name(f"{node.get_type_name()}_{index}")
        return model

    def _input(self, name: str, kind: Any, sizes: Sequence[int]) -> Node:
        parameter = self._set.parameter(list(sizes), kind, name=name)
        parameter.output(0).get_tensor().set_names({name})
        self._parameters.append(parameter)
        return parameter

    def ids(self, name: str, sizes: tuple[str, str]) -> Node:
        ids = self._input(name, self._ov.Type.i64, (-1, -1))
        if name == "input_ids":
            self._batch = self.size(ids, 0)
        return ids

    def cached(self, layer: int, kind: str, new: Node, heads: int, width: int) -> Node:
        """A variable, whose rows `beam_idx` orders anew, as OpenVINO GenAI expects."""
        if not self._empty:
            self._beams = self._input("beam_idx", self._ov.Type.i32, (-1,))
        if (heads, width) not in self._empty:
            sizes = [self._batch, self._whole(heads, 0, width)]
            zero = self.constant("zero", torch.tensor(0.0))
            self._empty[heads, width] = self._set.broadcast(zero, self.concat(sizes, 0))
        name = f"past_key_values.{layer}.{kind}present.{layer}.{kind}"
        shape = self._ov.PartialShape([-1, heads, -1, width])
        info = self._ov.op.util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = shape, self._ov.Type.f32, name
        variable = self._ov.op.util.Variable(info)
        past = self._ov.op.read_value(self._empty[heads, width], variable)
        past.set_friendly_name(f"past_key_values.{layer}.{kind}")
        together = self.concat([self._set.gather(past, self._beams, self._whole(0)), new], 2)
        keeping = self._ov.op.assign(together, variable)
        keeping.set_friendly_name(f"present.{layer}.{kind}")
        self._kept.append(keeping)
        return together

    def logits(self, value: Node) -> None:
        result = self._set.result(value)
        value.output(0).get_tensor().add_names({"logits"})
        result.set_friendly_name("logits")
        self._results.append(result)

    def constant(self, name: str, value: Tensor) -> Node:
        return self._set.constant(value.detach().cpu().numpy(), name=name)

    def _whole(self, *values: int) -> Node:
        if values not in self._wholes:
            self._wholes[values] = self._set.constant(np.array(values, np.int64))
        return self._wholes[values]

    def _stored(
        self, name: str, shape: Sequence[int], tensor: FileTensor, kind: Any = None
    ) -> Node:
        """Return a parameter in the place of a weight, whose data are written later."""
        parameter = self._set.parameter(list(shape), kind or self._ov.Type.f32, name=name)
        self._weights.append(parameter)
        self.stored.append(tensor)
        return parameter

    def _float(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]
    ) -> Node:
        """Return float32 of a weight that is stored in `dtype`."""
        types = self._ov.Type
        kinds = {torch.bfloat16: types.bf16, torch.float16: types.f16}
        kind = kinds.get(dtype, types.f32)
        stored = self._stored(name, shape, FileTensor(name, shape, dtype, make), kind)
        return stored if dtype is torch.float32 else self._set.convert(stored, "f32")

    def _dense(self, name: str, weight: Tensor | FrozenLinear) -> Node:
        dtype = stored_dtype(weight, self._source)
        if isinstance(weight, Tensor):
            return self._float(name, tuple(weight.shape), dtype, lambda: weight.to(dtype))
        shape = weight.out_features, weight.in_features
        return self._float(name, shape, dtype, lambda: weight.dense_weight(dtype))

    def rows(self, name: str, table: Tensor, ids: Node) -> Node:
        stored = self._dense(name, table)
        self._tables[table.data_ptr()] = stored
        return self._set.gather(stored, ids, self._whole(0))

    def dense(self, name: str, x: Node, weight: Tensor | FrozenLinear) -> Node:
        stored = None if isinstance(weight, FrozenLinear) else self._tables.get(weight.data_ptr())
        if stored is None:
            stored = self._dense(name, weight)
        return self._set.matmul(x, stored, False, True)

    def quantised(self, name: str, x: Node, layer: FrozenLinear) -> Node:
        weight_format = int_format(layer)
        size, rows, columns = weight_format.group_size, layer.out_features, layer.in_features
        if not whole_groups(layer):
            self.float32_layers.append(name)
            return self.dense(name, x, layer)
        bits = 8 if weight_format.bits == 8 else 4
        groups = columns // size
        packed = FileTensor(
            name,
            (rows, columns * bits // 8),
            torch.uint8,
            lambda: side_by_side(layer, bits, columns),
        )
        kind = self._ov.Type.u8 if bits == 8 else self._ov.Type.u4
        codes = self._stored(name, (rows, groups, size), packed, kind)
        factor, zeros = (
            self._float(
                f"{name}.{part}",
                (rows, groups, 1),
                torch.float32,
                lambda make=make: make(layer),  # type: ignore[misc]
            )
            for part, make in (("scales", scales), ("zero_points", zero_points))
        )
        moved = self._set.subtract(self._set.convert(codes, np.float32), zeros)
        weight = self._set.multiply(moved, factor)
        flat = self._set.reshape(weight, self._whole(rows, columns), False)
        return self._set.matmul(x, flat, False, True)

    def add(self, a: Node, b: Node) -> Node:
        return self._set.add(a, b)

    def multiply(self, a: Node, b: Node) -> Node:
        return self._set.multiply(a, b)

    def matmul(self, a: Node, b: Node, transposed: bool = False) -> Node:
        return self._set.matmul(a, b, False, transposed)

    def reciprocal_root(self, x: Node) -> Node:
        return self._set.divide(self.constant("one", torch.tensor(1.0)), self._set.sqrt(x))

    def mean_square(self, x: Node) -> Node:
        return self._set.reduce_mean(self._set.multiply(x, x), self._whole(-1), True)

    def unary(self, kind: str, x: Node) -> Node:
        return getattr(self._set, kind)(x)

    def softmax(self, x: Node) -> Node:
        return self._set.softmax(x, -1)

    def reshape(self, x: Node, sizes: Sequence[Size]) -> Node:
        if all(isinstance(size, int) for size in sizes):
            return self._set.reshape(x, self._whole(*sizes), True)
        parts = [self._whole(size) if isinstance(size, int) else size for size in sizes]
        return self._set.reshape(x, self.concat(parts, 0), True)

    def transpose(self, x: Node, order: Sequence[int]) -> Node:
        return self._set.transpose(x, self._whole(*order))

    def concat(self, parts: Sequence[Node], axis: int) -> Node:
        return self._set.concat(list(parts), axis)

    def part(self, x: Node, start: int, stop: int) -> Node:
        bounds = (self._whole(number) for number in (start, stop, 1, -1))
        return self._set.slice(x, *bounds)

    def size(self, x: Node, axis: int) -> Node:
        return self._set.gather(self._set.shape_of(x), self._whole(axis), self._whole(0))

    def visible(self, mask: Node, tokens: Node, total: Node, window: int | None) -> Node:
        zero, one = (self._set.constant(np.int64(number)) for number in (0, 1))
        count, end = (self._set.squeeze(size, self._whole(0)) for size in (tokens, total))
        seen = self._set.range(zero, end, one, "i64")
        seeing = self._set.range(self._set.subtract(end, count), end, one, "i64")
        column = self.reshape(seeing, (-1, 1))
        before = self._set.less_equal(seen, column)
        if window is not None:
            first = self._set.subtract(column, self._set.constant(np.int64(window)))
            before = self._set.logical_and(before, self._set.greater(seen, first))
        present = self._set.convert(self.reshape(mask, (0, 1, 1, -1)), "boolean")
        allowed = self._set.logical_and(present, before)
        lowest = self.constant("lowest", torch.tensor(torch.finfo(torch.float32).min))
        return self._set.select(allowed, self.constant("zero", torch.tensor(0.0)), lowest)

    def as_float(self, ids: Node) -> Node:
        return self._set.convert(ids, "f32")
