from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graft.calibrate.config import SolverConfig
from graft.calibrate.gptq import HessianSum, gptq_pack, output_error
from graft.errors import GraftError
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.formats.registry import make_format
from graft.kernels.codebooks import codebook
from graft.kernels.packing import unpack_codes

DAMPING = 0.01


def correlated_inputs(tokens: int, in_features: int) -> Tensor:
    """Inputs with a spectrum that falls off, as a language model's activations have."""
    spectrum = torch.arange(1, in_features + 1, dtype=torch.float32) ** -1.0
    return (torch.randn(tokens, in_features) * spectrum) @ torch.randn(in_features, in_features)


def hessian_of(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def column_by_column(weight: Tensor, hessian: Tensor, damping: float, round_column):
    """GPTQ without Cholesky factors or blocks: eliminate each column from the inverse Hessian."""
    remaining = weight.double().clone()
    columns = remaining.shape[1]
    damped = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(columns)
    inverse = torch.linalg.inv(damped)
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    for j in range(columns):
        codes[:, j], rounded = round_column(remaining, j)
        error = (remaining[:, j] - rounded) / inverse[j, j]
        remaining[:, j + 1 :] -= torch.outer(error, inverse[j, j + 1 :])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def int_rounding(bits: int, group_size: int, statistics: dict[str, list[Tensor]]):
    levels = 2**bits - 1

    def round_column(remaining: Tensor, j: int) -> tuple[Tensor, Tensor]:
        if j % group_size == 0:
            group = remaining[:, j : j + group_size]
            offset = group.amin(1).half()
            scale = ((group.amax(1) - offset.double()) / levels).clamp(min=2.0**-20).half()
            statistics["offsets"].append(offset)
            statistics["scales"].append(scale)
        offset, scale = statistics["offsets"][-1].double(), statistics["scales"][-1].double()
        codes = ((remaining[:, j] - offset) / scale).round().clamp(0, levels)
        return codes.long(), codes * scale + offset

    return round_column


@pytest.mark.parametrize("group_size", [8, 32])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_int_equals_a_plain_float64_loop(bits: int, group_size: int) -> None:
    in_features = 148  # two blocks of 128 columns; the last group has 4
    weight = torch.randn(24, in_features)
    hessian = hessian_of(correlated_inputs(400, in_features))
    statistics: dict[str, list[Tensor]] = {"scales": [], "offsets": []}
    rounding = int_rounding(bits, group_size, statistics)
    expected = column_by_column(weight, hessian, DAMPING, rounding)
    weight_format = IntGroupFormat(bits=bits, group_size=group_size)
    packed = gptq_pack(weight, hessian, weight_format, DAMPING)
    planes = tuple(packed[name] for name in ("codes", "codes_high") if name in packed)
    assert torch.equal(unpack_codes(planes, bits, in_features).long(), expected)
    for name, groups in statistics.items():
        assert torch.equal(packed[name], torch.stack(groups, dim=1))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_codebook_equals_a_plain_float64_loop(name: str, double_quant: bool) -> None:
    out_features, in_features = 9, 148  # blocks of 64 straddle rows; the count is even
    weight = torch.randn(out_features, in_features)
    hessian = hessian_of(correlated_inputs(400, in_features))
    weight_format = CodebookFormat(name=name, double_quant=double_quant)
    nearest = weight_format.pack(weight)
    values = codebook(name).double()
    top = int(values.argmax())
    # With every code at the largest value, 1, the weight that unpacks is each element's absmax.
    ones = nearest | {"codes": torch.full_like(nearest["codes"], top * 17)}
    absmax = weight_format.unpack(ones, out_features, in_features, torch.float32).double()

    def round_column(remaining: Tensor, j: int) -> tuple[Tensor, Tensor]:
        distance = (remaining[:, j, None] - values * absmax[:, j, None]).abs()
        codes = distance.argmin(-1)
        return codes, values[codes] * absmax[:, j]

    codes = column_by_column(weight, hessian, DAMPING, round_column).reshape(-1)
    packed = gptq_pack(weight, hessian, weight_format, DAMPING)
    found = torch.stack([packed["codes"] >> 4, packed["codes"] & 15], dim=1).reshape(-1).long()
    assert torch.equal(values[found], values[codes])  # fp4 has two codes for zero
    assert name == "fp4" or torch.equal(found, codes)
    for statistic in nearest.keys() - {"codes"}:
        assert torch.equal(packed[statistic], nearest[statistic])


FORMATS_WITH_A_GRID = [
    *(("int", {"bits": bits, "group_size": 32}) for bits in (2, 3, 4, 8)),
    *(
        (name, {"double_quant": double_quant})
        for name in ("nf4", "fp4")
        for double_quant in (False, True)
    ),
]


@pytest.mark.parametrize(("name", "options"), FORMATS_WITH_A_GRID)
def test_output_error_is_below_round_to_nearest(name: str, options: dict) -> None:
    weight_format = make_format(name, options)
    weight = torch.randn(64, 172)
    hessian = hessian_of(correlated_inputs(1000, 172))

    def error(packed: dict[str, Tensor]) -> float:
        return output_error(weight, weight_format.unpack(packed, 64, 172, torch.float32), hessian)

    gptq = error(gptq_pack(weight, hessian, weight_format, DAMPING))
    rtn = error(weight_format.pack(weight))
    assert gptq < rtn
    if options.get("bits") == 3:
        assert gptq < 0.5 * rtn


@pytest.mark.parametrize(("name", "options"), FORMATS_WITH_A_GRID)
def test_packed_tensors_are_those_of_the_format(name: str, options: dict) -> None:
    weight_format = make_format(name, options)
    weight = torch.randn(7, 45)  # an odd count: the last byte of a codebook holds one code
    packed = gptq_pack(weight.bfloat16(), hessian_of(torch.randn(99, 45)), weight_format, DAMPING)
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in packed.items()}
    assert found == {
        key: (spec.shape, spec.dtype) for key, spec in weight_format.storage(7, 45).items()
    }


