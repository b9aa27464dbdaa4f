"""A trained LoRA cut to another rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from graft.adapters.low_rank import left_of, spectrum_of_product
from graft.api.adapter.files import ADAPTER_REPORT, Cut, CutLayer, curve, cut_layer, open_lora
from graft.api.events import Events
from graft.errors import GraftError
from graft.files.write import check_new
from graft.model.lora_files import LoraLayer, write_lora


@dataclass(frozen=True)
class ResizeReport:
    """What a smaller adapter keeps of the one that it was cut from."""

    adapter: str
    rank: int | None
    energy: float | None
    layers: Mapping[str, CutLayer]
    relative_error: float
    """Over all layers: the norm of what was cut off over that of the updates."""
    parameters_before: int
    parameters: int
    curve: list[dict[str, float | int | None]]
    """The relative error by rank and by energy; see `graft.api.adapter.files.curve`."""


def resize_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    events: Events | None = None,
) -> ResizeReport:
    """Write the folder `out`: a LoRA whose updates are the nearest ones of a smaller rank.

    Of each layer s B A = U S Vᵀ is cut to `rank`, or to the smallest rank that holds `energy` of
    Σ S², so that each layer gets the rank that it uses. Singular values are those of the small
    triangular factors of B and A; the update is never formed. A layer whose update is zero is left
    out. Raises GraftError for an adapter that is no ordinary LoRA, and when `out` exists.
    """
    events, cut, target = events or Events(), Cut(rank, energy), Path(out)
    check_new(target)
    lora = open_lora(adapter)
    layers, cuts, spectra = dict[str, LoraLayer](), dict[str, CutLayer](), {}
    for done, (name, layer) in enumerate(lora.layers.items(), start=1):
        found = spectrum_of_product(layer.update())
        if found.rank or layer.bias is not None:
            A, B = found.cut(cut.of(found.S)) if found.rank else (layer.A[:1], layer.B[:, :1])
            bias = None if layer.bias is None else layer.bias * layer.scaling
            layers[name] = LoraLayer(A.float(), B.float(), 1.0, bias)
            cuts[name], spectra[name] = cut_layer(found.S, len(A)), found.S
        events.progress("cutting layers", done, len(lora.layers))
    if not layers:
        raise GraftError(f"{adapter} changes nothing: every update in it is zero")
    smaller = replace(lora, layers=layers)
    sizes = {name: len(layer.B) + layer.A.shape[1] for name, layer in layers.items()}
    report = ResizeReport(
        adapter=str(adapter),
        rank=rank,
        energy=energy,
        layers=cuts,
        relative_error=left_of(spectra.values(), [len(layers[name].A) for name in spectra]),
        parameters_before=lora.parameters,
        parameters=smaller.parameters,
        curve=curve(spectra, sizes),
    )
    write_lora(smaller, target, beside={ADAPTER_REPORT: asdict(report)})
    return report
