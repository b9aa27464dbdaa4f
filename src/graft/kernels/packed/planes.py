"""Where each code of a group-wise integer weight lies in its bytes.

A row is cut into blocks of 32 codes; the last block is filled up with zero codes. Bits are kept
in planes, so that every width unpacks with the same few instructions:

- 8-bit plane: byte j of a block holds code j (32 bytes a block);
- 4-bit plane: byte j holds code j in its low and code j + 16 in its high nibble (16 bytes). This
  is GGUF's order: an AVX-512 load of 16 bytes gives two vectors of 16 codes with a mask and a
  shift, and an export copies the bytes as they are;
- 2-bit plane: byte j holds the codes j, j + 8, j + 16, j + 24, low bits first (8 bytes);
- 1-bit plane: bit j of the block's little-endian 32-bit word is code j (4 bytes): two AVX-512 mask
  registers, or one CUDA word.

3-bit codes are a 2-bit plane (low bits) and a 1-bit plane (high bit); all others are one plane.
Planes are a list, low bits first, or, where each has a place of its own, None for one that is not
there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 32
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Bits of each plane, low bits first, by width of the code."""


def plane_bytes(plane_bits: int, columns: int) -> int:
    """Return the bytes that one row of `columns` codes takes in a plane."""
    return -(-columns // BLOCK) * BLOCK * plane_bits // 8


def named_planes(planes: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return planes under the names of their packed tensors: codes, and for 3 bits codes_high."""
    return dict(zip(("codes", "codes_high"), planes, strict=False))


def empty_planes(like: Tensor, bits: int) -> list[Tensor]:
    """Return room, uninitialised, for the packed codes of a matrix."""
    rows, columns = like.shape
    return [
        like.new_empty((rows, plane_bytes(plane, columns)), dtype=torch.uint8)
        for plane in PLANES[bits]
    ]


def pack_codes(codes: Tensor, bits: int) -> list[Tensor]:
    """Pack codes uint8 [rows, columns] into planes, each uint8 [rows, bytes] and contiguous."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes.contiguous(), (0, -columns % BLOCK))
    blocks = padded.reshape(rows, -1, BLOCK)
    planes, shift = [], 0
    for plane_bits in PLANES[bits]:
        values = (blocks >> shift) & ((1 << plane_bits) - 1)
        planes.append(_pack_plane(values, plane_bits).reshape(rows, -1))
        shift += plane_bits
    return planes


def unpack_codes(planes: Sequence[Tensor], bits: int, columns: int) -> Tensor:
    """Unpack planes, each uint8 [rows, bytes], into codes uint8 [rows, columns]."""
    rows = planes[0].shape[0]
    codes, shift = None, 0
    for plane, plane_bits in zip(planes, PLANES[bits], strict=True):
        values = _unpack_plane(plane.reshape(rows, -1, BLOCK * plane_bits // 8), plane_bits)
        codes = values if codes is None else codes | (values << shift)
        shift += plane_bits
    assert codes is not None
    out: Tensor = codes.reshape(rows, -1)[:, :columns]
    return out


def _pack_plane(blocks: Tensor, plane_bits: int) -> Tensor:
    if plane_bits == 1:
        weights = 1 << torch.arange(8, dtype=torch.uint8, device=blocks.device)
        out: Tensor = (blocks.unflatten(-1, (4, 8)) * weights).sum(-1, dtype=torch.uint8)
        return out
    packed = torch.zeros_like(blocks[..., : BLOCK * plane_bits // 8])
    for index, part in enumerate(blocks.chunk(8 // plane_bits, dim=-1)):
        packed |= part << (index * plane_bits)
    return packed


def _unpack_plane(blocks: Tensor, plane_bits: int) -> Tensor:
    if plane_bits == 8:
        return blocks
    if plane_bits == 1:
        shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        return ((blocks.unsqueeze(-1) >> shifts) & 1).flatten(-2)
    mask = (1 << plane_bits) - 1
    return torch.cat(
        [(blocks >> shift) & mask for shift in range(0, 8, plane_bits)],
        dim=-1,
    )
