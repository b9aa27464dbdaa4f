"""A GGUF file that llama.cpp cut into several: which files it takes, and whether they are one.

The parts are called NAME-00001-of-00003.gguf. Each has three keys: split.no, its number from zero;
split.count; split.tensors.count, of all parts together. The first has the model's metadata, the
others have none or the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.errors import GraftError, raise_problems
from graft.model.gguf.header import Array
from graft.text import listed, quoted

_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_NAME = re.compile(r"(?s)(.+)-(\d{5})-of-(\d{5})\.gguf")
_MOST = 9_999
"""Parts; their number has five digits in the name, and no model has more."""

Part = tuple[Path, Mapping[str, Any], Sequence[str]]
"""A part's file, metadata, and names of tensors."""


def is_split(path: Path, metadata: Mapping[str, Any], tensors: int) -> bool:
    """Return whether a file says that it is one of several.

    Raises GraftError where its name or the number of its tensors says so, and its metadata do not.
    """
    if metadata.get(_COUNT, 1) not in (0, 1) or metadata.get(_NUMBER, 0) != 0:
        return True
    named = _NAME.fullmatch(path.name)
    if named is not None and int(named[3]) > 1 and _COUNT not in metadata:
        raise GraftError(
            f"{path}: its name makes it one of {int(named[3])} parts, and its metadata have no "
            f"{_COUNT}: rename it if it is a whole file, else download the parts again"
        )
    expected = metadata.get(_TENSORS, tensors)
    if expected != tensors:
        raise GraftError(
            f"{path}: {_TENSORS} is {quoted(expected)}, and it holds {tensors}; download it and "
            "the other parts again"
        )
    return False


def first_part(path: Path) -> Path:
    """Return what the first part of a file is called, by the name of any; of another, its own."""
    found = _NAME.fullmatch(path.name)
    return path if found is None else path.with_name(f"{found[1]}-00001-of-{found[3]}.gguf")


def part_files(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """Return the files of all parts in order, from the name and metadata of one.

    Raises GraftError, naming them, where some are missing or the name is not such a part's.
    """
    count, number = metadata.get(_COUNT), metadata.get(_NUMBER)
    if type(count) is not int or type(number) is not int or not 0 <= number < count <= _MOST:
        raise GraftError(
            f"{path}: {_NUMBER} is {quoted(number)} and {_COUNT} is {quoted(count)}, which is no "
            "part of a file; download it again"
        )
    found = _NAME.fullmatch(path.name)
    ending = f"-{number + 1:05}-of-{count:05}.gguf"
    if found is None or not path.name.endswith(ending):
        raise GraftError(
            f"{path} is part {number + 1} of {count} of a file; expected a name that ends with "
            f"{ending}, beside the other parts: give the parts their names again, or join them "
            "with llama-gguf-split --merge"
        )
    files = [path.with_name(f"{found[1]}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise GraftError(
            f"{path} is part {number + 1} of {count} of a file, and not all are beside it: "
            f"{listed(missing)} {'is' if len(missing) == 1 else 'are'} missing; download them too"
        )
    return files


def join_parts(parts: Sequence[Part]) -> dict[str, Any]:
    """Return the metadata of the whole file.

    Raises GraftError where the parts are not those of one file.
    """
    first, metadata, _ = parts[0]
    problems: list[str] = []
    for number, (path, own, _) in enumerate(parts):
        problems += _part_problems(path, own, metadata, number, first)
    names = Counter(name for _, _, own in parts for name in own)
    twice = [name for name, times in names.items() if times > 1]
    if twice:
        problems.append(f"{len(twice)} tensors are in two parts: {listed(twice, 5)}")
    expected = metadata.get(_TENSORS)
    if expected is not None and expected != names.total():
        problems.append(
            f"{_TENSORS} is {quoted(expected)}, and the {len(parts)} parts hold {names.total()}"
        )
    raise_problems(problems, f"{first} and the files beside it are not the parts of one file")
    return {key: value for key, value in metadata.items() if not key.startswith("split.")}


def _part_problems(
    path: Path, own: Mapping[str, Any], whole: Mapping[str, Any], number: int, first: Path
) -> list[str]:
    problems = [
        f"{path.name}: {key} is {quoted(own.get(key))}; expected {quoted(expected)}, as in "
        f"{first.name}"
        for key, expected in (
            (_NUMBER, number),
            (_COUNT, whole.get(_COUNT)),
            (_TENSORS, whole.get(_TENSORS)),
        )
        if own.get(key) != expected
    ]
    other = [
        key
        for key, value in own.items()
        if not key.startswith("split.") and key not in _OF_A_FILE and not _same(value, whole, key)
    ]
    if other:
        problems.append(
            f"{path.name} has other metadata than {first.name} ({listed(other, 5)}): it is a part "
            "of another model"
        )
    return problems


_OF_A_FILE = ("general.alignment",)
"""What each part says of itself."""


def _same(value: Any, whole: Mapping[str, Any], key: str) -> bool:
    if isinstance(value, Array):
        return value.same(whole.get(key))
    return bool(type(value) is type(whole.get(key)) and value == whole[key])
