from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.kernels.packed.planes import PLANES, pack_codes, plane_bytes, unpack_codes

COLUMNS = [1, 5, 31, 32, 33, 64, 96, 172, 352]


def plain_planes(row: list[int], bits: int) -> list[list[int]]:
    """The documented layout, written out: one list of bytes for each plane of a row."""
    row = row + [0] * (-len(row) % 32)
    planes: list[list[int]] = []
    widths = {2: [2], 3: [2, 1], 4: [4], 8: [8]}[bits]
    for index, width in enumerate(widths):
        out: list[int] = []
        for start in range(0, len(row), 32):
            block = [(code >> sum(widths[:index])) % 2**width for code in row[start : start + 32]]
            if width == 8:
                out += block
            elif width == 4:
                out += [block[j] + 16 * block[j + 16] for j in range(16)]
            elif width == 2:
                out += [
                    block[j] + 4 * block[j + 8] + 16 * block[j + 16] + 64 * block[j + 24]
                    for j in range(8)
                ]
            else:
                word = sum(bit << j for j, bit in enumerate(block))
                out += list(word.to_bytes(4, "little"))
        planes.append(out)
    return planes


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", sorted(PLANES))
def test_every_code_lies_where_the_layout_says(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (3, columns), dtype=torch.uint8)
    planes = pack_codes(codes, bits)
    for row in range(3):
        expected = plain_planes(codes[row].tolist(), bits)
        assert [plane[row].tolist() for plane in planes] == expected
    widths = [plane_bytes(width, columns) for width in PLANES[bits]]
    assert [plane.shape[1] for plane in planes] == widths
    assert torch.equal(unpack_codes(planes, bits, columns), codes)


@settings(max_examples=60)
@given(
    bits=st.sampled_from(sorted(PLANES)),
    rows=st.integers(1, 5),
    columns=st.integers(1, 140),
    seed=st.integers(0, 2**31),
)
def test_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    kept = codes.clone()
    planes = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(planes, bits, columns), codes)
    assert torch.equal(codes, kept)
    assert all(plane.dtype == torch.uint8 and plane.is_contiguous() for plane in planes)


def test_non_contiguous_codes() -> None:
    codes = torch.randint(0, 8, (70, 4), dtype=torch.uint8).T
    assert torch.equal(unpack_codes(pack_codes(codes, 3), 3, 70), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_planes_lie_row_by_row_however_the_codes_lay(bits: int) -> None:
    codes = torch.randint(1 << bits, (5, 64), dtype=torch.uint8)  # no padding, which copies
    strided = codes.T.contiguous().T
    for plane, expected in zip(pack_codes(strided, bits), pack_codes(codes, bits), strict=True):
        assert plane.is_contiguous() and torch.equal(plane, expected)
