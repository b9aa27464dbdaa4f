"""Comparing what a command left with what it should have left."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Contents = dict[str, Any]
"""Of each file below a folder, by its path there, what must be equal."""

EXISTS = "is there"
"""Of a file of which two equal runs write different ones: a plot, a page with times."""
CUT_OFF = "a line that is cut off"
_TEXTS = {".md", ".html", ".png"}
_TIMES = re.compile(
    r"seconds$|^tokens_per_second$|memory_bytes$|^since$|^until$|^parts$|^state_sha256$"
)
"""Keys of what may differ: `parts` of a run are between its interruptions, and `state_sha256` is of
times too."""
_CHECKPOINT_FILES = ("state.json", "state.safetensors")
_BEST = re.compile(r"(^|/)best/step-\d+/")
_CHECKPOINT = re.compile(r"(^|/)checkpoints/step-\d+/")


def contents(folder: Path) -> Contents:
    """Return what the folder holds, times and bytes of memory left out."""
    found: Contents = {}
    for parent, folders, files in os.walk(folder):
        for name in files:
            path = Path(parent, name)
            found[str(path.relative_to(folder))] = _content(path)
        if not folders and not files and Path(parent) != folder:
            found[str(Path(parent).relative_to(folder)) + "/"] = "an empty folder"
    return found


def _content(path: Path) -> Any:
    data = path.read_bytes()
    try:
        if path.suffix == ".json":
            return _timeless(json.loads(data))
        if path.suffix == ".jsonl":
            *lines, last = data.split(b"\n")
            return [*(_timeless(json.loads(line)) for line in lines), *([CUT_OFF] if last else [])]
    except ValueError:
        pass
    return f"{len(data)} bytes, {hashlib.sha256(data).hexdigest()}"


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not _TIMES.search(key)}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def normal(first: Mapping[str, Any], second: Mapping[str, Any]) -> Contents:
    """Return what two uninterrupted runs have in common; raises where more differs than texts."""
    if first.keys() != second.keys():
        raise RuntimeError(f"two runs wrote different files: {first.keys() ^ second.keys()}")
    differing = {name for name in first if first[name] != second[name]}
    strange = sorted(name for name in differing if Path(name).suffix not in _TEXTS)
    if strange:
        raise RuntimeError(f"two uninterrupted runs differ in {strange}")
    return {name: EXISTS if name in differing else value for name, value in first.items()}


def half_written(found: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """Return the files under a final name, which is one of the reference's, that are not whole.

    A file of lines may still be growing; its last line may be cut off. A JSON file may be written
    again later with more in it, as a comparison's is.
    """
    return [
        name
        for name, value in found.items()
        if name in reference and not _as_expected(name, value, reference[name])
    ]


def _as_expected(name: str, value: Any, expected: Any) -> bool:
    if expected == EXISTS or value == expected:
        return True
    if name.endswith(".json"):
        return not isinstance(value, str)
    if not name.endswith(".jsonl") or isinstance(value, str):
        return False
    lines = [line for line in value if line != CUT_OFF]
    return bool(lines == expected[: len(lines)])


def differences(found: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """Return the reference's files that are missing or not equal; empty folders do not count."""
    return [
        name
        for name, expected in reference.items()
        if not name.endswith("/")
        and (name not in found or (expected != EXISTS and found[name] != expected))
    ]


def leftovers(found: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """Return what is there beside the reference's files.

    More whole checkpoints may be, and the best parameters that such a one needs.
    """
    whole = whole_checkpoints(found)
    others = [name for name in whole if name not in whole_checkpoints(reference)]
    return [
        name
        for name in found
        if name not in reference
        and not (_CHECKPOINT.search(name) and Path(name).parent.name in whole)
        and not (_BEST.search(name) and any(Path(name).parent.name <= other for other in others))
    ]


def whole_checkpoints(found: Mapping[str, Any]) -> list[str]:
    """Return the names of the checkpoints that have all of their files, oldest first."""
    folders = {str(Path(name).parent) for name in found if _CHECKPOINT.search(name)}
    return sorted(
        Path(folder).name
        for folder in folders
        if all(f"{folder}/{name}" in found for name in _CHECKPOINT_FILES)
    )


def last_step(found: Mapping[str, Any]) -> int:
    """Return the last optimizer step in the metrics of a run; 0 where there is none."""
    files = [value for name, value in found.items() if name.endswith("metrics.jsonl")]
    return max((line["step"] for file in files for line in file if "loss" in line), default=0)
