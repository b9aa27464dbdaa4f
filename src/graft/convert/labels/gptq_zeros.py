"""Deciding how a folder's zero points are read: from its label, its weights and what was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graft.convert.folder import WORDS, ForeignFolder
from graft.convert.grids.affine import unpack_stream
from graft.convert.grids.gptq_groups import read_groups
from graft.convert.labels.zero_points import (
    BY_WORDS,
    OTHER,
    WIDTHS,
    Finding,
    LayerSample,
    Version,
    Way,
    find_version,
    find_way,
    group_sample,
    read_zeros,
)
from graft.errors import GraftError
from graft.model.weight_files import WeightFiles

_LAYERS = 48
"""Layers that are looked at, evenly spaced; those with borrowed zero points likewise."""
_BLOCKS = 8
"""Blocks of 32 outputs of each that are looked at."""
_MEANS = {"v1": "stored minus one", "v2": "stored as they are"}


@dataclass(frozen=True)
class Zeros:
    """How the zero points of a folder are read."""

    version: Version
    way: Way
    notes: list[str]


def decide_zeros(
    files: WeightFiles,
    names: Sequence[str],
    folder: ForeignFolder,
    label: Version | None,
    wholly: bool,
    unwrapped: bool,
) -> Zeros:
    """Return how zero points are read, and what to tell of it.

    label: what the settings say. wholly: whether the tool that wrote them takes one from whole
    words. unwrapped: whether it takes the largest code of v1 for 2^bits. Raises GraftError where
    the settings say nothing, the weights show nothing, and nobody was asked.
    """
    asked = folder.asked.gptq_zeros
    samples = [
        sample for name in _spaced(names) if (sample := _sample(files, name, folder)) is not None
    ]
    finding = find_version(samples)
    version = asked or finding.version or label or (None if samples else "v1")
    if version is None:
        raise GraftError(
            f"{folder.folder}: how its zero points are stored is neither said (checkpoint_format) "
            f"nor to be seen: {finding.why}; say it with --gptq-zeros v1 (minus one: AutoGPTQ, and "
            "GPTQModel's checkpoint_format gptq) or --gptq-zeros v2 (gptq_v2)"
        )
    notes = [_words(version, label, asked, finding)] if samples else []
    if version == "v2":
        return Zeros(version, "v2", notes)
    if unwrapped:
        return Zeros(version, "unwrapped", notes)
    borrowing = [
        sample
        for name in _spaced([name for name in names if _borrows(files, name)])
        if (sample := _sample(files, name, folder, borrowing=True)) is not None
    ]
    way = find_way(borrowing, "words" if wholly else "v1") if borrowing else "v1"
    if borrowing:
        how = (
            "code by code, as AutoGPTQ does" if way == "v1" else "to whole words, as GPTQModel does"
        )
        notes.append(f"where a zero point of 0 may have borrowed from the next, one is added {how}")
    return Zeros(version, way, notes)


def _words(version: Version, label: Version | None, asked: Version | None, finding: Finding) -> str:
    """Return what was decided, and by what."""
    said = "say nothing of them" if label is None else f"say {label}"
    if asked:
        why = "as asked (--gptq-zeros)"
        if finding.version == OTHER[version]:
            why += f", though its weights look like {finding.version}: {finding.why}"
    elif finding.version is None:
        why = f"as its settings {said}; its weights do not show it: {finding.why}"
    elif finding.version == label:
        why = f"as its settings {said}, and as its weights show"
    else:
        why = (
            f"as its weights show, while its settings {said}: {finding.why} (--gptq-zeros "
            f"{OTHER[version]} reads them the other way)"
        )
    return f"zero points are {version} ({_MEANS[version]}), {why}"


def _spaced(names: Sequence[str]) -> list[str]:
    count = min(len(names), _LAYERS)
    return [names[place * len(names) // count] for place in range(count)]


def _borrows(files: WeightFiles, name: str) -> bool:
    """Return whether a zero point depends on how one was taken away."""
    shape = _shape(files, name)
    if shape is None:
        return False
    return bool(_differing(files.read_once(f"{name}.qzeros"), shape.bits).any())


def _differing(qzeros: Tensor, bits: int) -> Tensor:
    """Return which zero points depend on how one was taken away, bool [groups, outputs]."""
    codes = read_zeros(qzeros, bits, "v1")
    ways = [read_zeros(qzeros, bits, way) != codes for way in BY_WORDS]
    return torch.stack(ways).any(0)


@dataclass(frozen=True)
class _Shape:
    bits: int
    groups: int
    inputs: int
    outputs: int


def _shape(files: WeightFiles, name: str) -> _Shape | None:
    """Return the sizes of a layer; None where its tensors fit no layer, which is told later."""
    parts = [f"{name}.{part}" for part in ("qweight", "qzeros", "scales")]
    if any(part not in files or len(files.shape(part)) != 2 for part in parts):
        return None
    (rows, outputs), (groups, words), statistics = map(files.shape, parts)
    if files.dtype(parts[0]) not in WORDS or files.dtype(parts[1]) not in WORDS:
        return None
    if not outputs or outputs % 32 or words * 32 % outputs or statistics != (groups, outputs):
        return None
    bits = words * 32 // outputs
    if bits not in WIDTHS or rows * 32 % bits or not rows or not groups:
        return None
    return _Shape(bits, groups, rows * 32 // bits, outputs)


def _sample(
    files: WeightFiles, name: str, folder: ForeignFolder, borrowing: bool = False
) -> LayerSample | None:
    """Return the statistics of some outputs of a layer; None where its tensors fit no layer.

    borrowing: of those alone that depend on how one was taken away.
    """
    shape = _shape(files, name)
    if shape is None:
        return None
    try:
        groups = read_groups(files, name, folder.settings, shape.groups, shape.inputs)
    except GraftError:
        return None  # told with everything else that does not fit
    qzeros = files.read_once(f"{name}.qzeros").view(torch.int32)
    blocks = list(range(shape.outputs // 32))
    if borrowing:
        differ = _differing(qzeros, shape.bits).unflatten(-1, (-1, 32)).any(-1).any(0)
        blocks = differ.nonzero()[:, 0].tolist()
    count = min(len(blocks), _BLOCKS)
    chosen = torch.tensor([blocks[place * len(blocks) // count] for place in range(count)])
    outputs = (chosen.unsqueeze(-1) * 32 + torch.arange(32)).flatten()
    zeros = (chosen.unsqueeze(-1) * shape.bits + torch.arange(shape.bits)).flatten()
    words = files.read_once(f"{name}.qweight")[:, outputs].T
    codes = unpack_stream(words, shape.bits, shape.inputs).T
    return group_sample(shape.bits, qzeros[:, zeros], codes, groups.of_input)
