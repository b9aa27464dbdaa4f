"""A whole decoder in native calls against the same decoder in float64, on every instruction set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle

import pytest
import torch
from torch import Tensor

from graft.formats.base import WeightFormat
from graft.formats.codebook import CodebookFormat
from graft.formats.dense import DenseFormat
from graft.formats.int8 import Int8Format
from graft.formats.int_group import IntGroupFormat
from graft.kernels.backend import native_library
from graft.kernels.decoding.native import NativeDecoder, Next
from graft.kernels.decoding.weights import DecoderLayer, DecoderWeights, Projection
from graft.kernels.packed.weight import Layout, Weight

pytestmark = pytest.mark.skipif(
    native_library.why_unavailable() is not None,
    reason=f"native backend: {native_library.why_unavailable()}",
)

INT4: list[WeightFormat] = [IntGroupFormat(bits=4, group_size=size) for size in (32, 64, 128)]
MIXED: list[WeightFormat] = [
    *INT4,
    IntGroupFormat(bits=4, group_size=64, statistics="float32"),
    IntGroupFormat(bits=2, group_size=16),
    IntGroupFormat(bits=3, group_size=32),
    IntGroupFormat(bits=8, group_size=64),
    CodebookFormat(double_quant=True),
    Int8Format(),
    DenseFormat(),
    DenseFormat("bfloat16"),
]
POSITIONS = 24
NAMES = ("query", "key", "value", "out", "gate", "up", "down")


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int = 83
    layers: int = 2

    def linears(self) -> dict[str, tuple[int, int]]:
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        wide = self.intermediate
        sizes = [queries, keys, keys, self.hidden, wide, wide, self.hidden]
        inputs = [self.hidden] * 3 + [queries] + [self.hidden] * 2 + [wide]
        return dict(zip(NAMES, zip(sizes, inputs, strict=True), strict=True))


# Whole blocks of codes everywhere; nothing that is a multiple of anything.
SHAPES = {"even": Shape(256, 8, 2, 32, 640), "odd": Shape(52, 3, 1, 20, 77)}


@dataclass(frozen=True)
class Made:
    """A decoder, and its matrices in float64 by layer and name."""

    weights: DecoderWeights
    dense: list[dict[str, Tensor]]
    embedding: Tensor
    head: Tensor


def made(shape: Shape, dtype: torch.dtype, formats: list[WeightFormat]) -> Made:
    choose = cycle(formats)
    dense: list[dict[str, Tensor]] = []

    def projection(size: tuple[int, int], biased: bool) -> tuple[Projection, Tensor]:
        weight_format = next(choose)
        packed = weight_format.pack(torch.randn(size) * size[1] ** -0.5)
        weight = weight_format.kernel_weight(packed, *size)
        bias = torch.randn(size[0]).to(dtype) if biased else None
        return Projection(weight, bias), weight_format.unpack(packed, *size, torch.float32).double()

    def norm() -> Tensor:
        return (torch.rand(shape.hidden) + 0.5).to(dtype)

    layers = []
    for _ in range(shape.layers):
        pairs = {name: projection(size, name in "key") for name, size in shape.linears().items()}
        dense.append({name: matrix for name, (_, matrix) in pairs.items()})
        layers.append(DecoderLayer(norm(), norm(), *(part for part, _ in pairs.values())))
    embedding = torch.randn(shape.vocabulary, shape.hidden).to(dtype)
    head, head_dense = projection((shape.vocabulary, shape.hidden), False)
    frequencies = 100.0 ** -(torch.arange(shape.head_dim // 2) / (shape.head_dim // 2))
    angles = (torch.arange(POSITIONS)[:, None] * frequencies).repeat(1, 2)
    weights = DecoderWeights(
        dtype=dtype,
        layers=tuple(layers),
        heads=shape.heads,
        key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        epsilon=1e-5,
        attention_scaling=shape.head_dim**-0.5,
        embedding=Weight(Layout("dense", *embedding.shape), (embedding,)),
        norm=norm(),
        head=head,
        cosines=angles.cos().to(dtype),
        sines=angles.sin().to(dtype),
    )
    return Made(weights, dense, embedding.double(), head_dense)


def exact_logits(model: Made, tokens: list[int]) -> Tensor:
    """Return the logits float64 [tokens, vocabulary], each step written out."""
    w = model.weights
    count, half = len(tokens), w.head_dim // 2

    def normal(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + w.epsilon).sqrt() * weight.double()

    def turned(x: Tensor) -> Tensor:
        other = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        cosines, sines = w.cosines[:count, None].double(), w.sines[:count, None].double()
        return x * cosines + other * sines

    h = model.embedding[tokens]
    for layer, dense in zip(w.layers, model.dense, strict=True):

        def linear(x: Tensor, name: str, layer=layer, dense=dense) -> Tensor:
            bias = getattr(layer, name).bias
            return x @ dense[name].T + (0 if bias is None else bias.double())

        x = normal(h, layer.attention_norm)
        queries = turned(linear(x, "query").view(count, w.heads, w.head_dim))
        keys = turned(linear(x, "key").view(count, w.key_value_heads, w.head_dim))
        values = linear(x, "value").view(count, w.key_value_heads, w.head_dim)
        group = w.heads // w.key_value_heads
        mixed = torch.zeros_like(queries)
        for head in range(w.heads):
            for at in range(count):
                scores = keys[: at + 1, head // group] @ queries[at, head] * w.attention_scaling
                mixed[at, head] = scores.softmax(0) @ values[: at + 1, head // group]
        h = h + linear(mixed.flatten(1), "out")
        x = normal(h, layer.mlp_norm)
        gate = linear(x, "gate")
        h = h + linear(gate * torch.sigmoid(gate) * linear(x, "up"), "down")
    return normal(h, w.norm) @ model.head.T


def native_logits(model: Made, tokens: list[int], sequences: int = 1) -> Tensor:
    decoder = NativeDecoder(model.weights, sequences)
    return torch.cat([decoder.next_logits([Next(token, at)]) for at, token in enumerate(tokens)])


@pytest.fixture
def tokens() -> list[int]:
    return torch.randint(83, (POSITIONS,)).tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_equal_those_of_float64(
    level: str, shape: str, dtype: torch.dtype, tokens: list[int]
) -> None:
    model = made(SHAPES[shape], dtype, MIXED)
    exact = exact_logits(model, tokens)
    difference = (native_logits(model, tokens).double() - exact).abs().max() / exact.abs().max()
    assert difference < (5e-6 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("weight_format", INT4 + MIXED[3:4], ids=lambda f: str(f.options()))
def test_bf16_products_with_codes_are_exact_up_to_the_output(weight_format: WeightFormat) -> None:
    shape = replace(SHAPES["even"], layers=1)
    model = made(shape, torch.bfloat16, [weight_format])
    # A layer that adds nothing: the logits are the head's product with a known bf16 vector.
    nothing = Weight(Layout("dense", 256, 256), (torch.zeros(256, 256),))
    no_down = Weight(Layout("dense", 256, 640), (torch.zeros(256, 640),))
    layer = replace(model.weights.layers[0], out=Projection(nothing), down=Projection(no_down))
    weights = replace(model.weights, layers=(layer,))
    for token in range(5):
        logits = NativeDecoder(weights).next_logits([Next(token, 0)])[0]
        h = weights.embedding.tensors[0][token].float()
        normal = (h * torch.rsqrt(h.pow(2).mean() + weights.epsilon)).bfloat16() * weights.norm
        exact = model.head @ normal.double()
        # Half a unit in the last of bf16's 8 places, and the sum's own rounding in float32.
        assert ((logits - exact).abs() <= exact.abs() * 2.0**-8 + 1e-5).all()


def test_threads_change_nothing(tokens: list[int]) -> None:
    before = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        model = made(SHAPES["even"], dtype, MIXED)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native_logits(model, tokens))
        torch.set_num_threads(before)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_fills_the_cache_as_its_tokens_one_by_one_do(
    level: str, shape: str, tokens: list[int]
) -> None:
    model = made(SHAPES[shape], torch.float32, MIXED)
    whole, read = NativeDecoder(model.weights), NativeDecoder(model.weights)
    expected = [whole.next_logits([Next(token, at)]) for at, token in enumerate(tokens)]
    read.read({0: torch.tensor(tokens[:10])})
    for at in range(10, POSITIONS):
        logits = read.next_logits([Next(tokens[at], at)])
        assert (logits - expected[at]).abs().max() <= 1e-5 * expected[at].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompt_does_not_depend_on_those_beside_it(level: str, dtype: torch.dtype) -> None:
    model = made(SHAPES["odd"], dtype, MIXED)
    prompts = {n: torch.randint(83, (length,)) for n, length in enumerate((3, 0, 20, 1, 7))}
    together = NativeDecoder(model.weights, sequences=5)
    together.read(prompts)
    for number, prompt in prompts.items():
        alone = NativeDecoder(model.weights)
        alone.read({0: prompt})
        here, there = (decoder._cache[:, :, at] for decoder, at in ((together, number), (alone, 0)))
        assert torch.equal(here, there)


def test_what_is_outside_is_refused() -> None:
    decoder = NativeDecoder(made(SHAPES["odd"], torch.float32, MIXED).weights, sequences=2)
    for wrong in ((83, 0, 0), (-1, 0, 0), (0, POSITIONS, 0), (0, -1, 0), (0, 0, 2), (0, 0, -1)):
        with pytest.raises(IndexError):
            decoder.next_logits([Next(*wrong)])
    with pytest.raises(IndexError, match="2 tokens"):
        decoder.next_logits([Next(1, 0), Next(2, 0)])
    with pytest.raises(IndexError, match="0 tokens"):
        decoder.next_logits([])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_does_not_depend_on_those_beside_it(
    level: str, shape: str, dtype: torch.dtype
) -> None:
    model = made(SHAPES[shape], dtype, MIXED)
    lengths = [9, 1, 4, 9, 2, 7, 5, 3, 6, 8, 2, 9, 1, 5, 4, 3]
    texts = [torch.randint(83, (length,)).tolist() for length in lengths]
    alone = [native_logits(model, text, sequences=2) for text in texts]
    together = NativeDecoder(model.weights, sequences=len(texts))
    for at in range(max(lengths)):  # 16 go on at first, then fewer
        going = [number for number, text in enumerate(texts) if at < len(text)]
        logits = together.next_logits([Next(texts[number][at], at, number) for number in going])
        for row, number in zip(logits, going, strict=True):
            assert torch.equal(row, alone[number][at])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_wide_layer_sums_alike_for_one_sequence_and_for_several(level: str, bits: int) -> None:
    """So many sums, rounded to bfloat16, that another order of their terms would show in some."""
    shape = Shape(1056, 2, 1, 32, 64, vocabulary=6000, layers=1)  # not in pieces of 64 columns
    model = made(shape, torch.bfloat16, [IntGroupFormat(bits=bits)])
    decoder = NativeDecoder(model.weights, sequences=16)
    tokens = [Next(7 * number, 0, number) for number in range(16)]
    together = decoder.next_logits(tokens)
    alone = torch.cat([decoder.next_logits([token]) for token in tokens])
    assert torch.equal(together, alone)
