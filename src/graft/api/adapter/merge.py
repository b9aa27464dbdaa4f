"""Several adapters of one base combined into one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from graft.adapters.combine import (
    COMBINATIONS,
    DENSE,
    EXACT,
    MEANS,
    combined_factors,
    combined_spectrum,
    stacked,
)
from graft.adapters.low_rank import LowRank, left_of
from graft.api.adapter.files import ADAPTER_REPORT, Cut, open_lora
from graft.api.events import Events
from graft.errors import raise_problems
from graft.files.write import check_new
from graft.model.lora_files import LoraFiles, LoraLayer, belongs_to_its_base, write_lora


@dataclass(frozen=True)
class CombineReport:
    """What a merged adapter is made of."""

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    how: str
    density: float | None
    seed: int | None
    factors: bool
    ranks: Mapping[str, int]
    """Of each layer."""
    relative_error: float
    """What cutting to these ranks took from the combination; 0 where nothing was cut."""
    parameters: int


def combine_adapters(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] = (),
    how: str = "linear",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int = 0,
    factors: bool = False,
    events: Events | None = None,
) -> CombineReport:
    """Write the folder `out`: one LoRA of several of the same base, weighted.

    The default weights are equal, with the sum 1; those of ties are 1, as it takes a mean itself.

    linear: Σ w ΔW, exactly, in the sum of the ranks (PEFT's `cat`). svd: that sum cut to `rank`
    (default: the largest of the ranks) or `energy`. ties (arXiv 2306.01708): of each ΔW the share
    `density` of the largest elements; the sign of their sum is elected; the mean of w ΔW over those
    that agree. dare (2311.03099): of each ΔW a random share `density`, divided by it, summed;
    dare_ties: those, with TIES' election. These two are cut as svd is (PEFT's `ties_svd`,
    `dare_linear_svd`, `dare_ties_svd`). factors: A's and B's are combined, and not their products,
    as PEFT's `linear`, `ties`, `dare_linear` and `dare_ties` do. Raises GraftError for adapters
    that are no ordinary LoRAs or do not fit each other, and when `out` exists.
    """
    events, target = events or Events(), Path(out)
    share = 1.0 if how in MEANS else 1 / max(len(adapters), 1)
    weights = tuple(weights) or (share,) * len(adapters)
    _check_options(adapters, weights, how, density, factors, (rank, energy))
    check_new(target)
    loras = [open_lora(path) for path in adapters]
    _check_fit(adapters, loras)
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, LoraLayer] = {}
    spectra: dict[str, Tensor] = {}
    # Sorted, so that what is drawn for a layer does not depend on the order in the files.
    names = sorted({name for lora in loras for name in lora.layers})
    for done, name in enumerate(names, start=1):
        there = [
            (lora.layers[name], weight)
            for lora, weight in zip(loras, weights, strict=True)
            if name in lora.layers
        ]
        updates, shares = [one.update() for one, _ in there], [weight for _, weight in there]
        if factors:
            # Weights and scalings go into A and B alike.
            shares = [one.scaling * weight for one, weight in there]
            plain = [LowRank(one.A, one.B) for one, _ in there]
            A, B = combined_factors(how, plain, shares, density or 1.0, generator)
        elif how == "linear":
            A, B = stacked(updates, shares)
        else:
            found = combined_spectrum(how, updates, shares, density or 1.0, generator)
            largest = None if energy is not None else rank or max(len(one.A) for one in updates)
            kept = max(Cut(largest, energy).of(found.S), 1) if found.rank else 0
            A, B = found.cut(kept) if found.rank else LowRank(updates[0].A * 0, updates[0].B * 0)
            spectra[name] = found.S
        layers[name] = LoraLayer(A.float(), B.float(), 1.0, _bias(there))
        events.progress("combining layers", done, len(names))
    merged = LoraFiles(layers, loras[0].base, transposed=loras[0].transposed)
    report = CombineReport(
        adapters=tuple(map(str, adapters)),
        weights=weights,
        how=how,
        density=density,
        seed=seed if "dare" in how else None,
        factors=factors,
        ranks={name: layer.rank for name, layer in layers.items()},
        relative_error=left_of(spectra.values(), [layers[name].rank for name in spectra]),
        parameters=merged.parameters,
    )
    write_lora(merged, target, beside={ADAPTER_REPORT: asdict(report)})
    return report


def _check_options(
    adapters: Sequence[str | Path],
    weights: Sequence[float],
    how: str,
    density: float | None,
    factors: bool,
    cut: tuple[int | None, float | None],
) -> None:
    problems = []
    if len(adapters) < 2:
        problems.append("give two adapters or more")
    if len(weights) != len(adapters):
        problems.append(f"--weights has {len(weights)} values for {len(adapters)} adapters")
    if not all(abs(weight) < float("inf") for weight in weights):
        problems.append(f"--weights are {', '.join(map(str, weights))}; expected numbers")
    if how not in COMBINATIONS:
        problems.append(f"--how is {how!r}; expected one of {', '.join(COMBINATIONS)}")
    elif how in DENSE and (density is None or not 0 < density <= 1):
        found = "missing" if density is None else str(density)
        problems.append(
            f"--density is {found}: the share of elements that {how} keeps of each adapter, more "
            "than 0, up to 1; 0.2 to 0.5 is usual"
        )
    elif how in EXACT and density is not None:
        problems.append(f"--density belongs to {', '.join(DENSE)}; {how} keeps every element")
    if (factors or how == "linear") and cut != (None, None):
        kept = "--factors keeps the rank" if factors else "linear keeps the sum of the ranks"
        problems.append(f"--rank and --energy: {kept}; cut it with `graft adapter resize`")
    elif None not in cut:
        problems.append("give one of --rank and --energy")
    elif cut[0] is not None and cut[0] < 1:
        problems.append(f"--rank is {cut[0]}; expected 1 or more")
    if factors and how == "svd":
        problems.append("--factors is for linear, ties, dare and dare_ties; svd cuts the product")
    raise_problems(problems, "adapters cannot be combined so")


def _check_fit(adapters: Sequence[str | Path], loras: Sequence[LoraFiles]) -> None:
    problems = []
    shapes: dict[str, tuple[int, int]] = {}
    for path, lora in zip(adapters, loras, strict=True):
        if belongs_to_its_base(lora):
            problems.append(
                f"{path} started as {lora.init}, and makes up for the rounding of its own base "
                "too; a share of that is no share of the task"
            )
        for name, layer in lora.layers.items():
            shape = len(layer.B), layer.A.shape[1]
            if shapes.setdefault(name, shape) != shape:
                problems.append(
                    f"{path}: {name} is {list(shape)}, in another {list(shapes[name])}: they are "
                    "of different bases"
                )
    if not set[str]().union(*(lora.layers.keys() & loras[0].layers.keys() for lora in loras[1:])):
        problems.append("they have no layer in common: they are of different bases")
    raise_problems(problems[:20], "adapters cannot be combined")


def _bias(there: Sequence[tuple[LoraLayer, float]]) -> Tensor | None:
    """Return the weighted sum of the biases, with their scalings; float32."""
    moves = [
        one.bias.double() * one.scaling * weight for one, weight in there if one.bias is not None
    ]
    return sum(moves[1:], moves[0]).float() if moves else None