def test_output_error_is_the_squared_error_of_the_outputs() -> None:
    x, weight, rounded = torch.randn(50, 12), torch.randn(5, 12), torch.randn(5, 12)
    outputs = x.double() @ (weight.double() - rounded.double()).T
    expected = sum(value**2 for value in outputs.flatten().tolist())
    assert output_error(weight, rounded, hessian_of(x)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hessian_sum_equals_a_float64_loop(dtype: torch.dtype) -> None:
    batches = [torch.randn(2, 7, 10).to(dtype), torch.randn(5, 10).to(dtype)]
    hessian = HessianSum(10)
    expected = torch.zeros(10, 10, dtype=torch.float64)
    for batch in batches:
        hessian.add(batch)
        for x in batch.reshape(-1, 10).double():
            expected += torch.outer(x, x)
    assert hessian.tokens == 19
    torch.testing.assert_close(hessian.value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), FORMATS_WITH_A_GRID)
def test_without_correlation_gptq_is_round_to_nearest(name: str, options: dict) -> None:
    # 128 columns: nf4's blocks don't straddle, so multiplying by 1/absmax or dividing agree.
    weight = torch.randn(16, 128)
    weight_format = make_format(name, options)
    packed = gptq_pack(weight, torch.eye(128), weight_format, DAMPING)
    nearest = weight_format.pack(weight)
    dense = [weight_format.unpack(p, 16, 128, torch.float32) for p in (packed, nearest)]
    if name == "int" or not options["double_quant"]:
        assert torch.equal(*dense)
    else:  # rounded against the absmax as it is stored, which can only be nearer
        assert (dense[0] - weight).abs().sum() <= (dense[1] - weight).abs().sum()


@pytest.mark.parametrize("damping", [0.0, DAMPING])
def test_dead_inputs_round_to_nearest_and_move_nothing(damping: float) -> None:
    weight_format = IntGroupFormat(bits=3, group_size=8)
    x = correlated_inputs(300, 40)
    dead = [0, 11, 12, 39]
    x[:, dead] = 0
    weight = torch.randn(6, 40)
    # A live column of the same group as a dead one keeps its group's range.
    packed = gptq_pack(weight, hessian_of(x), weight_format, damping)
    dense = weight_format.unpack(packed, 6, 40, torch.float32)
    for j in dead:
        scale = packed["scales"][:, j // 8].float()
        assert bool(((dense[:, j] - weight[:, j]).abs() <= 0.51 * scale).all())
    nothing_seen = gptq_pack(weight, torch.zeros(40, 40), weight_format, damping)
    for name, tensor in weight_format.pack(weight).items():
        assert torch.equal(nothing_seen[name], tensor)


def test_inputs_are_left_alone_and_results_repeat() -> None:
    weight, hessian = torch.randn(8, 64), hessian_of(correlated_inputs(200, 64))
    kept = weight.clone(), hessian.clone()
    first, second = (gptq_pack(weight, hessian, IntGroupFormat(), DAMPING) for _ in range(2))
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("weight_format", [DenseFormat(), Int8Format()])
def test_a_format_without_a_grid_is_refused(weight_format) -> None:
    with pytest.raises(GraftError, match="needs a format with a grid.*--solver rtn"):
        gptq_pack(torch.randn(4, 8), torch.eye(8), weight_format, DAMPING)


@pytest.mark.parametrize(("hessian", "damping"), [(torch.ones(8, 8), 0.0), (-torch.eye(8), 0.01)])
def test_a_hessian_that_is_not_positive_definite_is_refused(hessian, damping) -> None:
    with pytest.raises(GraftError, match="not positive definite.*--damping"):
        gptq_pack(torch.randn(4, 8), hessian, IntGroupFormat(), damping)


def test_a_hessian_with_nan_is_refused() -> None:
    with pytest.raises(GraftError, match="finite activations"):
        gptq_pack(torch.randn(4, 8), torch.full((8, 8), torch.nan), IntGroupFormat(), DAMPING)


def test_the_configuration_defaults_to_data_free_rounding() -> None:
    config = SolverConfig()
    assert (config.solver, config.calibration_rows, config.damping) == ("rtn", 128, 0.01)
