"""The native CPU backend: C++ kernels (csrc/) behind ctypes, their threads and their weights.

The library is plain C (csrc/graft.h), and ctypes lets go of the interpreter while a kernel runs.
Its threads are those of the OpenMP runtime that PyTorch has loaded, so that the two do not fight
for the cores. Products are in bfloat16 (summed in float32) or in float32; other dtypes go to the
reference.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from collections.abc import Sequence
from functools import cache
from operator import is_
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.kernels.backend.registry import Backend, register_backend
from graft.kernels.packed.codebooks import codebook as codebook_values
from graft.kernels.packed.codebooks import dynamic_code
from graft.kernels.packed.weight import Weight

_KINDS = {"dense": 0, "codebook": 1, "int_group": 2, "int8": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
COMPUTE = (torch.float32, torch.bfloat16)
"""What the kernels multiply."""

_pointer, _int, _float, _double = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
)


class PackedWeight(ctypes.Structure):
    """graft_weight."""

    _fields_ = [
        *((name, _int) for name in ("kind", "rows", "cols", "dtype", "offsets_dtype")),
        *((name, _int) for name in ("bits", "group_size")),
        *((name, _pointer) for name in ("data", "codes_high", "scales", "offsets", "codebook")),
        *((name, _pointer) for name in ("nested", "nested_code", "nested_scale", "nested_offset")),
    ]


class LowRank(ctypes.Structure):
    """graft_low_rank."""

    _fields_ = [("rank", _int), ("scaling", _float), ("down", _pointer), ("up", _pointer)]


_ARGUMENTS = {
    "linear": (_pointer, _pointer, _int, _pointer, _int, _pointer, _pointer, _int),
    "rounded_inputs": (_int, _pointer, _int, _int, _int, _pointer, _int),
    "rounded_linear": (_pointer, _int, _pointer, _int, _int, _pointer, _int),
    "grad_input": (_pointer, _pointer, _int, _pointer, _int, _pointer, _pointer, _int),
    "token_product": (_int, _pointer, _int, _pointer, _int, _int, _pointer, _int),
    "grad_statistics": (_pointer, _int, _pointer, _pointer, *2 * [_int], *2 * [_pointer], _int),
    "pool": (_int, _pointer, _int, _int, _int, _pointer, _int),
    "move_offsets": (_int, _pointer, _pointer, _pointer, *3 * [_int], _double, _pointer, _int),
    "move_scaled": (_int, _pointer, _pointer, _pointer, _int, _pointer, _int),
    "latent_codes": (_pointer, _pointer, _pointer, _int),
    "latent_grads": (_pointer, *4 * [_pointer], _int),
    "dequantize": (_pointer, _int, _pointer, _int),
    "codebook_quantize": (_int, _pointer, _int, _int, *4 * [_pointer], _int),
    "absmax_quantize": (_pointer, _int, _float, _pointer, _pointer, _pointer, _int),
    "int_group_quantize": (_int, _pointer, *5 * [_int], _float, *4 * [_pointer], _int),
    "attention": (_int, _pointer, _int),
    "attention_backward": (_int, _pointer, _int),
    "rms_norm": (_int, _pointer, _pointer, _int, _int, _float, _pointer, _pointer, _int),
    "rms_norm_backward": (_int, *4 * [_pointer], _int, _int, _pointer, _int),
    "gate": (_int, _pointer, _pointer, _int, _pointer, _int),
    "gate_backward": (_int, *3 * [_pointer], _int, _pointer, _pointer, _int),
    "next_logits": (_pointer, _pointer, _int, _pointer, _int),
}


@cache
def _load() -> ctypes.CDLL | str:
    """Return the library with its threads set up, or why there is none."""
    # setup.py takes the last suffix, which names no version of Python.
    for suffix in reversed(importlib.machinery.EXTENSION_SUFFIXES):
        file = Path(__file__).with_name("_native" + suffix)
        if file.is_file():
            break
    else:
        return "it was not built: install a C++17 compiler and install graft again"
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        return f"it cannot be loaded: {error}"
    for name, types in _ARGUMENTS.items():
        getattr(library, f"graft_{name}").argtypes = types
    library.graft_instructions.restype = ctypes.c_char_p
    # PyTorch makes its OpenMP runtime's symbols global; GOMP_parallel runs a C function on a team.
    threads = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    library.graft_use_threads_of(ctypes.cast(threads, _pointer) if threads else None)
    return library


def library() -> ctypes.CDLL:
    """Return the library, which must be there."""
    loaded = _load()
    assert isinstance(loaded, ctypes.CDLL)
    return loaded


def why_unavailable() -> str | None:
    """Return why the library cannot be used, or None."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


