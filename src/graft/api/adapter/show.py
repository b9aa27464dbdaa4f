"""What an adapter's layers hold, by singular values, and how near two adapters are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graft.adapters.low_rank import (
    LowRank,
    effective_rank,
    inner_product,
    rank_for,
    spectrum_of_product,
    subspace_similarity,
)
from graft.api.adapter.files import open_lora
from graft.api.adapter.plots import plot_comparison, plot_spectra
from graft.errors import GraftError

ENERGY = 0.95
"""The share of the energy whose rank is told."""


@dataclass(frozen=True)
class ShownLayer:
    """One layer's update."""

    rank: int
    scaling: float
    norm: float
    """√(Σ of the squares of its elements), s included."""
    largest: float
    """The largest singular value."""
    effective_rank: float
    """exp of the entropy of the singular values over their sum."""
    rank_95: int
    """The smallest rank that holds 95 % of Σ S²."""
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class ShownAdapter:
    """An adapter, layer by layer."""

    adapter: str
    base: str
    init: str
    parameters: int
    layers: Mapping[str, ShownLayer]


def show_adapter(adapter: str | Path, picture: str | Path | None = None) -> ShownAdapter:
    """Return each layer's rank, norm and singular values; draw them in a PNG where one is asked.

    Raises GraftError for an adapter that is no ordinary LoRA.
    """
    lora = open_lora(adapter)
    layers = {}
    for name, layer in lora.layers.items():
        values = spectrum_of_product(layer.update()).S
        layers[name] = ShownLayer(
            rank=layer.rank,
            scaling=layer.scaling,
            norm=float(values.square().sum().sqrt()),
            largest=float(values[0]) if len(values) else 0.0,
            effective_rank=effective_rank(values),
            rank_95=rank_for(values, ENERGY),
            singular_values=tuple(values.tolist()),
        )
    if picture is not None:
        spectra = {name: layer.singular_values for name, layer in layers.items()}
        plot_spectra(spectra, Path(picture), f"singular values of {Path(adapter).name}")
    return ShownAdapter(str(adapter), lora.base, lora.init, lora.parameters, layers)


@dataclass(frozen=True)
class ComparedLayer:
    """How near two adapters' updates of one layer are."""

    cosine: float
    """⟨ΔW, ΔW'⟩ over the product of their norms, from -1 to 1."""
    input_similarity: float
    """|VᵀV'|² / rank of the spaces of inputs that they read, from 0 to 1."""
    output_similarity: float
    """|UᵀU'|² / rank of the spaces of outputs that they write, from 0 to 1."""
    norm_ratio: float
    """|ΔW'| over |ΔW|."""


@dataclass(frozen=True)
class ComparedAdapters:
    """Two adapters side by side."""

    first: str
    second: str
    cosine: float
    """Of the updates of all layers, as one vector each; a layer that one lacks is zero there."""
    layers: Mapping[str, ComparedLayer]
    """Those that both adapt."""
    first_alone: tuple[str, ...]
    second_alone: tuple[str, ...]


def compare_adapters(
    first: str | Path, second: str | Path, picture: str | Path | None = None
) -> ComparedAdapters:
    """Return for each layer the cosine of two adapters' updates and how much of their spaces is
    shared (LoRA, arXiv 2106.09685, section 7.2); draw them in a PNG where one is asked.

    Raises GraftError for adapters that are no ordinary LoRAs, or of different shapes.
    """
    one, other = open_lora(first), open_lora(second)
    shared = [name for name in one.layers if name in other.layers]
    if not shared:
        raise GraftError(f"{first} and {second} have no layer in common: their bases differ")
    layers, products, squares = {}, 0.0, [0.0, 0.0]
    for name in shared:
        ours, theirs = one.layers[name].update(), other.layers[name].update()
        if (len(ours.B), ours.A.shape[1]) != (len(theirs.B), theirs.A.shape[1]):
            raise GraftError(
                f"{name} is {[len(ours.B), ours.A.shape[1]]} in {first} and "
                f"{[len(theirs.B), theirs.A.shape[1]]} in {second}: their bases differ"
            )
        layers[name] = _compared(ours, theirs)
        products += inner_product(ours, theirs)
    for place, lora in enumerate((one, other)):
        squares[place] = sum(
            inner_product(layer.update(), layer.update()) for layer in lora.layers.values()
        )
    if picture is not None:
        plot_comparison(
            {name: vars(layer) for name, layer in layers.items()},
            Path(picture),
            f"{Path(first).name} and {Path(second).name}",
            {
                "cosine": "cosine of the updates",
                "input_similarity": "shared space of inputs",
                "output_similarity": "shared space of outputs",
            },
        )
    return ComparedAdapters(
        str(first),
        str(second),
        products / ((squares[0] * squares[1]) ** 0.5 or 1.0),
        layers,
        tuple(name for name in one.layers if name not in other.layers),
        tuple(name for name in other.layers if name not in one.layers),
    )


def _compared(ours: LowRank, theirs: LowRank) -> ComparedLayer:
    one, other = spectrum_of_product(ours), spectrum_of_product(theirs)
    norm, norm_other = (float(part.S.square().sum().sqrt()) for part in (one, other))
    return ComparedLayer(
        cosine=inner_product(ours, theirs) / (norm * norm_other or 1.0),
        input_similarity=subspace_similarity(one.V, other.V),
        output_similarity=subspace_similarity(one.U, other.U),
        norm_ratio=norm_other / norm if norm else float("inf") if norm_other else 1.0,
    )
