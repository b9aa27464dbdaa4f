"""Folders of further tools, as they write them: plain loops from public descriptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foreign import WEIGHTS, Tensors, foreign_folder, linear_names, rounded
from safetensors.torch import load_file, save_file
from torch import Tensor

# FP8 ----------------------------------------------------------------------------------------------

DEEPSEEK = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [48, 40],
}


def blocks(rows, columns):
    """Return the row and the column of the block of each element."""
    return lambda shape: (
        torch.arange(shape[0])[:, None] // rows,
        torch.arange(shape[1])[None] // columns,
    )


def fp8_layer(block_of, scale_name, dtype=torch.float8_e4m3fn, grid=lambda scales: scales):
    """Quantise with a scale for each block, the last one short, as DeepSeek's kernel does."""

    def quantise(_, weight):
        row, column = block_of(weight.shape)
        scales = torch.zeros(int(row.max()) + 1, int(column.max()) + 1)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = weight[(row == i).squeeze(1)][:, (column == j).squeeze(0)]
                scales[i, j] = part.abs().max() / 448
        stored = (weight / scales[row, column]).to(dtype)
        return {"weight": stored, scale_name: grid(scales)}

    return quantise


# compressed-tensors -------------------------------------------------------------------------------


def compressed_settings(form, weights, **changes):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    } | changes


def packed_settings(bits, group_size=32, symmetric=True, **changes):
    strategy = "channel" if group_size == -1 else "group"
    size = None if group_size == -1 else group_size
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    return compressed_settings(
        "pack-quantized", weights | {"strategy": strategy, "group_size": size}, **changes
    )


def packed_words(codes, bits):
    """Return rows of codes as one stream of bits each, filled up to whole words."""
    single = np.asarray(codes)[..., None] >> np.arange(bits) & 1
    row = single.reshape(len(single), -1)
    filled = np.pad(row, ((0, 0), (0, -row.shape[1] % 32))).astype(np.uint8)
    return torch.from_numpy(np.packbits(filled, axis=1, bitorder="little").view(np.int32).copy())


def packed_layer(bits, group_size=32, symmetric=True, order=None, pack=packed_words):
    def quantise(_, weight):
        size = weight.shape[1] if group_size == -1 else group_size
        taken = weight if order is None else weight[:, order(weight.shape[1])]
        codes, scales, zeros = rounded(taken, bits, size, symmetric)
        parts = {}
        if order is not None:
            places = order(weight.shape[1])
            inverse = torch.argsort(places)
            codes = codes[:, inverse.numpy()]
            parts["weight_g_idx"] = (torch.arange(len(places)) // size)[inverse].int()
        if not symmetric:
            parts["weight_zero_point"] = pack(zeros.T, bits).T.contiguous()
        return parts | {
            "weight_packed": pack(codes, bits),
            "weight_scale": torch.from_numpy(scales).half(),
            "weight_shape": torch.tensor(weight.shape),
        }

    return quantise


# torchao ------------------------------------------------------------------------------------------

TORCHAO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}
TORCHAO_DTYPE = {"_type": "torch.dtype", "_data": "bfloat16"}


def torchao_intx(weight):
    groups = weight.unflatten(1, (-1, 32))
    low = groups.amin(-1).clamp(max=0)
    scale = ((groups.amax(-1).clamp(min=0) - low) / 15).half().float()
    zero = (-8 - low / scale).round()
    codes = (groups / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)
    codes = codes.clamp(-8, 7)
    attributes = {
        "target_dtype": {"_type": "torch.dtype", "_data": "int4"},
        "block_size": [1, 32],
        "dtype": TORCHAO_DTYPE,
        "activation_quantization": "int8_asym_per_token",
    }
    parts = {"qdata": codes.flatten(1).to(torch.int8), "scale": scale, "zero_point": zero.char()}
    meant = (codes - zero.unsqueeze(-1)).double() * scale.double().unsqueeze(-1)
    return "IntxUnpackedToInt8Tensor", attributes, parts, meant.flatten(1)


def torchao_folder(
    base: Path, folder: Path, quantise: Callable[[Tensor], Any], change: Callable[..., Any]
) -> tuple[Path, Tensors]:
    """Write the base flattened, as `quantise` says; return what each of its weights means."""
    foreign_folder(base, folder, TORCHAO, lambda _, weight: {}, names=[])
    tensors, weights = load_file(folder / WEIGHTS), {}
    metadata = {name: json.dumps({"_type": "Tensor"}) for name in tensors}
    for name in linear_names(tensors):
        kind, attributes, parts, weights[name] = quantise(tensors.pop(f"{name}.weight"))
        described = {"_type": kind, "_data": attributes, "_tensor_data_names": list(parts)}
        metadata[f"{name}.weight"] = json.dumps(described)
        tensors |= {f"{name}._weight_{part}": tensor for part, tensor in parts.items()}
    change(metadata, tensors)
    metadata["tensor_names"] = json.dumps([name for name in metadata if "." in name])
    save_file(tensors, folder / WEIGHTS, metadata=metadata | {"format": "pt"})
    return folder, weights


# HQQ ----------------------------------------------------------------------------------------------

HQQ = {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}
HQQ_PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}


def hqq_packed(codes, bits):
    """Lay parts of the rows over each other, the first one in the highest bits."""
    parts = 10 if bits == 3 else 8 // bits
    filled = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % parts)).int()
    rows = len(filled) // parts
    packed = torch.zeros(rows, codes.shape[1], dtype=torch.int32)
    for place in range(parts):
        packed |= filled[place * rows : (place + 1) * rows] << bits * (parts - 1 - place)
    return packed if bits == 3 else packed.byte()


def hqq_described(weight, bits, size=32, axis=1):
    """Return W_q and its description as Python has it, and what the weight means."""
    groups = weight.reshape(-1, size) if axis == 1 else weight.reshape(size, -1)
    low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).half().float()
    codes = (groups / scale + zero).round().clamp(0, 2**bits - 1)
    state = {
        "W_q": hqq_packed(codes, bits),
        "nbits": bits,
        "group_size": size,
        "shape": weight.shape,
        "scale": scale.half(),
        "zero": zero.half(),
        "axis": axis,
        "packing": HQQ_PACKINGS[bits],
        "unpack_view_dtype": torch.int32 if bits == 3 else torch.uint8,
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "compute_dtype": torch.float16,
        "offload_meta": False,
        "stores_quant_config": True,
        "channel_wise": True,
        "optimize": True,
        "round_zero": False,
    }
    return state, ((codes.double() - zero.double()) * scale.double()).reshape(weight.shape)


def hqq_encoded(value):
    """Return a value as a tensor, as hqq writes it to safetensors."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, torch.Size):
        return torch.tensor(value)
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    return torch.tensor([ord(letter) for letter in str(value)], dtype=torch.uint8)
