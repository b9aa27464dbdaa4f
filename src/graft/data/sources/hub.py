"""Data sets of the Hugging Face hub, read with the `datasets` library, which is an extra."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from graft.data.sources.record import Layout, Record, chosen_columns
from graft.errors import GraftError
from graft.understood import understood

HUB = "hub:"
"""What the name of a data set of the hub begins with."""
_NAME = re.compile(
    r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?:/(?P<config>[\w.-]+))?"
    r"(?::(?P<split>[\w.\[\]:%+-]+))?(?:@(?P<revision>[\w./-]+))?"
)


def read_hub(name: str, layouts: Sequence[Layout] | None) -> Iterator[Record]:
    """Yield the rows of hub:OWNER/NAME[/CONFIG][:SPLIT][@REVISION]; the split is train by default.

    Of columns that no layout names nothing is read. Raises GraftError when the library is not
    installed, and for what it cannot load.
    """
    found = _load(name)
    names = list(found.column_names)
    columns = chosen_columns(names, layouts)
    others = {column: None for column in names if column not in columns}
    for number, row in enumerate(found.select_columns(columns), start=1):
        yield Record(f"{name}:row {number}", {**others, **row})


def fingerprint_hub(name: str) -> str:
    """Return the SHA-256 of all rows of a data set, as 64 hexadecimal digits; see `read_hub`."""
    digest = hashlib.sha256()
    for row in _load(name):
        digest.update(json.dumps(row, default=str, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _load(name: str) -> Any:
    parts = _NAME.fullmatch(name.removeprefix(HUB))
    if parts is None:
        raise GraftError(f"{name}: expected {HUB}OWNER/NAME[/CONFIG][:SPLIT][@REVISION]")
    try:
        import datasets
    except ImportError as error:
        raise GraftError(
            f"{name}: reading the hub needs the library datasets; pip install 'graft-llm[hub]'"
        ) from error
    with understood(name, "cannot be loaded"):
        return datasets.load_dataset(
            parts["name"],
            parts["config"],
            split=parts["split"] or "train",
            revision=parts["revision"],
        )