native = register_backend(
    Backend(
        name="native",
        priority=10,
        device_types=frozenset({"cpu"}),
        why_unavailable=why_unavailable,
    )
)


def instructions() -> str | None:
    """Return the name of the instruction set in use, or None when there is no library."""
    loaded = _load()
    return None if isinstance(loaded, str) else loaded.graft_instructions().decode()


def call(name: str, *arguments: Any) -> None:
    """Call a kernel; the number of threads is PyTorch's."""
    status = getattr(library(), f"graft_{name}")(*arguments, torch.get_num_threads())
    if status != 0:
        raise MemoryError(f"graft's native kernel {name} found no memory for its workspace")


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor's numbers lie."""
    return None if tensor is None else tensor.data_ptr()


def plane_addresses(planes: Sequence[Tensor]) -> tuple[int | None, int | None]:
    """Return where the low and the high plane of codes lie; only 3-bit codes have a high one."""
    low, high, *_ = (*planes, None)
    return address(low), address(high)


class Prepared(NamedTuple):
    """A weight as the kernels take it."""

    struct: PackedWeight
    reference: Any
    """The struct's address, as an argument of a kernel."""
    alive: tuple[Tensor | None, ...]
    """What the struct points at."""
    state: list[tuple[int, torch.dtype, tuple[int, ...]] | None]
    """Where the tensors lay, of what dtype and in what order of memory."""


def prepared(weight: Weight) -> Prepared:
    """Return the C struct of a weight: the one it has, until a tensor of it lies elsewhere."""
    if not weight.lasts:
        return _prepare(weight, [])
    known: Prepared | None = weight.prepared
    state = [
        None if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.stride())
        for tensor in weight.tensors
    ]
    if known is None or known.state != state:
        weight.prepared = known = _prepare(weight, state)
    return known


def _prepare(weight: Weight, state: list[Any]) -> Prepared:
    tensors = tuple(None if t is None else t.contiguous() for t in weight.tensors)
    struct = _struct(weight, tensors)
    if not all(map(is_, tensors, weight.tensors)):
        state = []  # a copy does not follow what is written into its original
    return Prepared(struct, ctypes.byref(struct), tensors, state)


def _struct(weight: Weight, tensors: tuple[Tensor | None, ...]) -> PackedWeight:
    layout = weight.layout
    out = PackedWeight(_KINDS[layout.kind], layout.out_features, layout.in_features)
    out.bits, out.group_size, out.data = layout.bits, layout.group_size, address(tensors[0])
    if layout.kind == "dense":
        assert tensors[0] is not None
        out.dtype = DTYPES[tensors[0].dtype]
    elif layout.kind == "codebook":
        _, absmax, scale, offset = tensors
        out.codebook = address(codebook_values(layout.codebook))
        if scale is None:
            out.scales = address(absmax)
        else:
            out.nested, out.nested_code = address(absmax), address(dynamic_code())
            out.nested_scale, out.nested_offset = address(scale), address(offset)
    elif layout.kind == "int8":
        out.scales = address(tensors[1])
    else:
        _, codes_high, scales, offsets = tensors
        out.codes_high = address(codes_high)
        out.scales, out.offsets = address(scales), address(offsets)
        out.dtype = 0 if scales is None else DTYPES[scales.dtype]
        out.offsets_dtype = 0 if offsets is None else DTYPES[offsets.dtype]
    return out
