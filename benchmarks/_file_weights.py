"""The weights of an exported file as the runtime's own reader gives them, by Transformers' names.

Each function returns float32 [out_features, in_features] of the linear layers and the embeddings.
Tests load this file too, so that there is one second opinion on what each format means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def read_weights(target: str, path: Path, config: Any) -> Weights:
    """Return the matrices in a file that was exported to `target`; config: the model's own."""
    readers: dict[str, Callable[[Path, Any], Iterator[tuple[str, Tensor]]]] = {
        "gguf": _gguf,
        "mlx": _mlx,
        "onnx": _onnx,
        "openvino": _openvino,
        "hf": _safetensors,
    }
    return dict(readers[target](path, config))


def largest_difference(ours: Weights, theirs: Weights) -> float:
    """Return the largest |difference| of any weight over the largest |weight| of its matrix.

    Raises KeyError where a matrix of ours is not among theirs.
    """
    shares = [
        float((weight.double() - theirs[name].double()).abs().max() / weight.abs().max())
        for name, weight in ours.items()
    ]
    return max(shares)


def _gguf(path: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    import gguf

    from graft.model.gguf.layout import gguf_names, rotary_heads, rows_from_gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    parts = ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"))
    gates = ("mlp", ("gate_proj", "up_proj", "down_proj"))
    names = ["model.embed_tokens", "lm_head"] + [
        f"model.layers.{layer}.{part}.{name}"
        for layer in range(config.num_hidden_layers)
        for part, inside in (parts, gates)
        for name in inside
    ]
    gguf_name = gguf_names(config)
    for name in names:
        tensor = tensors.get(f"{gguf_name(name)}.weight")
        if tensor is None:  # a head that is tied to the embeddings
            continue
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = rotary_heads(name, config)
        yield name, weight if heads is None else weight[rows_from_gguf(len(weight), heads)]


def _mlx(path: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    import json

    import mlx.core as mx

    settings = json.loads((path / "config.json").read_text())["quantization"]
    tensors = mx.load(str(path / "model.safetensors"))
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if part != "weight" or tensor.ndim != 2:
            continue
        if f"{name}.scales" in tensors:
            own = settings.get(name, settings)
            scales, biases = (tensors[f"{name}.{key}"] for key in ("scales", "biases"))
            tensor = mx.dequantize(
                tensor,
                scales.astype(mx.float32),
                biases.astype(mx.float32),
                group_size=own["group_size"],
                bits=own["bits"],
            )
        yield name, torch.from_numpy(np.array(tensor.astype(mx.float32)))


def _onnx(path: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    """MatMulNBits' operands by the operator's definition; MatMul's weights lie [in, out]."""
    import onnx

    graph = onnx.load(path / "model.onnx").graph  # with its data
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    stored: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in constants:  # of 16 bits
            constants[node.output[0]] = constants[node.input[0]].astype(np.float32)
            stored[node.output[0]] = node.input[0]
    for node in graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        name = stored.get(name, name).rpartition(".")[0]
        if node.op_type == "MatMulNBits":
            sizes = {one.name: one.i for one in node.attribute}
            packed, scales, zeros = (constants[key] for key in node.input[1:])
            yield name, _grouped(packed, scales, zeros, sizes["N"], sizes["K"], sizes["bits"])
        elif node.op_type == "MatMul" and node.input[1] in constants:
            yield name, torch.from_numpy(constants[node.input[1]].T.copy())
        elif node.op_type == "Gather" and node.input[0] == "model.embed_tokens.weight":
            table = constants[node.input[0]].astype(np.float32)
            yield "model.embed_tokens", torch.from_numpy(table)


def _openvino(path: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    import openvino

    model = openvino.Core().read_model(path / "openvino_model.xml")
    constants = {
        node.get_friendly_name(): node
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
    }
    for name, node in constants.items():
        kind, shape = node.get_element_type().get_type_name(), list(node.get_output_shape(0))
        if f"{name}.scales" in constants:
            packed = node.data.view(np.uint8)
            scales, zeros = (constants[f"{name}.{key}"].data for key in ("scales", "zero_points"))
            bits = {"u4": 4, "u8": 8}[kind]
            yield name, _grouped(packed, scales, zeros, shape[0], shape[1] * shape[2], bits)
        elif kind == "bf16" and len(shape) == 2:
            bits = torch.from_numpy(node.data.view(np.int16).copy())
            yield name, bits.view(torch.bfloat16).float().reshape(shape)
        elif kind in ("f16", "f32") and len(shape) == 2:
            yield name, torch.from_numpy(node.data.astype(np.float32))


def _grouped(packed: Any, scales: Any, zeros: Any, rows: int, columns: int, bits: int) -> Tensor:
    """Return w = (q - z) s from codes that lie one after another, the first lowest."""
    groups = np.asarray(scales).size // rows
    codes = torch.from_numpy(np.array(packed)).reshape(rows, groups, -1)
    codes = torch.stack([codes >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], -1)
    scale, zero = (
        torch.from_numpy(np.array(one)).reshape(rows, groups, 1) for one in (scales, zeros)
    )
    return ((codes.flatten(2).float() - zero) * scale).flatten(1)[:, :columns]


def _safetensors(path: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    for key, tensor in load_file(path / "model.safetensors").items():
        if tensor.dim() == 2:
            yield key.removesuffix(".weight"), tensor.float()
