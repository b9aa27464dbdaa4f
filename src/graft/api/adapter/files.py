"""Where an adapter lies, to which rank one is cut, and what is written beside one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from graft.adapters.low_rank import left_of, rank_for
from graft.api.run.folder import is_run
from graft.api.run.layout import ADAPTER
from graft.api.run.status import unfinished
from graft.errors import GraftError
from graft.model.lora_files import LoraFiles, read_lora

ADAPTER_REPORT = "adapter-report.json"


def adapter_folder(path: str | Path) -> Path:
    """Return the folder of an adapter's files: a run's, or the folder itself.

    Raises GraftError when a run has none.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise GraftError(f"there is no folder {folder}; give a run or the folder of an adapter")
    if not is_run(folder):
        return folder
    if not (folder / ADAPTER).is_dir():
        raise GraftError(unfinished(folder))
    return folder / ADAPTER


def open_lora(path: str | Path) -> LoraFiles:
    """Return the LoRA of a run or an adapter's folder; raises GraftError for no ordinary one."""
    return read_lora(adapter_folder(path))


@dataclass(frozen=True)
class Cut:
    """How far updates are cut: to a rank, or to the rank that holds a share of their energy."""

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise GraftError("give one of --rank (the rank of every layer) and --energy (a share)")
        if self.rank is not None and self.rank < 1:
            raise GraftError(f"--rank is {self.rank}; expected 1 or more")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise GraftError(f"--energy is {self.energy}; expected more than 0, up to 1")

    def of(self, singular_values: Tensor) -> int:
        """Return the rank of a layer: at most as many as it has singular values."""
        if self.rank is not None:
            return min(self.rank, len(singular_values))
        assert self.energy is not None
        return rank_for(singular_values, self.energy)


@dataclass(frozen=True)
class CutLayer:
    """What a cut kept of one layer's update."""

    rank: int
    before: int
    """How many singular values there were."""
    norm: float
    """Of the whole update, √(Σ of the squares of its elements)."""
    relative_error: float
    """Norm of what was cut off over that."""


def cut_layer(singular_values: Tensor, rank: int) -> CutLayer:
    """Return what a rank keeps of an update with these singular values."""
    return CutLayer(
        rank=rank,
        before=len(singular_values),
        norm=float(singular_values.double().square().sum().sqrt()),
        relative_error=left_of([singular_values], [rank]),
    )


def curve(
    spectra: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> list[dict[str, float | int | None]]:
    """Return what ranks and shares of the energy would cost and keep.

    sizes: of each layer, in_features + out_features. Each entry has a `rank` of every layer or an
    `energy` that each layer's rank holds, the `parameters` of the factors, and the
    `relative_error` over all layers.
    """
    most = max((len(values) for values in spectra.values()), default=0)
    ranks = [2**power for power in range(max(most - 1, 0).bit_length())] + [most] * bool(most)
    cuts = [Cut(rank=rank) for rank in ranks]
    cuts += [Cut(energy=energy) for energy in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999)]
    points: list[dict[str, float | int | None]] = []
    for cut in cuts if most else []:
        chosen = {name: cut.of(values) for name, values in spectra.items()}
        points.append(
            {
                "rank": cut.rank,
                "energy": cut.energy,
                "parameters": sum(rank * sizes[name] for name, rank in chosen.items()),
                "relative_error": left_of(spectra.values(), [*chosen.values()]),
            }
        )
    return points


def in_words(share: float) -> str:
    """Return a share with as many digits as tell it from 0 and 1."""
    if share == 0 or math.isnan(share):
        return "0"
    return f"{share:.2%}" if 1e-4 <= share <= 0.9999 else f"{share:.3g}"
