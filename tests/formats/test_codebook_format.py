from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graft.formats.base import storage_bytes
from graft.formats.codebook import CodebookFormat
from graft.formats.registry import make_format
from graft.kernels.packed.codebooks import codebook, dynamic_code


def plain_weight(packed: dict[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """Dequantise element by element in float64, as the format documents its tensors."""
    out = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
    values = codebook(name).double()
    for index in range(out.numel()):
        byte = int(packed["codes"][index // 2])
        code = byte >> 4 if index % 2 == 0 else byte & 15
        block = index // 64
        if packed["absmax"].dtype == torch.uint8:
            nested = dynamic_code().double()[int(packed["absmax"][block])]
            scale = packed["absmax_scale"].double()[block // 256]
            absmax = nested * scale + packed["absmax_offset"].double()[0]
        else:
            absmax = packed["absmax"].double()[block]
        out[index] = values[code] * absmax
    return out.view(shape)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(7, 5), (5, 96), (3, 160), (2, 352), (1, 1), (9, 64), (3, 43)])
def test_dequantised_equals_a_plain_float64_loop(shape, name: str, double_quant: bool) -> None:
    weight_format = make_format(name, {"double_quant": double_quant})
    packed = weight_format.pack(torch.randn(shape))
    dense = weight_format.unpack(packed, *shape, torch.float32)
    expected = plain_weight(packed, name, shape)
    torch.testing.assert_close(dense.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_are_the_nearest_value(name: str) -> None:
    weight = torch.randn(5, 100)
    weight_format = CodebookFormat(name=name)
    packed = weight_format.pack(weight)
    flat = weight.double().flatten()
    absmax = torch.cat([block.abs().max().view(1) for block in flat.split(64)])
    assert torch.equal(packed["absmax"].double(), absmax)
    candidates = codebook(name).double() * absmax.repeat_interleave(64)[:500, None]
    nearest = (candidates - flat[:, None]).abs().amin(1)
    dense = weight_format.unpack(packed, 5, 100, torch.float32).double().flatten()
    torch.testing.assert_close((dense - flat).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "bits"), [(4096, 4.127), (128, 4.129), (64, 4.141)])
def test_bits_per_weight_with_double_quantisation(size: int, bits: float) -> None:
    found = storage_bytes(CodebookFormat(double_quant=True), size, size) * 8 / size**2
    assert round(found, 3) == bits


def test_bits_per_weight_without() -> None:
    assert storage_bytes(CodebookFormat(), 4096, 4096) * 8 / 4096**2 == 4.5


def test_a_large_weight_is_quantised_in_pieces_with_the_same_result() -> None:
    weight = torch.randn(3, 1 << 20)  # more than one piece of 2**21 elements
    packed = CodebookFormat().pack(weight)
    for row in range(3):
        alone = CodebookFormat().pack(weight[row : row + 1])
        count = alone["codes"].numel()
        assert torch.equal(packed["codes"][row * count : (row + 1) * count], alone["codes"])
        blocks = alone["absmax"].numel()
        assert torch.equal(packed["absmax"][row * blocks : (row + 1) * blocks], alone["absmax"])


def test_double_quantised_absmax_is_near() -> None:
    weight = torch.randn(300, 640)  # 3,000 blocks: 12 nested blocks, the last one short
    plain = CodebookFormat().pack(weight)["absmax"]
    nested = CodebookFormat(double_quant=True).pack(weight)
    rebuilt = dynamic_code()[nested["absmax"].int()]
    rebuilt = rebuilt * nested["absmax_scale"].repeat_interleave(256)[:3000]
    rebuilt = rebuilt + nested["absmax_offset"]
    assert (rebuilt - plain).abs().max() <= 0.0072 * (plain - plain.mean()).abs().max()
    assert nested["absmax_offset"][0] == pytest.approx(plain.double().mean().item(), rel=1e-6)


def test_an_unknown_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match="codebook is 'af4'; expected one of nf4, fp4"):
        CodebookFormat(name="af4")
