"""What --data names: a file, several by a pattern, a folder, a mixture, or data of the hub."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from graft.data.sources.files import checked_format, known_format, read_records
from graft.data.sources.hub import HUB, fingerprint_hub, read_hub
from graft.data.sources.mixture import MIXTURES, read_mixture
from graft.data.sources.record import Layout, Record
from graft.errors import GraftError
from graft.files.digest import file_digest
from graft.text import listed


@dataclass(frozen=True)
class Source:
    """A file of rows, or a hub's data set, and how it is read."""

    name: str
    """The path of the file, or what it is called on the hub."""
    columns: tuple[str, ...] = ()
    """Words of --columns."""
    data_format: str | None = None
    """None: the suffix says it."""
    weight: float = 1.0
    """How often each row is trained in an epoch."""
    is_mixed: bool = False
    """Whether it is one of a mixture, whose sources may have rows of several kinds."""
    said: str | None = None
    """What a user should know of how it was chosen."""

    def records(self, layouts: Sequence[Layout] | None) -> Iterator[Record]:
        """Yield the rows; see `read_records`."""
        if self.name.startswith(HUB):
            return read_hub(self.name, layouts)
        return read_records(self.name, layouts, self.data_format)

    def digest(self) -> str:
        """Return the SHA-256 of the content."""
        return (
            fingerprint_hub(self.name)
            if self.name.startswith(HUB)
            else file_digest(Path(self.name))
        )


def sources_of(
    name: str | Path, columns: Sequence[str] = (), data_format: str | None = None
) -> list[Source]:
    """Return the files that a name stands for, in the order in which they are read.

    Raises GraftError for an empty name, for an address, and for a folder or a mixture of which it
    is not clear what is meant.
    """
    if data_format is not None:
        checked_format(data_format)
    given = Source(str(name), tuple(columns), data_format)
    path = Path(name)
    if not given.name:  # of a variable that is not set, say; as a path it would be this folder
        raise GraftError("the name of the data is empty; give a file, or . for this folder")
    if given.name.startswith(HUB):
        return [given]
    if re.match(r"[a-z][a-z0-9+.-]+://", given.name, re.I):
        raise GraftError(
            f"{name}: graft reads no address; download the file and give its path, or name a data "
            f"set of the Hugging Face hub as {HUB}OWNER/NAME"
        )
    if path.suffix.lower() in MIXTURES:
        return _mixture(path, given)
    if path.is_dir():
        return _of_folder(path, given)
    if glob.has_magic(given.name) and not os.path.lexists(path):
        found = sorted(glob.glob(given.name, recursive=True), key=_natural)
        if not found:
            raise GraftError(f"{name}: no file has such a name")
        return [replace(given, name=one) for one in found]
    may_be_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", given.name) and known_format(path) is None
    if may_be_hub and not os.path.lexists(path):
        raise GraftError(
            f"{name} cannot be read: No such file or directory; a data set of the Hugging Face "
            f"hub is named {HUB}{name}"
        )
    return [given]


def weights_of(name: str | Path) -> dict[str, float]:
    """Return how often the rows of each file are trained in an epoch, where that is not once."""
    return {one.name: one.weight for one in sources_of(name) if one.weight != 1}


def fingerprint(name: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, or of those of all files that a name stands for.

    64 hexadecimal digits. Raises GraftError for what cannot be read.
    """
    sources = sources_of(name)
    path = Path(name)
    if len(sources) == 1 and sources[0].name == str(name):
        return sources[0].digest()
    digests = [file_digest(path)] if path.is_file() else []
    digests += (source.digest() for source in sources)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _mixture(path: Path, given: Source) -> list[Source]:
    if given.columns or given.data_format is not None:
        raise GraftError(
            f"{path}: --columns and --data-format are given beside a mixture; write them in it, "
            "each for its own source"
        )
    found: list[Source] = []
    for part in read_mixture(path):
        if Path(part.data).suffix.lower() in MIXTURES and not part.data.startswith(HUB):
            raise GraftError(f"{path}: {part.data} is a mixture itself; name its sources here")
        for one in sources_of(part.data, part.columns, part.data_format):
            found.append(replace(one, weight=part.weight, is_mixed=True))
    seen: set[str] = set()
    for one in found:
        name = os.path.realpath(one.name)
        if name in seen:
            raise GraftError(f"{path}: {one.name} is there twice; give it once, with a weight")
        seen.add(name)
    return found


# Folders ------------------------------------------------------------------------------------------

_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "heldout"),
}
_NO_DATA = re.compile(
    r"dataset_infos?|dataset_dict|state|readme|license|licence|requirements|provenance|\..*", re.I
)
"""Names of files that lie beside data."""
_LEVELS = 3


def _of_folder(folder: Path, given: Source) -> list[Source]:
    """Return the files of a folder's training split, laid out as data sets on the hub are."""
    files = [
        path
        for path in _files(folder, _LEVELS)
        if (given.data_format or known_format(path)) and not _NO_DATA.fullmatch(path.stem)
    ]
    splits: dict[str | None, list[Path]] = {}
    for path in sorted(files, key=lambda one: _natural(str(one))):
        splits.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    chosen = splits.get("train") or (splits.get(None) if len(splits) == 1 else None)
    if not chosen:
        found = listed(path.relative_to(folder) for path in files)
        raise GraftError(
            f"{folder}: a folder without files of a split called train (found {found}); name "
            "one of its files, or several by a pattern in quotes"
        )
    folders = sorted({path.parent for path in chosen})
    if len(folders) > 1:
        raise GraftError(
            f"{folder}: training files of several configurations, in "
            f"{listed(one.relative_to(folder) for one in folders)}; name one of these folders"
        )
    suffixes = sorted({"".join(path.suffixes[-2:]) for path in chosen if path.suffixes})
    if len({known_format(path) for path in chosen}) > 1 or len({*map(_packed, chosen)}) > 1:
        raise GraftError(
            f"{folder}: training files of several formats ({listed(suffixes)}), perhaps of the "
            "same rows; name those that are meant by a pattern in quotes"
        )
    others = [name for name in splits if name not in ("train", None)]
    said = f"{folder}: {len(chosen)} file(s) of its training split are read"
    said += f"; not read: {listed(map(str, others))}" if others else ""
    return [replace(given, name=str(path), said=said) for path in chosen]


def _files(folder: Path, levels: int) -> Iterator[Path]:
    try:
        found = sorted(os.scandir(folder), key=lambda one: one.name)
    except OSError as error:
        raise GraftError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in found:
        path = Path(entry)
        if path.is_dir() and levels > 1 and not entry.name.startswith("."):
            yield from _files(path, levels - 1)
        elif path.is_file():
            yield path


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name, or else a folder above it, says."""
    for part in reversed(path.parts):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in _SPLITS.items():
            if any(word in names for word in words):
                return split
    return None


def _packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts names with numbers by these: part-2 before part-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
