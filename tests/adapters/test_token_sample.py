"""The gradient of scales from some of the tokens: unbiased, drawn anew, the same however cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import graft
from graft.adapters.config import AdapterConfig
from graft.adapters.qalora import QALoraAdapter
from graft.adapters.token_sample import drawn, token_sample
from graft.api.events import Events
from graft.errors import GraftError
from graft.formats.int_group import IntGroupFormat
from graft.kernels.frozen.ops import int_group_grad_statistics
from graft.kernels.moves.sampled import sampled_grad_statistics
from graft.layers.frozen import FrozenLinear

OUT, IN, LENGTHS = 24, 96, (19, 7, 16)


def padded_inputs() -> tuple[Tensor, Tensor]:
    """Return (dy, x) of padded rows: padding has no gradient, and tokens differ in their size."""
    generator = torch.Generator().manual_seed(3)
    shape = len(LENGTHS), max(LENGTHS)
    x = torch.randn(*shape, IN, generator=generator) + torch.randn(IN, generator=generator)
    grad = torch.randn(*shape, OUT, generator=generator)
    grad *= torch.randn(*shape, 1, generator=generator).exp()
    for row, length in enumerate(LENGTHS):
        grad[row, length:] = 0
    return grad, x


def packed_inputs() -> tuple[Tensor, Tensor]:
    """Return the same rows one behind the other."""
    cut = zip(*padded_inputs(), LENGTHS, strict=True)
    rows = [(grad[:length], x[:length]) for grad, x, length in cut]
    grad, x = (torch.cat(parts)[None] for parts in zip(*rows, strict=True))
    return grad, x


def estimate(grad: Tensor, x: Tensor, weight, step: int, one_in: int = 4) -> tuple[Tensor, Tensor]:
    with drawn(5, step, 0, LENGTHS):
        return sampled_grad_statistics(grad, x, weight, *token_sample(x, one_in))


def int_weight(bits: int):
    weight_format = IntGroupFormat(bits, 32)
    packed = weight_format.pack(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)))
    return weight_format.kernel_weight(packed, OUT, IN)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_mean_over_steps_is_the_gradient_of_all_tokens(bits: int) -> None:
    weight, (grad, x) = int_weight(bits), padded_inputs()
    scales, offsets = int_group_grad_statistics(grad, x, weight, None)
    found = []
    for step in range(1, 301):
        some, all_offsets = estimate(grad, x, weight, step)
        torch.testing.assert_close(all_offsets, offsets, rtol=1e-4, atol=1e-3)
        found.append(some)
    estimates = torch.stack(found).double()
    error = (estimates.mean(0) - scales).norm()
    deviation = (estimates - scales).square().sum((1, 2)).mean().sqrt()
    assert 0.01 * scales.norm() < deviation < 0.5 * scales.norm()
    assert error < 2.5 * deviation / len(found) ** 0.5


def test_the_same_tokens_are_drawn_again_and_others_in_another_step() -> None:
    weight, (grad, x) = int_weight(4), padded_inputs()
    first, again, later = (estimate(grad, x, weight, step)[0] for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_packed_rows_and_rows_in_two_batches_give_the_same_sum() -> None:
    weight, (grad, x) = int_weight(4), padded_inputs()
    together, _ = estimate(grad, x, weight, 1)
    packed, _ = estimate(*packed_inputs(), weight, 1)
    apart = torch.zeros_like(together)
    for first, last in ((0, 2), (2, 3)):
        some_grad, some_x = grad[first:last], x[first:last]
        with drawn(5, 1, first, LENGTHS[first:last]):
            sample = token_sample(some_x, 4)
            apart += sampled_grad_statistics(some_grad, some_x, weight, *sample)[0]
    torch.testing.assert_close(packed, together, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-3)


def test_rows_without_any_gradient_give_none() -> None:
    grad, x = padded_inputs()
    scales, offsets = estimate(torch.zeros_like(grad), x, int_weight(4), 1)
    assert not scales.any() and not offsets.any()


def test_tokens_in_another_order_than_the_batch_s_are_one_row() -> None:
    x = torch.randn(11, IN)  # as an expert gets them
    with drawn(5, 1, 0, LENGTHS):
        means, points = token_sample(x, 4)
    assert means.shape == (11, 1) and points[:, :2].unique(dim=0).tolist() == [[0, 11]]


def test_all_tokens_are_taken_outside_a_step_and_where_one_in_one_is_asked() -> None:
    _, x = padded_inputs()
    assert token_sample(x, 4) == (None, None)
    with drawn(5, 1, 0, LENGTHS):
        assert token_sample(x, 1) == (None, None)
    assert token_sample(x, 4) == (None, None)


def test_the_layer_hands_out_the_estimate_and_the_exact_offsets() -> None:
    weight_format = IntGroupFormat(4, 32)
    base = FrozenLinear(IN, OUT, weight_format, weight_format.pack(torch.randn(OUT, IN)), None)
    config = AdapterConfig(method="qalora", rank=2, grid_rank=2, scale_sample=4)
    adapter = QALoraAdapter.from_layer(base, config)
    torch.nn.init.normal_(adapter.B), torch.nn.init.normal_(adapter.u_B)
    grad, x = padded_inputs()

    def gradients(sampled: bool) -> dict[str, Tensor]:
        adapter.zero_grad()
        if sampled:
            with drawn(5, 1, 0, LENGTHS):
                adapter.fused_output(x, base).backward(grad)
        else:
            adapter.fused_output(x, base).backward(grad)
        return {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}

    exact, some = gradients(False), gradients(True)
    for name in ("A", "B"):
        torch.testing.assert_close(some[name], exact[name], rtol=1e-3, atol=1e-3)
    for name in ("u_A", "u_B"):
        assert 1e-3 < (some[name] - exact[name]).norm() / exact[name].norm() < 1


@pytest.fixture(scope="module")
def settings(tiny_base: Path, rows: Path):
    def make(out: Path, **changes: object) -> graft.TrainConfig:
        common = {"steps": 5, "batch_size": 2, "rank": 2, "max_length": 48, "save_every": 3}
        common |= {"model": str(tiny_base), "data": str(rows), "out": str(out), "bits": 4}
        return graft.TrainConfig(**(common | {"scale_sample": 4} | changes))

    return make


class _StoppedError(Exception):
    pass


class _StopsAtStep4(Events):
    def metrics(self, metrics):
        if metrics["step"] == 4 and "loss" in metrics:
            raise _StoppedError


def adapter_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_resumed_run_draws_what_it_would_have_drawn(settings, tmp_path: Path) -> None:
    graft.finetune(settings(tmp_path / "whole"))
    graft.finetune(settings(tmp_path / "all", scale_sample=1))
    whole = adapter_of(tmp_path / "whole")
    assert any(not torch.equal(whole[key], t) for key, t in adapter_of(tmp_path / "all").items())

    with pytest.raises(_StoppedError):
        graft.finetune(settings(tmp_path / "cut"), _StopsAtStep4())
    graft.finetune(settings(tmp_path / "cut", resume=True))
    for key, tensor in adapter_of(tmp_path / "cut").items():
        assert torch.equal(tensor, whole[key]), key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale_sample": 0}, "--scale-sample is 0"),
        ({"cuda_graphs": True}, "--cuda-graphs"),
        ({"grid_rank": 0}, "--grid-rank 0 keeps them"),
    ],
)
def test_what_cannot_be_sampled_is_said(settings, tmp_path: Path, changes, words) -> None:
    with pytest.raises(GraftError, match=words):
        graft.finetune(settings(tmp_path / "run", **changes))
