from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graft.convert.labels.zero_points import (
    LayerSample,
    Version,
    Way,
    find_version,
    find_way,
    group_sample,
    read_zeros,
)

WAYS: tuple[Way, ...] = ("v1", "words", "v2")
VERSIONS: dict[Way, Version] = {"v1": "v1", "words": "v1", "v2": "v2", "turned": "v1"}


def packed(codes: Tensor, bits: int) -> Tensor:
    """Return rows of codes as one stream of bits each, in 32-bit words."""
    each = np.unpackbits(codes.byte().numpy()[..., None], axis=-1, bitorder="little")
    stream = np.packbits(each[..., :bits].reshape(len(codes), -1), axis=-1, bitorder="little")
    return torch.from_numpy(stream.view(np.int32).copy())


def stored(zeros: Tensor, bits: int, way: Way) -> Tensor:
    """Return zero points [groups, outputs] as they are stored, minus one in one of two ways."""
    if way == "v2":
        return packed(zeros, bits)
    if way == "v1":
        return packed((zeros - 1) % 2**bits, bits)
    ones = packed(torch.ones_like(zeros), bits).numpy().view(np.uint32)
    if way == "turned":
        ones = ones.reshape(len(ones), -1, 3)[..., ::-1].reshape(ones.shape)
    return torch.from_numpy((packed(zeros, bits).numpy().view(np.uint32) - ones).view(np.int32))


def sample(weight: Tensor, bits: int, size: int, symmetric: bool, way: Way) -> LayerSample:
    """Round a weight [outputs, inputs] to the nearest codes between each group's extremes."""
    inputs = weight.shape[1]
    size = inputs if size == -1 else size
    parts = weight.unflatten(1, (-1, size))
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    zeros = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
    codes = (parts / scale.unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    codes = codes.clamp(0, 2**bits - 1).flatten(1)
    words = stored(zeros.T.contiguous(), bits, way)
    return group_sample(bits, words, codes.T.byte(), torch.arange(inputs) // size)


def gaussian(generator: torch.Generator) -> Tensor:
    return torch.randn(64, 128, generator=generator)


def heavy_tailed(generator: torch.Generator) -> Tensor:
    """Student's t of three degrees of freedom: outliers of ten and more standard deviations."""
    chi = torch.randn(3, 64, 128, generator=generator).square().sum(0) / 3
    return torch.randn(64, 128, generator=generator) / chi.sqrt()


def off_centre(generator: torch.Generator) -> Tensor:
    """Rows and a whole layer off zero by as much as trained weights are, and a little more."""
    rows, layer = torch.randn(64, 1, generator=generator), torch.randn(1, generator=generator)
    return torch.randn(64, 128, generator=generator) + 0.03 * rows + 0.01 * layer


@pytest.mark.parametrize("weights", [gaussian, heavy_tailed, off_centre])
def test_no_model_is_taken_for_the_other_version(weights):
    """216 models of up to six small layers; one alone, or few at 8 bits, may not show it."""
    generator = torch.Generator().manual_seed(7)
    for bits, size, symmetric, way, count in product(
        (2, 3, 4, 8), (32, 128, -1), (False, True), WAYS, (1, 2, 6)
    ):
        layers = [sample(weights(generator), bits, size, symmetric, way) for _ in range(count)]
        found = find_version(layers)
        sure = symmetric or (bits < 8 and count > 1)
        expected = (VERSIONS[way],) if sure else (VERSIONS[way], None)
        assert found.version in expected, (bits, size, symmetric, way, count, found)


@pytest.mark.parametrize("name", ["babyllama-361-1m", "stories260k"])
def test_trained_weights_show_their_version(name, shared_models):
    tensors = load_file(shared_models / name / "model.safetensors")
    weights = [
        weight.float()
        for key, weight in tensors.items()
        if key.endswith("proj.weight") and weight.shape[0] % 32 == weight.shape[1] % 32 == 0
    ]
    assert len(weights) > 10
    for bits, symmetric, way in product((2, 3, 4, 8), (False, True), WAYS):
        layers = [sample(weight, bits, 32, symmetric, way) for weight in weights]
        shown = [VERSIONS[way]] if bits < 8 or symmetric else [VERSIONS[way], None]
        assert find_version(layers).version in shown
        if bits < 8:  # each by itself, too
            found = {find_version([layer]).version for layer in layers}
            assert found in ({VERSIONS[way]}, {VERSIONS[way], None})


def test_8_bits_show_it_in_many_layers_together():
    generator = torch.Generator().manual_seed(3)
    for way in WAYS:
        weights = [torch.randn(128, 512, generator=generator) for _ in range(60)]
        layers = [sample(weight, 8, 128, False, way) for weight in weights]
        assert find_version(layers).version == VERSIONS[way]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("way", ["v1", "words"])
def test_who_took_one_away_shows_in_the_neighbours_of_zero(bits, way):
    """Groups of weights that are all positive have a zero point of 0."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(96, 64, generator=generator)
    weight[::5, :32] = weight[::5, :32].abs()
    layer = sample(weight, bits, 32, False, way)
    assert not torch.equal(layer.zeros("v1"), layer.zeros("words"))
    if bits < 8:
        assert find_way([layer] * 2, "v1" if way == "words" else "words") == way
    assert find_version([layer] * 2).version in (("v1",) if bits < 8 else ("v1", None))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("way", WAYS)
def test_zero_points_come_back_as_they_were_stored(bits, way):
    zeros = torch.randint(2**bits, (3, 64), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(read_zeros(stored(zeros, bits, way), bits, way).long(), zeros)


@pytest.mark.parametrize("symmetric", [False, True])
def test_words_of_3_bits_may_be_taken_in_another_order(symmetric):
    generator = torch.Generator().manual_seed(13)
    layers = [sample(gaussian(generator), 3, 32, symmetric, "turned") for _ in range(2)]
    assert find_way(layers, "v1") == "turned"
    assert find_version(layers).version == ("v1" if symmetric else None)
    straight = [sample(gaussian(generator), 3, 32, symmetric, "v1") for _ in range(2)]
    assert find_way(straight, "words") == "v1"


def test_codes_that_lie_nowhere_near_show_nothing():
    codes = torch.full((64, 64), 15, dtype=torch.uint8)
    words = stored(torch.full((2, 64), 3), 4, "v2")
    assert find_version([group_sample(4, words, codes, torch.arange(64) // 32)]).version is None
    assert find_version([]).version is None


def test_two_signs_that_contradict_each_other_show_nothing():
    """A symmetric quantiser of another kind, whose zero point is one less than half: 7."""
    generator = torch.Generator().manual_seed(5)
    codes = (torch.randn(64, 64, generator=generator) * 2 + 7).round().clamp(0, 15).byte()
    words = stored(torch.full((2, 64), 7), 4, "v2")
    layer = group_sample(4, words, codes, torch.arange(64) // 32)
    assert find_version([layer] * 8).version is None
