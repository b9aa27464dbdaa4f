"""Folders as other tools write them, and what they mean: plain loops from public descriptions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
WEIGHTS = "model.safetensors"
SPECIAL = ("embed", "norm", "lm_head")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def linear_names(tensors: Tensors) -> list[str]:
    return [
        name.removesuffix(".weight")
        for name in tensors
        if name.endswith(".weight") and not any(word in name for word in SPECIAL)
    ]


def foreign_folder(
    base: Path,
    folder: Path,
    settings: dict[str, Any],
    quantise: Callable[[str, Tensor], Tensors],
    names: list[str] | None = None,
    key: str = "quantization_config",
) -> Path:
    """Copy the base with the named weights (default: of the linear layers) as `quantise` says."""
    shutil.copytree(base, folder)
    tensors = load_file(base / WEIGHTS)
    for name in linear_names(tensors) if names is None else names:
        for part, tensor in quantise(name, tensors.pop(f"{name}.weight")).items():
            tensors[f"{name}.{part}"] = tensor.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: settings}))
    return folder


def change_settings(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def rounded(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Any, ...]:
    """Return codes [out, in] and, by group, scales (fp16 numbers) and integer zero points."""
    w, top = weight.double().numpy(), 2**bits - 1
    rows, columns = w.shape
    groups = -(-columns // group_size)
    codes = np.zeros((rows, columns), int)
    scales, zeros = np.zeros((rows, groups)), np.zeros((rows, groups), int)
    for g in range(groups):
        part = w[:, g * group_size : (g + 1) * group_size]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scale = np.float16((high - low) / top).astype(float)
        zero = np.full(rows, 2 ** (bits - 1)) if symmetric else np.rint(-low / scale).astype(int)
        scales[:, g], zeros[:, g] = scale, zero
        steps = np.rint(part / scale[:, None]).astype(int) + zero[:, None]
        codes[:, g * group_size : (g + 1) * group_size] = steps.clip(0, top)
    return codes, scales, zeros


def stream(codes: Any, bits: int) -> Any:
    """Return each row's codes as one number, the first lowest, cut into 32-bit words."""
    words = []
    for row in codes:
        number = 0
        for place, code in enumerate(row):
            number |= int(code) << (bits * place)
        words.append(np.frombuffer(number.to_bytes(len(row) * bits // 8, "little"), np.uint32))
    return np.stack(words)


def codes_of(words: Any, bits: int, count: int) -> Iterator[list[int]]:
    for row in words.tolist():
        number = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
        yield [number >> (bits * place) & (2**bits - 1) for place in range(count)]


# GPTQ ---------------------------------------------------------------------------------------------


def words_minus_one(words: Any, bits: int) -> Any:
    """Take one from each code as GPTQModel does, from whole words: a zero borrows from the next."""
    codes = 32 * words.shape[1] // bits
    return words - stream(np.ones((len(words), codes), int), bits)


def gptq_layer(
    bits: int,
    group_size: int,
    symmetric: bool = False,
    minus_one: bool = True,
    by_words: bool = False,
) -> Callable[[str, Tensor], Tensors]:
    def quantise(_: str, weight: Tensor) -> Tensors:
        columns = weight.shape[1]
        size = columns if group_size == -1 else group_size
        codes, scales, zeros = rounded(weight, bits, size, symmetric)
        stored = stream(((zeros - (minus_one and not by_words)) % 2**bits).T, bits)
        if by_words:
            stored = words_minus_one(stored, bits)
        return {
            "qweight": torch.from_numpy(stream(codes, bits).view(np.int32)).T,
            "qzeros": torch.from_numpy(stored.view(np.int32)),
            "scales": torch.from_numpy(scales.T).half(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // size,
        }

    return quantise


def gptq_weight(tensors: Tensors, name: str, bits: int, minus_one: bool = True) -> Tensor:
    """Return w = scale (q - zero), float64 [out, in]."""
    qweight, qzeros, scales, g_idx = (
        tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    columns, rows = len(g_idx), qweight.shape[1]
    zeros = list(codes_of(qzeros, bits, rows))
    scale, group = scales.double().tolist(), g_idx.tolist()
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for out, codes in enumerate(codes_of(qweight.T, bits, columns)):
        for column, code in enumerate(codes):
            zero = (zeros[group[column]][out] + minus_one) % 2**bits
            weight[out, column] = scale[group[column]][out] * (code - zero)
    return weight


# AWQ ----------------------------------------------------------------------------------------------


def awq_words(codes: Any) -> Tensor:
    """Pack [rows, outputs] eight outputs to a word, in AWQ's order."""
    rows, outputs = codes.shape
    words = np.zeros((rows, outputs // 8), np.uint32)
    for row in range(rows):
        for word in range(outputs // 8):
            for place, output in enumerate(AWQ_ORDER):
                words[row, word] |= np.uint32(int(codes[row, word * 8 + output]) << (4 * place))
    return torch.from_numpy(words.view(np.int32))


def awq_layer(group_size: int) -> Callable[[str, Tensor], Tensors]:
    def quantise(_: str, weight: Tensor) -> Tensors:
        size = weight.shape[1] if group_size == -1 else group_size
        codes, scales, zeros = rounded(weight, 4, size, False)
        return {
            "qweight": awq_words(codes.T),
            "qzeros": awq_words(zeros.T),
            "scales": torch.from_numpy(scales.T).half(),
        }

    return quantise


def gemv_layer(group_size: int) -> Callable[[str, Tensor], Tensors]:
    """Return AWQ's version gemv: neighbouring inputs in a word, rows filled up with zeros."""

    def quantise(_: str, weight: Tensor) -> Tensors:
        codes, scales, zeros = rounded(weight, 4, group_size, False)
        rows, groups = scales.shape
        filled = -(-groups // 32) * 32  # a multiple of four words, as for groups of 32
        wide = np.zeros((2, rows, filled))
        wide[:, :, :groups] = scales, zeros
        return {
            "qweight": torch.from_numpy(stream(codes, 4).view(np.int32)),
            "qzeros": torch.from_numpy(stream(wide[1].astype(int), 4).view(np.int32)),
            "scales": torch.from_numpy(wide[0]).half(),
        }

    return quantise


def gemv_weight(tensors: Tensors, name: str, group_size: int) -> Tensor:
    """Return w = scale (q - zero), float64 [out, in]."""
    qweight, qzeros, scales = (
        tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")
    )
    columns, zeros = qweight.shape[1] * 8, list(codes_of(qzeros, 4, scales.shape[1]))
    weight = torch.zeros(len(qweight), columns, dtype=torch.float64)
    for out, codes in enumerate(codes_of(qweight, 4, columns)):
        for column, code in enumerate(codes):
            group = column // group_size
            weight[out, column] = float(scales[out, group]) * (code - zeros[out][group])
    return weight


def awq_weight(tensors: Tensors, name: str) -> Tensor:
    """Return w = scale (q - zero), float64 [out, in]."""
    qweight, qzeros, scales = (
        tensors[f"{name}.{part}"].tolist() for part in ("qweight", "qzeros", "scales")
    )
    columns, rows, groups = len(qweight), len(scales[0]), len(scales)
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for column in range(columns):
        group = column * groups // columns
        for out in range(rows):
            shift = 4 * AWQ_ORDER.index(out % 8)
            code = qweight[column][out // 8] >> shift & 15
            zero = qzeros[group][out // 8] >> shift & 15
            weight[out, column] = scales[group][out] * (code - zero)
    return weight


# MLX ----------------------------------------------------------------------------------------------


def mlx_layer(bits: int, group_size: int, dtype: torch.dtype) -> Callable[[str, Tensor], Tensors]:
    def quantise(_: str, weight: Tensor) -> Tensors:
        codes, scales, zeros = rounded(weight, bits, group_size, False)
        scale = torch.from_numpy(scales).to(dtype)
        return {
            "weight": torch.from_numpy(stream(codes, bits)),
            "scales": scale,
            "biases": (-scale.double() * torch.from_numpy(zeros) + 1e-3).to(dtype),
        }

    return quantise


def mlx_weight(tensors: Tensors, name: str, bits: int) -> Tensor:
    """Return w = scale q + bias, float64 [out, in]."""
    scales, biases = (tensors[f"{name}.{part}"].double() for part in ("scales", "biases"))
    words, groups = tensors[f"{name}.weight"], scales.shape[1]
    columns = words.shape[1] * 32 // bits
    rows = torch.tensor(list(codes_of(words.view(torch.int32), bits, columns)))
    group = torch.arange(columns) * groups // columns
    return scales[:, group] * rows + biases[:, group]


# bitsandbytes -------------------------------------------------------------------------------------

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def nf4_blocks(size: int) -> Callable[[str, Tensor], Tensors]:
    def quantise(_: str, weight: Tensor) -> Tensors:
        values = torch.tensor(NF4)
        blocks = weight.float().reshape(-1, size)
        absmax = blocks.abs().amax(1)
        codes = (blocks / absmax[:, None]).unsqueeze(-1).sub(values).abs().argmin(-1).reshape(-1, 2)
        state = {"quant_type": "nf4", "blocksize": size, "dtype": "float32"}
        state |= {"shape": list(weight.shape)}
        return {
            "weight": (codes[:, :1] << 4 | codes[:, 1:]).byte(),
            "weight.absmax": absmax,
            "weight.quant_map": values,
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(
                list(json.dumps(state).encode())
            ).byte(),
        }

    return quantise


nf4_layer = nf4_blocks(64)


def nf4_weight(tensors: Tensors, name: str, shape: tuple[int, int], size: int = 64) -> Tensor:
    """Return w = value[code] absmax, float64."""
    absmax = tensors[f"{name}.weight.absmax"].double().tolist()
    values = []
    for byte in tensors[f"{name}.weight"].reshape(-1).tolist():
        for code in (byte >> 4, byte & 15):
            values.append(NF4[code] * absmax[len(values) // size])
    return torch.tensor(values, dtype=torch.float64).reshape(shape)
