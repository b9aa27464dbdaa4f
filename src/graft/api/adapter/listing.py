"""The adapters below a folder, each in one row, from the headers of their files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from graft.adapters.registry import method_of_files
from graft.api.run.folder import is_run
from graft.api.run.layout import ADAPTER
from graft.errors import GraftError
from graft.files.read import read_json
from graft.model.adapter_files import OWN_CONFIG, read_configs
from graft.model.peft_files import PEFT_CONFIG, PEFT_WEIGHTS
from graft.model.weight_files import WeightFiles

DEPTH = 3
"""How far below a folder adapters are looked for."""


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """An adapter in one row; a figure that its files do not have is None."""

    name: str
    """Its folder, or its run's, as it was found."""
    problem: str | None = None
    """Why it cannot be read."""
    method: str | None = None
    ranks: tuple[int, ...] = ()
    """All that occur, the smallest first."""
    alpha: float | None = None
    init: str | None = None
    base: str | None = None
    parameters: int | None = None
    bytes: int | None = None
    """Of the file of tensors."""
    targets: Mapping[str, int] = field(default_factory=dict)
    """How many layers it adapts, by the last part of their names."""


def list_adapters(folders: Sequence[str | Path]) -> list[AdapterSummary]:
    """Return the adapters that folders are, or hold up to three levels below, in order.

    One whose files are damaged is a row that says so. Raises GraftError when a folder is not there.
    """
    missing = [str(folder) for folder in folders if not Path(folder).is_dir()]
    if missing:
        raise GraftError(f"there is no folder {', '.join(missing)}; give folders with adapters")
    found = dict.fromkeys(one for folder in folders for one in _below(Path(folder), DEPTH))
    return [_summary(name, files) for name, files in found]


def _below(folder: Path, depth: int) -> Iterator[tuple[Path, Path]]:
    """Yield (the folder to be named, the folder of the files)."""
    if is_run(folder):
        if (folder / ADAPTER).is_dir():
            yield folder, folder / ADAPTER
        return
    if (folder / PEFT_CONFIG).is_file() or (folder / OWN_CONFIG).is_file():
        yield folder, folder
    if not depth:
        return
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:  # another user's
        return
    for path in inside:
        if not path.name.startswith("."):
            yield from _below(path, depth - 1)


def _summary(name: Path, folder: Path) -> AdapterSummary:
    try:
        return _read(name, folder)
    except (GraftError, OSError) as error:
        return AdapterSummary(name=str(name), problem=str(error))


def _read(name: Path, folder: Path) -> AdapterSummary:
    if (folder / PEFT_CONFIG).is_file() and "peft_type" not in read_json(folder / PEFT_CONFIG):
        raise GraftError(f"{folder} is no adapter of PEFT or graft; `graft adopt` reads mlx-lm's")
    own, config = read_configs(folder)
    method = method_of_files(None if own is None else own.method, config)
    ranks, targets, parameters = set[int](), Counter[str](), 0
    with WeightFiles(folder, single_file=PEFT_WEIGHTS) as files:
        layers = dict[str, None]()
        for key in files:
            shape = files.shape(key)
            count = 1
            for size in shape:
                count *= size
            parameters += count
            layer, _, part = key.removesuffix(".weight").rpartition(".")
            if part in ("lora_A", "A") and shape:
                ranks.add(shape[0])
            if part == "lora_A" or not config:  # PEFT's form may hold whole modules too
                layers[layer] = None
        targets.update(layer.rpartition(".")[2] for layer in layers)
    alpha = config.get("lora_alpha")
    return AdapterSummary(
        name=str(name),
        method=method.name,
        ranks=tuple(sorted(ranks)),
        alpha=float(alpha) if isinstance(alpha, int | float) else None,
        init=None if own is None else own.init,
        base=(own.base if own is not None else None) or config.get("base_model_name_or_path"),
        parameters=parameters,
        bytes=(folder / PEFT_WEIGHTS).stat().st_size,
        targets=dict(targets),
    )
