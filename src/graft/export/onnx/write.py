"""Writing a merged model of the Llama family as ONNX, its integers as MatMulNBits.

The weights lie beside the graph in model.onnx.data and are written one at a time. MatMulNBits (a
contributed operator of ONNX Runtime) computes with w = (q - z) s and takes the zero points z as
floats, so z = -offset / s keeps the trained weight to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from graft.errors import raise_problems
from graft.export.decoder_graph import DecoderGraph, Node, Size
from graft.export.layers import (
    config_problems,
    format_problems,
    int_format,
    layer_problems,
    package_problems,
    scales,
    side_by_side,
    stored_dtype,
    zero_points,
)
from graft.export.onnx.genai import CONFIG, genai_config, genai_notes
from graft.files.write import new_folder, write_json
from graft.formats.base import WeightFormat
from graft.layers.frozen import FrozenLinear
from graft.model.families import exported
from graft.model.load import LoadedModel
from graft.model.save import write_model_files
from graft.model.tensor_file import FileTensor, OnTensor, starts, write_tensors

BITS = (2, 3, 4)
"""3-bit codes are kept in 4 bits."""
GROUP_SIZES = (16, 32, 64, 128)
GRAPH, DATA = "model.onnx", "model.onnx.data"
_OPSET, _IR_VERSION = 17, 9
_ALIGNED = 4096
_UNARY = {"cos": "Cos", "sin": "Sin", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def check_onnx_plan(config: PretrainedConfig, weight_format: WeightFormat) -> list[str]:
    """Return every reason why a model in that format cannot be exported, before it exists."""
    problems = package_problems("onnx") + config_problems(config, "ONNX", exported("graph"))
    return problems + format_problems(weight_format, "ONNX", BITS, GROUP_SIZES)


def check_onnx(model: PreTrainedModel) -> list[str]:
    """Return every reason why this model cannot be exported; reads no weights."""
    problems = package_problems("onnx") + config_problems(model.config, "ONNX", exported("graph"))
    return problems + layer_problems(model, "ONNX", BITS, GROUP_SIZES)


def export_onnx(
    loaded: LoadedModel, folder: Path, on_tensor: OnTensor | None = None
) -> tuple[str, ...]:
    """Write model.onnx, its data, the configurations and the tokenizer as a folder.

    Everything is computed in float32; an unquantised weight is stored in the source's 16 bits where
    they hold it, which widen without loss. One weight at a time is in memory; the folder appears
    under its name only when it is complete. Returns what is worth telling. Raises GraftError, with
    every reason, before anything is written.
    """
    raise_problems(check_onnx(loaded.model), "cannot export to ONNX")
    import onnx

    ops = _OnnxOps(loaded.source_dtype)
    DecoderGraph(loaded.model, ops).build()
    with new_folder(folder) as part:
        write_tensors(part / DATA, ops.stored, alignment=_ALIGNED, on_tensor=on_tensor)
        onnx.save(ops.model(), part / GRAPH)
        write_model_files(loaded, part, torch.float32)
        write_json(part / CONFIG, genai_config(loaded, GRAPH))
    return genai_notes(loaded)


class _OnnxOps:
    """`GraphOps` as ONNX nodes."""

    def __init__(self, source: torch.dtype) -> None:
        import onnx

        self._source = source
        self.stored: list[FileTensor] = []
        """The weights, whose data lie in the file beside the graph."""
        self._make, self._from_numpy = onnx.helper, onnx.numpy_helper.from_array
        self._proto = onnx.TensorProto
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._small: list[Any] = []
        self._tables: dict[int, tuple[str, torch.dtype]] = {}
        self._wholes: dict[tuple[int, ...], Node] = {}
        self._count = 0

    def _node(self, kind: str, inputs: Sequence[Node], domain: str = "", **attributes: Any) -> Node:
        self._count += 1
        name = f"{kind}_{self._count}"
        self._nodes.append(
            self._make.make_node(kind, list(inputs), [name], name=name, domain=domain, **attributes)
        )
        return name

    def constant(self, name: str, value: Tensor) -> Node:
        self._count += 1
        name = f"{name}_{self._count}"
        self._small.append(self._from_numpy(value.detach().cpu().numpy(), name))
        return name

    def _whole(self, *values: int) -> Node:
        if values not in self._wholes:
            numbers = torch.tensor(values, dtype=torch.int64)
            self._wholes[values] = self.constant("sizes", numbers)
        return self._wholes[values]

    def _stored(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, make: Callable[[], Tensor]
    ) -> Node:
        """Return a constant whose data lie in the file beside the graph."""
        self.stored.append(FileTensor(name, tuple(shape), dtype, make))
        return name

    def model(self) -> Any:
        """Return the ModelProto."""
        constants = self._small + self._external()
        graph = self._make.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, constants
        )
        domains = [
            self._make.make_opsetid("", _OPSET),
            self._make.make_opsetid("com.microsoft", 1),
        ]
        model = self._make.make_model(graph, opset_imports=domains, producer_name="graft")
        model.ir_version = _IR_VERSION
        return model

    def _external(self) -> list[Any]:
        """Return what the graph says of each weight: where its data lie."""
        kinds = {
            torch.float32: self._proto.FLOAT,
            torch.float16: self._proto.FLOAT16,
            torch.bfloat16: self._proto.BFLOAT16,
            torch.uint8: self._proto.UINT8,
        }
        found = []
        for tensor, start in zip(self.stored, starts(self.stored, _ALIGNED), strict=True):
            kind = kinds[tensor.dtype]
            proto = self._proto(name=tensor.name, data_type=kind, dims=tensor.shape)
            proto.data_location = self._proto.EXTERNAL
            for key, value in (("location", DATA), ("offset", start), ("length", tensor.bytes)):
                proto.external_data.add(key=key, value=str(value))
            found.append(proto)
        return found

    def _value(self, name: str, integers: bool, sizes: Sequence[int | str | None]) -> Any:
        kind = self._proto.INT64 if integers else self._proto.FLOAT
        return self._make.make_tensor_value_info(name, kind, list(sizes))

    def ids(self, name: str, sizes: tuple[str, str]) -> Node:
        self._inputs.append(self._value(name, True, sizes))
        return name

    def cached(self, layer: int, kind: str, new: Node, heads: int, width: int) -> Node:
        past = f"past_key_values.{layer}.{kind}"
        self._inputs.append(self._value(past, False, ("batch", heads, "past", width)))
        together = self.concat([past, new], 2)
        self._output(f"present.{layer}.{kind}", together, ("batch", heads, "total", width))
        return together

    def logits(self, value: Node) -> None:
        self._output("logits", value, ("batch", "tokens", None))

    def _output(self, name: str, value: Node, sizes: Sequence[int | str | None]) -> None:
        self._nodes.append(self._make.make_node("Identity", [value], [name], name=name))
        self._outputs.append(self._value(name, False, sizes))

    def _widened(self, stored: Node, dtype: torch.dtype) -> Node:
        """Return float32 of what is stored; ONNX Runtime widens a constant once, as it loads."""
        return stored if dtype is torch.float32 else self._node("Cast", [stored], to=1)

    def rows(self, name: str, table: Tensor, ids: Node) -> Node:
        dtype = stored_dtype(table, self._source)
        stored = self._stored(f"{name}.weight", table.shape, dtype, lambda: table.to(dtype))
        self._tables[table.data_ptr()] = stored, dtype
        return self._widened(self._node("Gather", [stored, ids], axis=0), dtype)

    def dense(self, name: str, x: Node, weight: Tensor | FrozenLinear) -> Node:
        if isinstance(weight, Tensor) and weight.data_ptr() in self._tables:
            rows, columns = weight.shape
            flat = self.reshape(x, (-1, columns))
            table = self._widened(*self._tables[weight.data_ptr()])
            y = self._node("Gemm", [flat, table], transB=1)
            sizes = self.concat([self._part_of_sizes(x), self._whole(rows)], 0)
            return self._node("Reshape", [y, sizes])
        layer, dtype = weight, stored_dtype(weight, self._source)

        def make() -> Tensor:
            dense = layer if isinstance(layer, Tensor) else layer.dense_weight(dtype)
            return dense.to(dtype).T

        if isinstance(weight, Tensor):
            rows, columns = weight.shape
        else:
            rows, columns = weight.out_features, weight.in_features
        stored = self._stored(f"{name}.weight", (columns, rows), dtype, make)
        return self._node("MatMul", [x, self._widened(stored, dtype)])

    def _part_of_sizes(self, x: Node) -> Node:
        return self._node("Slice", [self._node("Shape", [x]), self._whole(0), self._whole(2)])

    def quantised(self, name: str, x: Node, layer: FrozenLinear) -> Node:
        weight_format = int_format(layer)
        bits = 4 if weight_format.bits == 3 else weight_format.bits
        size, rows, columns = weight_format.group_size, layer.out_features, layer.in_features
        groups = weight_format.groups(columns)

        blocks = (rows, groups, size * bits // 8)
        operands = [
            self._stored(
                f"{name}.codes",
                blocks,
                torch.uint8,
                lambda: side_by_side(layer, bits, groups * size),
            ),
            *(
                self._stored(
                    f"{name}.{part}",
                    (rows * groups,),
                    torch.float32,
                    lambda make=make: make(layer),  # type: ignore[misc]
                )
                for part, make in (("scales", scales), ("zero_points", zero_points))
            ),
        ]
        sizes = {"K": columns, "N": rows, "bits": bits, "block_size": size}
        return self._node("MatMulNBits", [x, *operands], "com.microsoft", **sizes)

    def add(self, a: Node, b: Node) -> Node:
        return self._node("Add", [a, b])

    def multiply(self, a: Node, b: Node) -> Node:
        return self._node("Mul", [a, b])

    def matmul(self, a: Node, b: Node, transposed: bool = False) -> Node:
        return self._node("MatMul", [a, self.transpose(b, (0, 1, 3, 2)) if transposed else b])

    def reciprocal_root(self, x: Node) -> Node:
        return self._node("Reciprocal", [self._node("Sqrt", [x])])

    def mean_square(self, x: Node) -> Node:
        return self._node("ReduceMean", [self._node("Mul", [x, x])], axes=[-1], keepdims=1)

    def unary(self, kind: str, x: Node) -> Node:
        return self._node(_UNARY[kind], [x])

    def softmax(self, x: Node) -> Node:
        return self._node("Softmax", [x], axis=-1)

    def reshape(self, x: Node, sizes: Sequence[Size]) -> Node:
        if all(isinstance(size, int) for size in sizes):
            return self._node("Reshape", [x, self._whole(*sizes)])
        parts = [self._whole(size) if isinstance(size, int) else size for size in sizes]
        return self._node("Reshape", [x, self.concat(parts, 0)])

    def transpose(self, x: Node, order: Sequence[int]) -> Node:
        return self._node("Transpose", [x], perm=list(order))

    def concat(self, parts: Sequence[Node], axis: int) -> Node:
        return self._node("Concat", parts, axis=axis)

    def part(self, x: Node, start: int, stop: int) -> Node:
        bounds = [self._whole(start), self._whole(stop), self._whole(-1)]
        return self._node("Slice", [x, *bounds])

    def size(self, x: Node, axis: int) -> Node:
        return self._node("Gather", [self._node("Shape", [x]), self._whole(axis)], axis=0)

    def visible(self, mask: Node, tokens: Node, total: Node, window: int | None) -> Node:
        zero, one = (self.constant("number", torch.tensor(number)) for number in (0, 1))
        count, end = (self._node("Squeeze", [size]) for size in (tokens, total))
        seen = self._node("Range", [zero, end, one])
        seeing = self._node("Range", [self._node("Sub", [end, count]), end, one])
        column = self.reshape(seeing, (-1, 1))
        before = self._node("LessOrEqual", [seen, column])
        if window is not None:
            start = self._node("Sub", [column, self.constant("window", torch.tensor(window))])
            before = self._node("And", [before, self._node("Greater", [seen, start])])
        present = self._node("Cast", [self.reshape(mask, (0, 1, 1, -1))], to=9)  # to bool
        allowed = self._node("And", [present, before])
        lowest = self.constant("lowest", torch.tensor(torch.finfo(torch.float32).min))
        return self._node("Where", [allowed, self.constant("zero", torch.tensor(0.0)), lowest])

    def as_float(self, ids: Node) -> Node:
        return self._node("Cast", [ids], to=1)
