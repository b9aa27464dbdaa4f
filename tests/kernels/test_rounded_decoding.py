"""Inputs that are rounded to 8 bits, against the same sums in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from graft.formats.int_group import IntGroupFormat
from graft.kernels.backend import native_library
from graft.kernels.decoding.native import NativeDecoder, Next
from graft.kernels.decoding.weights import DecoderLayer, DecoderWeights, Projection
from graft.kernels.frozen.reference import dequantize
from graft.kernels.packed.weight import Layout, Weight, dense_weight

pytestmark = pytest.mark.skipif(
    native_library.why_unavailable() is not None,
    reason=f"native backend: {native_library.why_unavailable()}",
)

HIDDEN, ROWS, TOKENS = 200, 43, 7
FORMATS = {
    f"int{bits}/{group}/{statistics}": IntGroupFormat(
        bits=bits, group_size=group, statistics=statistics
    )
    for bits in (2, 3, 4, 8)
    for group, statistics in ((32, "float16"), (64, "float32"), (128, "float16"))
}


def head_alone(head: Weight, inputs: Tensor, rounding: int) -> DecoderWeights:
    """Return a decoder whose logits are the head's product with a token's row of inputs.

    The layer adds nothing, and a row of ones stays one when it is normalised: so the norm's weight
    is the input, and each token's signs.
    """
    nothing = Projection(dense_weight(torch.zeros(HIDDEN, HIDDEN)))
    layer = DecoderLayer(torch.ones(HIDDEN), torch.ones(HIDDEN), *[nothing] * 7)
    angles = torch.zeros(4, 20)
    return DecoderWeights(
        dtype=torch.float32,
        layers=(layer,),
        heads=HIDDEN // 20,
        key_value_heads=HIDDEN // 20,
        head_dim=20,
        epsilon=0.0,
        attention_scaling=1.0,
        embedding=dense_weight(inputs.sign()),
        norm=inputs[0].abs(),
        head=Projection(head),
        cosines=angles.cos(),
        sines=angles.sin(),
        rounding=rounding,
    )


def made(weight_format: IntGroupFormat) -> tuple[Weight, Tensor]:
    packed = weight_format.pack(torch.randn(ROWS, HIDDEN))
    signs = torch.randn(TOKENS, HIDDEN).sign()
    return weight_format.kernel_weight(packed, ROWS, HIDDEN), signs * torch.randn(HIDDEN).abs()


def logits(head: Weight, inputs: Tensor, rounding: int = 1) -> Tensor:
    decoder = NativeDecoder(head_alone(head, inputs, rounding), TOKENS)
    return decoder.next_logits([Next(token, 0, token) for token in range(TOKENS)])


def expected_logits(head: Weight, weight_format: IntGroupFormat, inputs: Tensor) -> Tensor:
    """Return the sum of d q . scale codes + offset t, in blocks as llama.cpp's Q8_1."""
    scales, offsets = (t.double() for t in head.statistics)
    columns = torch.arange(HIDDEN) // weight_format.group_size
    codes = ((dequantize(head, torch.float32) - offsets[:, columns]) / scales[:, columns]).round()
    blocks = torch.nn.functional.pad(inputs, (0, -HIDDEN % 32)).unflatten(1, (-1, 32))
    most = blocks.abs().amax(-1, keepdim=True)
    q = (blocks * (127 / most)).round()
    step = most / 127
    met = (q.double() * step.half().double()).flatten(1)[:, :HIDDEN]
    sums = (step * q.sum(-1, keepdim=True)).half().double().squeeze(-1)
    in_group = weight_format.group_size // 32
    sums = torch.nn.functional.pad(sums, (0, -sums.shape[-1] % in_group))
    sums = sums.unflatten(-1, (-1, in_group))
    return met @ (codes * scales[:, columns]).T + sums.sum(-1) @ offsets.T


@pytest.fixture
def every_level() -> Iterator[list[int]]:
    """The instruction sets of this processor, by number."""
    library = native_library.library()
    yield [level for level in range(4) if library.graft_limit(level) == level]
    library.graft_limit(3)


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_rounded_inputs_on_every_instruction_set(
    name: str, every_level: list[int]
) -> None:
    weight_format = FORMATS[name]
    head, inputs = made(weight_format)
    expected = expected_logits(head, weight_format, inputs)
    found = []
    for level in every_level:
        native_library.library().graft_limit(level)
        found.append(logits(head, inputs))
        exact = logits(head, inputs, rounding=0)
        assert 1e-4 < (found[-1] - exact).abs().max() / exact.abs().max() < 2e-2
        assert torch.equal(found[-1], found[0])
    assert (found[0] - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_a_token_with_one_scale_is_the_product_of_its_rounded_inputs(
    every_level: list[int],
) -> None:
    head, inputs = made(FORMATS["int4/32/float16"])
    most = inputs.abs().amax(-1, keepdim=True)
    met = ((inputs * (127 / most)).round() * (most / 127)).double()
    expected = met @ dequantize(head, torch.float32).double().T
    for level in every_level:
        native_library.library().graft_limit(level)
        found = logits(head, inputs, rounding=2)
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_other_weights_meet_their_inputs_as_they_are() -> None:
    inputs = torch.randn(TOKENS, HIDDEN).sign() * torch.randn(HIDDEN).abs()
    small = IntGroupFormat(bits=4, group_size=16)
    packed = small.pack(torch.randn(ROWS, HIDDEN))
    for head in (
        Weight(Layout("dense", ROWS, HIDDEN), (torch.randn(ROWS, HIDDEN),)),
        small.kernel_weight(packed, ROWS, HIDDEN),
    ):
        assert torch.equal(logits(head, inputs), logits(head, inputs, rounding=0))


def test_inputs_of_nothing_give_nothing() -> None:
    head, inputs = made(FORMATS["int4/32/float16"])
    nothing = dataclasses.replace(head_alone(head, inputs, 1), norm=torch.zeros(HIDDEN))
    assert not NativeDecoder(nothing, 1).next_logits([Next(0, 0, 0)]).any()
