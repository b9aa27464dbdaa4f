from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graft.api.checks import check_train_config, chosen_solver
from graft.api.config import TrainConfig
from graft.calibrate.config import SolverConfig
from graft.calibrate.gptq import gptq_pack
from graft.calibrate.hessian import HessianSum, output_error
from graft.errors import GraftError
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.formats.latent import LatentFormat
from graft.formats.registry import make_format
from graft.kernels.frozen import ops
from graft.kernels.packed.codebooks import codebook
from graft.kernels.packed.planes import unpack_codes

DAMPING = 0.01


def correlated_inputs(tokens: int, in_features: int) -> Tensor:
    """Inputs with a spectrum that falls off, as a language model's activations have."""
    spectrum = torch.arange(1, in_features + 1, dtype=torch.float32) ** -1.0
    return (torch.randn(tokens, in_features) * spectrum) @ torch.randn(in_features, in_features)


def hessian_of(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def damped(hessian: Tensor, damping: float) -> Tensor:
    return hessian.double() + damping * hessian.diagonal().mean() * torch.eye(len(hessian))


def column_by_column(weight: Tensor, hessian: Tensor, round_column) -> Tensor:
    """GPTQ without Cholesky factors or blocks: eliminate each column from the inverse Hessian."""
    remaining = weight.double().clone()
    inverse = torch.linalg.inv(hessian)
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    left = sorted(range(weight.shape[1]), key=lambda j: -hessian[j, j].item())
    while left:
        j = left.pop(0)
        codes[:, j], rounded = round_column(remaining[:, j], j)
        error = (remaining[:, j] - rounded) / inverse[j, j]
        for k in left:
            remaining[:, k] -= error * inverse[j, k]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def fit_one_group(w: Tensor, h: Tensor, bits: int) -> tuple[float, float]:
    """Scale and offset of one group of one row, alternating; both are fp16 at every step."""
    levels = 2**bits - 1

    def stored(value: float) -> float:
        return torch.tensor(value, dtype=torch.float64).half().item()

    def nearest(scale: float, offset: float) -> Tensor:
        return ((w - offset) / scale).round().clamp(0, levels)

    def error(scale: float, offset: float) -> float:
        return (h * (w - scale * nearest(scale, offset) - offset) ** 2).sum().item()

    offset = stored(w.min().item())
    scale = stored(max((w.max().item() - offset) / levels, 2.0**-20))
    for _ in range(10):
        q = nearest(scale, offset)
        columns = torch.stack([q, torch.ones_like(q)], dim=1) * h.sqrt()[:, None]
        if len(q.unique()) == 1:
            break
        slope = torch.linalg.lstsq(columns, (w * h.sqrt())[:, None]).solution[0].item()
        new_scale = stored(slope) if slope > 0 else scale
        new_offset = stored(((h * (w - new_scale * q)).sum() / h.sum()).item())
        if not error(new_scale, new_offset) < error(scale, offset):
            break
        scale, offset = new_scale, new_offset
    return scale, offset


def refit_one_row(w: Tensor, q: Tensor, hessian: Tensor, statistics: Tensor, group_size: int):
    """Least-squares scales and offsets [2, groups] of a row from its design matrix, written out."""
    groups = statistics.shape[1]
    design = torch.zeros(len(w), 2 * groups, dtype=torch.float64)
    for j in range(len(w)):
        design[j, j // group_size] = q[j]
        design[j, groups + j // group_size] = 1
    lost = w - design @ statistics.flatten()
    normal = design.T @ hessian @ design
    normal += 1e-6 * normal.diagonal().mean() * torch.eye(2 * groups)
    moved = statistics.flatten() + torch.linalg.solve(normal, design.T @ hessian @ lost)
    moved[:groups] = moved[:groups].clamp(min=2.0**-20)
    moved = moved.half().double()
    new_lost = w - design @ moved
    better = new_lost @ hessian @ new_lost < lost @ hessian @ lost
    return moved.view(2, groups) if better else statistics


@pytest.mark.parametrize("group_size", [8, 32])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_int_equals_a_plain_float64_loop(bits: int, group_size: int) -> None:
    rows, in_features = 5, 148  # two blocks of 128 columns; the last group has 4
    weight = torch.randn(rows, in_features)
    seen = hessian_of(correlated_inputs(400, in_features))
    hessian = damped(seen, DAMPING)
    groups = -(-in_features // group_size)
    grid = torch.zeros(rows, 2, groups, dtype=torch.float64)
    for row in range(rows):
        for group in range(groups):
            inside = slice(group * group_size, (group + 1) * group_size)
            fitted = fit_one_group(weight[row, inside].double(), hessian.diagonal()[inside], bits)
            grid[row, :, group] = torch.tensor(fitted, dtype=torch.float64)

    def round_column(values: Tensor, j: int) -> tuple[Tensor, Tensor]:
        scale, offset = grid[:, 0, j // group_size], grid[:, 1, j // group_size]
        q = ((values - offset) / scale).round().clamp(0, 2**bits - 1)
        return q.long(), q * scale + offset

    codes = column_by_column(weight, hessian, round_column)
    for row in range(rows):
        q, w = codes[row].double(), weight[row].double()
        grid[row] = refit_one_row(w, q, hessian, grid[row], group_size)
    packed = gptq_pack(weight, seen, IntGroupFormat(bits=bits, group_size=group_size), DAMPING)
    planes = tuple(packed[name] for name in ("codes", "codes_high") if name in packed)
    assert torch.equal(unpack_codes(planes, bits, in_features).long(), codes)
    assert torch.equal(packed["scales"].double(), grid[:, 0])
    assert torch.equal(packed["offsets"].double(), grid[:, 1])


def fit_one_block(w: Tensor, h: Tensor, values: Tensor) -> float:
    """Multiplier of one block, alternating; float32 at every step."""

    def nearest(scale: float) -> Tensor:
        return values[(w[:, None] - scale * values).abs().argmin(1)]

    def error(scale: float) -> float:
        return (h * (w - scale * nearest(scale)) ** 2).sum().item()

    scale = w.abs().max().item()
    for _ in range(10):
        c = nearest(scale)
        new = ((h * c * w).sum() / (h * c * c).sum()).float().item()
        if not error(new) < error(scale):
            break
        scale = new
    return scale


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_codebook_equals_a_plain_float64_loop(name: str, double_quant: bool) -> None:
    out_features, in_features = 9, 148  # blocks of 64 straddle rows; the count is even
    weight = torch.randn(out_features, in_features)
    seen = hessian_of(correlated_inputs(400, in_features))
    hessian = damped(seen, DAMPING)
    values = codebook(name).double()
    importance = hessian.diagonal().repeat(out_features)
    blocks = zip(weight.double().flatten().split(64), importance.split(64), strict=True)
    absmax = torch.tensor([fit_one_block(w, h, values) for w, h in blocks])
    weight_format = CodebookFormat(name=name, double_quant=double_quant)
    packed = gptq_pack(weight, seen, weight_format, DAMPING)
    if double_quant:
        offset = absmax.mean()
        nested, scale = ops.codebook_quantize_absmax(absmax, offset)
        assert torch.equal(packed["absmax"], nested)
        assert torch.equal(packed["absmax_scale"], scale)
        assert torch.equal(packed["absmax_offset"], offset.view(1))
    else:
        assert torch.equal(packed["absmax"], absmax)
    # With every code at the largest value, 1, the weight that unpacks is each element's absmax.
    top = int(values.argmax())
    ones = packed | {"codes": torch.full_like(packed["codes"], top * 17)}
    scales = weight_format.unpack(ones, out_features, in_features, torch.float32).double()

    def round_column(remaining: Tensor, j: int) -> tuple[Tensor, Tensor]:
        distance = (remaining[:, None] - values * scales[:, j, None]).abs()
        codes = distance.argmin(-1)
        return codes, values[codes] * scales[:, j]

    codes = column_by_column(weight, hessian, round_column).reshape(-1)
    found = torch.stack([packed["codes"] >> 4, packed["codes"] & 15], dim=1).reshape(-1).long()
    assert torch.equal(values[found], values[codes])  # fp4 has two codes for zero
    assert name == "fp4" or torch.equal(found, codes)


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
def test_without_correlation_no_weight_is_far_from_its_nearest_value(name, options) -> None:
    weight = torch.randn(16, 128)
    weight_format = make_format(name, options)
    packed = gptq_pack(weight, torch.eye(128), weight_format, DAMPING)
    nearest = weight_format.pack(weight)
    fitted, rtn = (weight_format.unpack(p, 16, 128, torch.float32) for p in (packed, nearest))
    assert bool(((fitted - weight).square().sum(1) <= (rtn - weight).square().sum(1)).all())


@pytest.mark.parametrize("damping", [0.0, DAMPING])
def test_dead_inputs_round_to_nearest_and_move_nothing(damping: float) -> None:
    weight_format = IntGroupFormat(bits=4, group_size=8)
    x = correlated_inputs(300, 40)
    dead = [0, 11, 12, 39]
    x[:, dead] = 0
    weight = torch.randn(6, 40)
    packed = gptq_pack(weight, hessian_of(x), weight_format, damping)
    dense = weight_format.unpack(packed, 6, 40, torch.float32)
    for j in dead:
        scale = packed["scales"][:, j // 8].float()
        assert bool(((dense[:, j] - weight[:, j]).abs() <= 0.75 * scale).all())
    nothing_seen = gptq_pack(weight, torch.zeros(40, 40), weight_format, damping)
    fitted, rtn = (
        weight_format.unpack(p, 6, 40, torch.float32)
        for p in (nothing_seen, weight_format.pack(weight))
    )
    assert bool(((fitted - weight).square().sum(1) <= (rtn - weight).square().sum(1)).all())


def test_inputs_are_left_alone_and_results_repeat() -> None:
    weight, hessian = torch.randn(8, 64), hessian_of(correlated_inputs(200, 64))
    kept = weight.clone(), hessian.clone()
    first, second = (gptq_pack(weight, hessian, IntGroupFormat(), DAMPING) for _ in range(2))
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("weight_format", [DenseFormat(), Int8Format()])
def test_a_format_without_a_grid_is_refused(weight_format) -> None:
    with pytest.raises(GraftError, match="need a format with a grid.*--solver rtn"):
        gptq_pack(torch.randn(4, 8), torch.eye(8), weight_format, DAMPING)


@pytest.mark.parametrize(("hessian", "damping"), [(torch.ones(8, 8), 0.0), (-torch.eye(8), 0.01)])
def test_a_hessian_that_is_not_positive_definite_is_refused(hessian, damping) -> None:
    with pytest.raises(GraftError, match="not positive definite.*--damping"):
        gptq_pack(torch.randn(4, 8), hessian, IntGroupFormat(), damping)


def test_a_hessian_with_nan_is_refused() -> None:
    with pytest.raises(GraftError, match="finite activations"):
        gptq_pack(torch.randn(4, 8), torch.full((8, 8), torch.nan), IntGroupFormat(), DAMPING)


def test_the_configuration_defaults_to_data_free_rounding_but_for_merge_aware() -> None:
    config = SolverConfig()
    assert (config.solver, config.calibration_rows, config.damping) == (None, 128, 0.01)
    assert chosen_solver(config) == chosen_solver(config, "qalora") == "rtn"
    assert chosen_solver(config, "merge_aware") == "qep"
    for method in ("qalora", "affine"):
        widths = (2, 3, 4, 8, "auto", None)
        chosen = [chosen_solver(config, method, bits) for bits in widths]
        assert chosen == ["gptq", "gptq", "rtn", "rtn", "rtn", "rtn"]
    assert chosen_solver(config, "qlora", 2) == "rtn"
    assert chosen_solver(SolverConfig(solver="hqq"), "merge_aware") == "hqq"


def test_merge_aware_refuses_a_solver_that_it_would_not_use() -> None:
    settings = {"model": "m", "data": "d", "out": "o", "method": "merge_aware", "solver": "hqq"}
    with pytest.raises(GraftError, match="rounds in mid-training.*--dense-fraction 0"):
        check_train_config(TrainConfig(**settings))
    check_train_config(TrainConfig(**settings, dense_fraction=0.0))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_latent_weight_rounds_to_the_codes_that_gptq_chose(bits: int, dtype: str) -> None:
    weight = torch.randn(16, 96)
    x = torch.randn(400, 96) @ torch.randn(96, 96)
    hessian = x.double().T @ x.double()
    latent = LatentFormat(IntGroupFormat(bits), dtype=dtype)
    packed = gptq_pack(weight, hessian, latent)
    integers = gptq_pack(weight, hessian, latent.deployed)
    rounded = latent.rounded(packed)
    for name, tensor in integers.items():
        assert torch.equal(rounded[name], tensor), name
    # Not the middle of each code's range: it says how near the other codes are.
    middle = latent.unpack(packed, 16, 96, torch.float32)
    kept = replace(latent, rounds=False).unpack(packed, 16, 96, torch.float32)
    assert (kept != middle).float().mean() > 0.9
