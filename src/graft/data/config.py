"""Configuration of the data: which files, how they are split, cut and joined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """How files of examples are read."""

    GROUP: ClassVar[str] = "data"
    RARE: ClassVar[frozenset[str]] = frozenset({"columns", "data_format"})

    columns: tuple[str, ...] = ()
    """Which column holds what of a row, each as KEY=COLUMN: prompt=question completion=answer."""

    data_format: str | None = None
    """What --data holds whose suffix does not say it: text, jsonl, json, csv, tsv, parquet or
    arrow."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(ReadingConfig):
    """What to train and evaluate on, and how a row becomes tokens."""

    GROUP: ClassVar[str] = "data"
    RARE: ClassVar[frozenset[str]] = frozenset(
        {
            "cache",
            "chat_template",
            "eos",
            "eval_fraction",
            "separator",
            "skip_bad_rows",
            "stride",
        }
    )

    data: str
    """Examples: a file, folder, .yaml mixture or hub:NAME."""

    eval_data: str | None = None
    """Held-out examples; without it a share of the rows of --data is held out."""

    eval_fraction: float = 0.05
    """Share of the rows that is held out when --eval-data is not given (1 to 500 rows)."""

    max_length: int | None = None
    """Most tokens in a row, longer rows are cut; default: the model's limit, at most 1024. Rows of
    text are cut into as many windows as they need, and all of them is trained."""

    stride: int | None = None
    """Tokens from the beginning of a text's window to that of the next; fewer than --max-length let
    windows overlap. What two of them share is trained in the first and context in the second."""

    chat_template: str | None = None
    """Name of one of the tokenizer's chat templates, or a .jinja file, which goes with the model;
    default: the tokenizer's own, or graft's where it has none."""

    eos: bool = True
    """Append the end-of-sequence token to every row and train it, so that the model stops."""

    skip_bad_rows: bool = False
    """Go on without rows that cannot be read or trained on, up to half of them, and name them in
    skipped.jsonl of the run's folder."""

    separator: str = "\n"
    """Text between prompt and completion when the prompt does not end in whitespace."""

    deduplicate: bool = False
    """Drop rows from training whose text, but for white space and case, an earlier row has, or one
    that is held out."""

    cache: bool = True
    """Keep the encoded rows of large files in the user's cache folder, and map them next time."""
