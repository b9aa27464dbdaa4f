"""Merge-aware training: what starts where, what is merged, and what two of them may not do."""

from __future__ import annotations

import pytest
import torch

from graft.adapters.adapted import AdaptedLinear
from graft.adapters.merge import merge
from graft.adapters.merge_aware import MergeAwareAdapter
from graft.adapters.qalora import QALoraAdapter
from graft.errors import GraftError
from graft.formats.int_group import IntGroupFormat
from graft.formats.latent import LatentFormat
from graft.layers.frozen import FrozenLinear


def merge_aware_layer(frozen, randomise, bits: int = 3, group_size: int = 8):
    base = frozen(LatentFormat(IntGroupFormat(bits, group_size)))
    adapter = randomise(MergeAwareAdapter(44, 6, -(-44 // group_size), 3, 5.0, grid_rank=2))
    layer = AdaptedLinear(base)
    layer.add("default", adapter)
    return base, adapter, layer


def test_a_fresh_adapter_computes_with_the_rounded_base(frozen) -> None:
    base, adapter, layer = merge_aware_layer(frozen, lambda adapter: adapter)
    x = torch.randn(3, 44)
    assert torch.equal(layer(x), base(x))
    assert not adapter.delta(base).any()
    assert not torch.equal(base.dense_weight(), base.weight.float())
    zeros = {name for name, parameter in adapter.named_parameters() if not parameter.any()}
    assert zeros == {"B", "u_B", "v_B"}


def test_the_grid_has_no_more_rank_than_groups() -> None:
    wide, narrow = (MergeAwareAdapter(64, 6, groups, 3, grid_rank=2) for groups in (8, 1))
    assert (wide.u_A.shape, wide.v_B.shape) == ((2, 8), (6, 2))
    assert (narrow.u_A.shape, narrow.v_B.shape) == ((1, 1), (6, 1))
    assert {name for name, _ in MergeAwareAdapter(64, 6, 8, 3).named_parameters()} == {"A", "B"}


def test_a_grid_that_stays_keeps_the_bases_statistics(frozen, randomise) -> None:
    base = frozen(LatentFormat(IntGroupFormat(3, 8)))
    layer = AdaptedLinear(base)
    layer.add("default", randomise(MergeAwareAdapter(44, 6, 6, rank=3)))
    x = torch.randn(5, 44)
    merged = merge(layer).layer
    assert torch.equal(merged(x), layer(x))
    assert torch.equal(merged.packed["scales"], base.packed["scales"])
    assert not torch.equal(merged(x), base(x))


@pytest.mark.parametrize(("bits", "group_size"), [(2, 8), (3, 16), (4, 32), (8, 32)])
def test_the_merge_keeps_new_codes_exactly(bits, group_size, frozen, randomise) -> None:
    base, adapter, layer = merge_aware_layer(frozen, randomise, bits, group_size)
    x = torch.randn(5, 44)
    y = layer(x)
    result = merge(layer)
    assert result.error.exact
    assert result.layer.weight_format == IntGroupFormat(bits, group_size)
    assert torch.equal(result.layer(x), y)
    before = base.weight_format.rounded(base.packed)
    assert not torch.equal(result.layer.packed["codes"], before["codes"])
    assert torch.equal(layer.effective_weight(), result.layer.dense_weight().double())
    moved = base.dense_weight().double() + adapter.delta(base)
    torch.testing.assert_close(moved, layer.effective_weight())


def test_a_small_update_flips_only_the_codes_that_are_near_a_boundary(frozen) -> None:
    base, adapter, layer = merge_aware_layer(frozen, lambda adapter: adapter, 4, 8)
    adapter.B.data.normal_(std=0.02)
    codes = layer.effective_packed()["codes"]
    flipped = (codes != base.weight_format.rounded(base.packed)["codes"]).float().mean()
    assert 0 < flipped < 0.3


def test_eight_bits_before_the_rounding_are_not_copied() -> None:
    latent = LatentFormat(rounds=False, dtype="int8")
    base = FrozenLinear(64, 6, latent, latent.pack(torch.randn(6, 64)))
    weight = base.kernel_weight().tensors[0]
    assert weight.data_ptr() == base.packed["weight"].data_ptr()
    x = torch.randn(3, 64)
    torch.testing.assert_close(base(x), x @ base.dense_weight(torch.float32).T)


def test_only_one_of_them_may_round_the_weight(frozen, randomise) -> None:
    _, adapter, layer = merge_aware_layer(frozen, randomise)
    layer.add("grid", randomise(QALoraAdapter(44, 6, 8, rank=2)))
    assert torch.equal(merge(layer).layer(torch.eye(44)), layer(torch.eye(44)))
    layer.active = ("default",)
    layer.add("second", randomise(MergeAwareAdapter(44, 6, 6, rank=3)))
    with pytest.raises(GraftError, match="cannot be active at once; merge one"):
        layer(torch.randn(2, 44))
