"""What holds for each format of the registry."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graft.errors import GraftError
from graft.formats.base import GridFormat, GridUpdate, TensorSpec, storage_bytes
from graft.formats.int_group import IntGroupFormat
from graft.formats.registry import FORMATS, describe_format, make_format, parse_format
from graft.kernels.frozen.ops import linear

SHAPES = [(1, 1), (7, 5), (33, 352), (16, 160), (12, 96), (64, 172), (8, 128), (3, 63)]


def specs(packed: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in packed.items()}


def half_step(weight_format, packed: dict[str, Tensor], weight: Tensor) -> Tensor:
    """The largest error that rounding to nearest may make at each element, float64."""
    values = weight.double()
    out_features, in_features = weight.shape
    if weight_format.name == "dense":
        return values.abs() * torch.finfo(weight_format.torch_dtype).eps
    if weight_format.name == "int8":
        return packed["scales"].double().unsqueeze(1).expand_as(values) / 2
    if weight_format.name == "latent":
        # The weight may have been rounded to bf16, or to 8 bits, before.
        bound = half_step(weight_format.deployed, packed, weight) + values.abs() * 2**-8
        if weight_format.dtype == "int8":
            kept = {"scales": packed["weight_scales"], "offsets": packed["weight_offsets"]}
            eight = IntGroupFormat(8, weight_format.group_size)
            bound += half_step(eight, kept, weight)
        return bound
    if weight_format.name == "int":
        group = torch.arange(in_features) // weight_format.group_size
        step = packed["scales"].double()[:, group]
        # Storing the statistics in fp16 moves the ends of the range: by half an ulp of the offset,
        # and by as many half ulps of the scale as there are steps; an ulp is at least 2**-24.
        levels = weight_format.levels
        ends = (packed["offsets"].double()[:, group].abs() + step * levels) * 2**-11
        return step / 2 + ends + (levels + 1) * 2**-25
    # The widest gap of the codebook, times the absmax; with double quantisation absmax itself is
    # off by up to half the widest gap of the dynamic code (its top values are 0.014 apart).
    gap = 0.31 if weight_format.name == "nf4" else 1 / 3
    flat = torch.nn.functional.pad(values.abs().flatten(), (0, -values.numel() % 64))
    absmax = flat.view(-1, 64).amax(1)
    lost = (absmax - absmax.mean()).abs().max() * 0.0071 if weight_format.double_quant else 0
    bound = (absmax * gap / 2 + lost).repeat_interleave(64)[: values.numel()]
    return bound.view_as(values) + 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_storage_says_what_pack_makes(weight_format, shape: tuple[int, int]) -> None:
    packed = weight_format.pack(torch.randn(shape))
    assert specs(packed) == weight_format.storage(*shape)
    size = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
    assert storage_bytes(weight_format, *shape) == size
    for name, spec in weight_format.storage(*shape).items():
        allocated = spec.empty("meta")
        assert (allocated.shape, allocated.dtype) == (packed[name].shape, packed[name].dtype)


@pytest.mark.parametrize("scale", [0.02, 1.0, 300.0])
def test_each_weight_is_within_half_a_step(weight_format, scale: float) -> None:
    for shape in SHAPES:
        weight = torch.randn(shape) * scale
        packed = weight_format.pack(weight)
        dense = weight_format.unpack(packed, *shape, torch.float32)
        error = (dense.double() - weight.double()).abs()
        bound = half_step(weight_format, packed, weight) * (1 + 1e-5)
        assert bool((error <= bound).all()), (shape, (error - bound).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_a_product_with_the_unpacked_weight(weight_format, shape) -> None:
    packed = weight_format.pack(torch.randn(shape))
    x = torch.randn(2, 3, shape[1])
    dense = weight_format.unpack(packed, *shape, torch.float32)
    expected = x.double() @ dense.double().T
    found = linear(x, weight_format.kernel_weight(packed, *shape))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_unpack_rounds_once_to_the_dtype_asked_for(weight_format) -> None:
    packed = weight_format.pack(torch.randn(9, 70))
    full = weight_format.unpack(packed, 9, 70, torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(weight_format.unpack(packed, 9, 70, dtype), full.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pack_reads_any_dtype_and_changes_nothing(weight_format, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 100).to(dtype)
    kept = weight.clone()
    packed = weight_format.pack(weight)
    assert torch.equal(weight, kept)
    same_values = weight_format.pack(weight.float())
    assert all(torch.equal(packed[name], same_values[name]) for name in packed)


def test_pack_is_deterministic_and_reads_any_strides(weight_format) -> None:
    weight = torch.randn(100, 6).T
    first, second = weight_format.pack(weight), weight_format.pack(weight.contiguous())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unpack_and_linear_change_no_packed_tensor(weight_format) -> None:
    packed = weight_format.pack(torch.randn(6, 100))
    kept = {name: tensor.clone() for name, tensor in packed.items()}
    weight_format.unpack(packed, 6, 100, torch.float32)
    x = torch.randn(3, 100, requires_grad=True)
    linear(x, weight_format.kernel_weight(packed, 6, 100)).sum().backward()
    assert all(torch.equal(packed[name], kept[name]) for name in kept)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 1e-30, 3e4])
def test_constant_weights_come_back(weight_format, value: float) -> None:
    weight = torch.full((5, 75), value)
    dense = weight_format.unpack(weight_format.pack(weight), 5, 75, torch.float32)
    assert bool(dense.isfinite().all())
    # bf16 keeps 8 bits of a value, fp16 statistics 11 bits and nothing below 3e-8.
    torch.testing.assert_close(dense, weight, rtol=2**-8, atol=1e-7)


def test_a_zero_row_or_block_among_others_stays_zero(weight_format) -> None:
    weight = torch.randn(4, 128)
    weight[2] = 0
    dense = weight_format.unpack(weight_format.pack(weight), 4, 128, torch.float32)
    # With double quantisation a block's absmax is itself rounded, but its codes stand for zero.
    assert bool((dense[2] == 0).all())


@settings(max_examples=20)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 200),
    exponent=st.integers(-12, 4),
    seed=st.integers(0, 2**31),
)
def test_any_size_and_magnitude(variant, rows, columns, exponent, seed) -> None:
    weight_format = make_format(*variant)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10.0**exponent
    packed = weight_format.pack(weight)
    dense = weight_format.unpack(packed, rows, columns, torch.float32)
    assert bool(dense.isfinite().all())
    error = (dense.double() - weight.double()).abs()
    assert bool((error <= half_step(weight_format, packed, weight) * (1 + 1e-5)).all())


def test_options_survive_json(weight_format, variant) -> None:
    description = json.loads(json.dumps(describe_format(weight_format)))
    assert parse_format(description) == weight_format
    assert description["format"] == variant[0] == weight_format.name
    assert description.items() >= variant[1].items()


def test_only_a_grid_absorbs_and_only_a_grid_is_solved_for(weight_format) -> None:
    shape = weight_format.storage(4, 64).get("offsets")
    move = None if shape is None else torch.zeros(shape.shape, dtype=torch.float64)
    absorbed = weight_format.absorb(weight_format.pack(torch.randn(4, 64)), GridUpdate(None, move))
    assert (absorbed is not None) == (weight_format.name in ("int", "latent"))
    solved = ("int", "latent", "nf4", "fp4")
    assert isinstance(weight_format, GridFormat) == (weight_format.name in solved)


def test_unknown_formats_and_options_are_told() -> None:
    with pytest.raises(GraftError, match="unknown weight format 'nf5'; did you mean 'nf4'"):
        make_format("nf5")
    for name in FORMATS:
        with pytest.raises(GraftError, match=f"weight format '{name}'.*nonsense"):
            make_format(name, {"nonsense": 1})
    with pytest.raises(GraftError, match="bits is 5; expected .*; group_size is 33"):
        make_format("int", {"bits": 5, "group_size": 33})
    with pytest.raises(GraftError, match="statistics is 'bfloat16'"):
        make_format("int", {"statistics": "bfloat16"})
    with pytest.raises(GraftError, match="dtype is 'float8'"):
        make_format("dense", {"dtype": "float8"})
    for value in (4.0, True, "4", None):
        with pytest.raises(GraftError, match=f"bits is {value!r}; expected int"):
            make_format("int", {"bits": value})
    with pytest.raises(GraftError, match="double_quant is 1; expected bool"):
        make_format("nf4", {"double_quant": 1})


def test_a_grid_inside_grids_without_end_is_refused() -> None:
    description: dict[str, object] = {"format": "nf4"}
    for _ in range(3000):
        description = {"format": "latent", "grid": description}
    with pytest.raises(GraftError, match="maximum recursion depth"):
        parse_format(description)
