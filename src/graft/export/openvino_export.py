"""Writing a merged model of the Llama family for OpenVINO, its integers as u4 or u8 constants.

A quantised weight is Constant u4 [out, groups, group_size], Convert, Subtract a float zero point,
Multiply by the scale, Reshape: OpenVINO keeps it in 4 bits when it runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from graft.errors import raise_problems
from graft.export.decoder_graph import ARCHITECTURES, DecoderGraph, Node, Size
from graft.export.layers import (
    FolderReport,
    config_problems,
    format_problems,
    int_format,
    layer_codes,
    layer_problems,
    package_problems,
    short_group_notes,
    side_by_side,
    whole_groups,
    zero_points,
)
from graft.formats.base import WeightFormat
from graft.formats.int_group import GROUP_SIZES
from graft.formats.linear import FrozenLinear
from graft.model.load import LoadedModel
from graft.model.save import new_folder, write_model_files

BITS = (2, 3, 4, 8)
"""2- and 3-bit codes are kept in 4 bits."""
_HINT = (
    "OpenVINO computes in bf16 on processors that have it; for the same answers compile the model "
    "with INFERENCE_PRECISION_HINT=f32"
)


def check_openvino_plan(config: PretrainedConfig, weight_format: WeightFormat) -> list[str]:
    """Return every reason why a model in that format cannot be exported, before it exists."""
    problems = package_problems("openvino") + config_problems(config, "OpenVINO", ARCHITECTURES)
    return problems + format_problems(weight_format, "OpenVINO", BITS, GROUP_SIZES)


def check_openvino(model: PreTrainedModel) -> list[str]:
    """Return every reason why this model cannot be exported; reads no weights."""
    problems = package_problems("openvino")
    problems += config_problems(model.config, "OpenVINO", ARCHITECTURES)
    return problems + layer_problems(model, "OpenVINO", BITS, GROUP_SIZES)


def export_openvino(loaded: LoadedModel, folder: Path) -> FolderReport:
    """Write openvino_model.xml and .bin, the configuration and the tokenizer as a folder.

    Everything but the integers is float32. The weights of the whole graph are in memory, the
    integers packed; the folder appears under its name only when it is complete. Raises GraftError,
    with every reason, before anything is written.
    """
    raise_problems(check_openvino(loaded.model), "cannot export to OpenVINO")
    import openvino

    ops = _OpenVinoOps()
    DecoderGraph(loaded.model, ops).build()
    with new_folder(folder) as part:
        path = part / "openvino_model.xml"
        openvino.save_model(ops.model(), path, compress_to_fp16=False)
        write_model_files(loaded, part, torch.float32)
    short = tuple(ops.float32_layers)
    return FolderReport(short, (_HINT, *short_group_notes("OpenVINO", short)))


class _OpenVinoOps:
    """`GraphOps` as nodes of OpenVINO's operation set 13."""

    def __init__(self) -> None:
        import openvino
        from openvino import opset13

        self.float32_layers: list[str] = []
        self._ov, self._set = openvino, opset13
        self._parameters: list[Any] = []
        self._results: list[Any] = []
        self._tables: dict[int, Node] = {}

    def model(self) -> Any:
        """Return the finished model, its nodes named by their place: equal models, equal files."""
        model = self._ov.Model(self._results, self._parameters, "decoder")
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
        return self._input(name, self._ov.Type.i64, (-1, -1))

    def cache(self, name: str, heads: int, width: int) -> Node:
        return self._input(name, self._ov.Type.f32, (-1, heads, -1, width))

    def output(self, name: str, value: Node) -> None:
        result = self._set.result(value)
        value.output(0).get_tensor().add_names({name})
        result.set_friendly_name(name)
        self._results.append(result)

    def constant(self, name: str, value: Tensor) -> Node:
        return self._set.constant(value.detach().cpu().numpy(), name=name)

    def _whole(self, *values: int) -> Node:
        return self._set.constant(np.array(values, np.int64))

    def rows(self, name: str, table: Tensor, ids: Node) -> Node:
        stored = self._set.constant(table.detach().cpu().float().numpy(), name=name)
        self._tables[table.data_ptr()] = stored
        return self._set.gather(stored, ids, self._whole(0))

    def dense(self, name: str, x: Node, weight: Tensor | FrozenLinear) -> Node:
        stored = self._tables.get(weight.data_ptr()) if isinstance(weight, Tensor) else None
        if stored is None:
            dense = weight if isinstance(weight, Tensor) else weight.dense_weight(torch.float32)
            stored = self._set.constant(dense.detach().cpu().float().numpy(), name=name)
        return self._set.matmul(x, stored, False, True)

    def quantised(self, name: str, x: Node, layer: FrozenLinear) -> Node:
        weight_format = int_format(layer)
        size, rows, columns = weight_format.group_size, layer.out_features, layer.in_features
        if not whole_groups(layer):
            self.float32_layers.append(name)
            return self.dense(name, x, layer)
        wide = weight_format.bits == 8
        packed = side_by_side(layer_codes(layer), 8 if wide else 4)
        kind = self._ov.Type.u8 if wide else self._ov.Type.u4
        shape = [rows, columns // size, size]
        tensor = self._ov.Tensor(packed.contiguous().numpy(), shape, kind)
        constant = self._ov.op.Constant(tensor, shared_memory=False)
        constant.set_friendly_name(name)
        scales, zeros = (
            self.constant(f"{name}.{part}", values.unsqueeze(-1).contiguous())
            for part, values in zip(("scales", "zero_points"), zero_points(layer), strict=True)
        )
        moved = self._set.subtract(self._set.convert(constant, np.float32), zeros)
        weight = self._set.multiply(moved, scales)
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
