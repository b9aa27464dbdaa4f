"""What a comparison measured: one result per deployed model, and their figures over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from graft.comparison.contenders import YARDSTICK, Entry, entry_label
from graft.errors import GraftError
from graft.files.read import read_typed


@dataclass(frozen=True, kw_only=True)
class Result:
    """One deployed model, as read back from its folder, on the held-out rows; or why there is none.

    Times are in seconds, memory and files in bytes.
    """

    contender: str
    bits: int | None
    seed: int | None
    error: str | None = None
    """Why it could not be trained, deployed or scored; everything below is then None."""
    run: str | None = None
    """Folder of its training, below runs/."""
    loss: float | None = None
    """Nats per target token."""
    perplexity: float | None = None
    trained_perplexity: float | None = None
    """Of the model in training, at the step that was kept: what was there before deploying."""
    exact_match: float | None = None
    bleu: float | None = None
    rouge_l: float | None = None
    coverage: float | None = None
    """This and the three before it: see `graft.evaluate.scores.TextScores`."""
    file_bytes: int | None = None
    """Of the safetensors files that it is deployed as."""
    bits_per_weight: float | None = None
    """Of its quantised layers, constants included; None when it has none."""
    trained_parameters: int | None = None
    training_seconds: float | None = None
    """Of the whole run, loading and evaluations included; shared by all that deploy the run."""
    deploying_seconds: float | None = None
    """From the run to the folder: merging and quantising, without a dense merge that was there."""
    peak_memory_bytes: int | None = None
    """Of the training, the Python process included."""
    learning_rate: float | None = None
    texts: tuple[str, ...] = ()
    """The continuations of the held-out prompts, in their order."""

    @property
    def label(self) -> str:
        """Its name in words."""
        return entry_label(self.contender, self.bits, self.seed)


def read_result(path: Path, entry: Entry, texts: int) -> Result:
    """Return what was written of an entry with so many texts; raises GraftError for anything else.

    So nothing that is damaged, or another model's, gets into the tables.
    """
    result = read_typed(path, Result)
    figures = [value for value in asdict(result).values() if isinstance(value, float)]
    if (
        (result.contender, result.bits, result.seed)
        != (entry.contender.name, entry.bits, entry.seed)
        or result.loss is None
        or result.perplexity is None
        or not all(map(math.isfinite, figures))
        or len(result.texts) != texts
    ):
        raise GraftError(f"{path} is damaged: it is no result of {entry.label}")
    return result


@dataclass(frozen=True, kw_only=True)
class RunCosts:
    """What is read of a training's report."""

    perplexity: float | None
    trainable_parameters: int
    seconds: float
    peak_memory_bytes: int
    learning_rate: float


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds."""

    mean: float
    spread: float | None
    """Sample standard deviation; None for a single seed."""
    count: int

    @staticmethod
    def over(values: Iterable[float | None]) -> Spread | None:
        """Return mean and sample standard deviation of the values there are; None: there are none.

        s = sqrt(sum((x - mean)^2) / (n - 1))
        """
        known = [value for value in values if value is not None]
        if not known:
            return None
        spread = statistics.stdev(known) if len(known) > 1 else None
        return Spread(statistics.fmean(known), spread, len(known))


FIGURES = (
    *("loss", "perplexity", "trained_perplexity", "exact_match", "bleu", "rouge_l", "coverage"),
    *("file_bytes", "bits_per_weight", "trained_parameters", "training_seconds"),
    *("deploying_seconds", "peak_memory_bytes", "learning_rate"),
)
"""The figures of a result that are averaged over the seeds."""


@dataclass(frozen=True)
class Row:
    """A contender at a width, over its seeds."""

    contender: str
    bits: int | None
    figures: dict[str, Spread | None]
    ratios: dict[int, float]
    """Perplexity over the yardstick's of the same seed, by seed; an untrained model is paired with
    every seed of the yardstick."""
    ratio: Spread | None
    errors: tuple[str, ...]

    @property
    def label(self) -> str:
        """Its name in words."""
        return entry_label(self.contender, self.bits)

    def mean(self, figure: str) -> float | None:
        """Return the mean of a figure; None where no seed has it."""
        spread = self.figures[figure]
        return None if spread is None else spread.mean


def summarise(results: Sequence[Result]) -> list[Row]:
    """Return one row per contender and width, in their order in the results."""
    yardstick = {
        result.seed: result.perplexity
        for result in results
        if result.contender == YARDSTICK and result.seed is not None and result.perplexity
    }
    groups: dict[tuple[str, int | None], list[Result]] = {}
    for result in results:
        groups.setdefault((result.contender, result.bits), []).append(result)
    rows = []
    for (contender, bits), group in groups.items():
        ratios = {
            seed: result.perplexity / perplexity
            for result in group
            for seed, perplexity in yardstick.items()
            if result.perplexity is not None and result.seed in (None, seed)
        }
        rows.append(
            Row(
                contender=contender,
                bits=bits,
                figures={
                    name: Spread.over(getattr(result, name) for result in group) for name in FIGURES
                },
                ratios=ratios,
                ratio=Spread.over(ratios.values()),
                errors=tuple(result.error for result in group if result.error is not None),
            )
        )
    return rows


def row_as_dict(row: Row) -> dict[str, Any]:
    """Return a row as plain JSON values."""
    plain: dict[str, Any] = {"contender": row.contender, "bits": row.bits}
    for name, spread in row.figures.items():
        plain[name] = None if spread is None else asdict(spread)
    ratio = None if row.ratio is None else {**asdict(row.ratio), "by_seed": row.ratios}
    return {**plain, "perplexity_ratio": ratio, "errors": list(row.errors)}


# How figures are written, in the terminal as on the page ------------------------------------------

MIB = 2**20


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    title: str
    note: str
    spread: Callable[[Row], Spread | None]
    form: Callable[[float], str]

    def text(self, row: Row) -> str:
        """Return the cell: mean, and ± spread where there are several seeds that differ."""
        figure = self.spread(row)
        if figure is None:
            return "-"
        if not figure.spread:
            return self.form(figure.mean)
        return f"{self.form(figure.mean)} ± {self.form(figure.spread)}"


def _column(title: str, figure: str, form: Callable[[float], str], note: str = "") -> Column:
    return Column(title, note, lambda row: row.figures[figure], form)


SCORES = (
    _column("perplexity", "perplexity", "{:.4f}".format, "of the deployed model on held-out rows"),
    Column(
        f"/ {YARDSTICK}",
        f"perplexity over {YARDSTICK}'s of the same seed",
        lambda row: row.ratio,
        "{:.4f}".format,
    ),
    _column("trained", "trained_perplexity", "{:.4f}".format, "perplexity before deploying"),
    _column("exact", "exact_match", "{:.1%}".format, "continuations equal to the reference"),
    _column("BLEU", "bleu", "{:.2f}".format, "0 to 100"),
    _column("ROUGE-L", "rouge_l", "{:.3f}".format, "F1, 0 to 1"),
    _column("attributes", "coverage", "{:.1%}".format, "of the prompt, found word for word"),
    _column("MiB", "file_bytes", lambda size: f"{size / MIB:,.2f}", "of deployed weights"),
    _column("bits/weight", "bits_per_weight", "{:.3f}".format, "of the quantised layers"),
)
"""The columns of what the deployed models score and weigh."""
COSTS = (
    _column("training s", "training_seconds", "{:,.1f}".format, "the whole run, evaluations too"),
    _column(
        "peak MiB",
        "peak_memory_bytes",
        lambda size: f"{size / MIB:,.0f}",
        "of the process in training",
    ),
    _column("trained parameters", "trained_parameters", "{:,.0f}".format),
    _column("learning rate", "learning_rate", "{:.3g}".format, "at its peak"),
)
"""The columns of what their trainings cost; contenders that deploy one run share them."""


def with_figures(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Return the columns in which some row has a figure."""
    return [column for column in columns if any(column.spread(row) for row in rows)]


def training_rows(results: Sequence[Result]) -> list[Row]:
    """Return one row per training, named as its contender, over its seeds."""
    once = {result.run: result for result in results if result.run is not None}
    return summarise(
        [
            # +SOLVER and its width come after the training.
            replace(result, contender=trained, bits=None if solver else result.bits)
            for result in once.values()
            for trained, _, solver in [result.contender.partition("+")]
        ]
    )
