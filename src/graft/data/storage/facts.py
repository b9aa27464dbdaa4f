"""What is asked of all examples at once, in a few numbers for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graft.data.examples import Example


@dataclass(frozen=True)
class Facts:
    """Columns of numbers, one for each example."""

    lengths: NDArray[np.int32]
    """Tokens."""
    targets: NDArray[np.int32]
    """Tokens that are trained."""
    prompts: NDArray[np.int32]
    """Tokens before the first that is trained."""
    largest: NDArray[np.int32]
    """The largest token id."""
    lost: NDArray[np.int32]
    """Tokens of its row that a cut took away."""
    windows: NDArray[np.int32]
    """Which of its row's windows it is."""
    cut: NDArray[np.bool_]
    """Whether it is shorter than its row."""
    trains_eos: NDArray[np.bool_]
    """Whether an end-of-sequence token is trained."""
    row_keys: NDArray[np.uint64]
    """See `Keys`."""
    prompt_keys: NDArray[np.uint64]

    def of(self, numbers: NDArray[np.int64]) -> Facts:
        """Return the facts of some of the examples."""
        return Facts(**{name: column[numbers] for name, column in self.columns().items()})

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def joined(parts: Sequence[Facts]) -> Facts:
    """Return the facts of several sequences of examples, one after the other."""
    if len(parts) == 1:
        return parts[0]
    columns = [part.columns() for part in parts]
    return Facts(**{name: np.concatenate([one[name] for one in columns]) for name in columns[0]})


@dataclass(frozen=True)
class Columns:
    """Examples as columns: `ends` cut the token ids, `run_ends` the runs, at each example."""

    ids: NDArray[np.int32]
    ends: NDArray[np.int32]
    runs: NDArray[np.int32]
    """Begin and end of each run of trained tokens, counted from the example's own beginning."""
    run_ends: NDArray[np.int32]
    facts: Facts


def columns_of(examples: Sequence[Example]) -> Columns:
    """Return examples as columns."""
    count = len(examples)
    lengths = np.fromiter((len(one.input_ids) for one in examples), np.int32, count)
    tokens = np.fromiter(chain.from_iterable(one.input_ids for one in examples), np.int32)
    flags = b"".join(bytes(one.targets) for one in examples)
    trained = np.frombuffer(flags, np.bool_) if flags else np.zeros(0, np.bool_)
    ends = _ends(lengths)
    starts, stops = ends[:-1], ends[1:]
    # A run ends with its example, though the next example may go on with trained tokens.
    firsts = trained.copy()
    firsts[1:] &= ~trained[:-1]
    firsts[starts[lengths > 0]] = trained[starts[lengths > 0]]
    lasts = trained.copy()
    lasts[:-1] &= ~trained[1:]
    lasts[stops[lengths > 0] - 1] = trained[stops[lengths > 0] - 1]
    begins = np.flatnonzero(firsts).astype(np.int32)
    owners = np.searchsorted(stops, begins, side="right")
    runs = np.stack([begins, np.flatnonzero(lasts).astype(np.int32) + 1], axis=1)
    runs -= starts[owners, None]
    counts = np.bincount(owners, minlength=count).astype(np.int32)
    run_ends = _ends(2 * counts)
    prompts = lengths.copy()
    has_runs = counts > 0
    prompts[has_runs] = runs.reshape(-1)[run_ends[:-1][has_runs]]
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(trained, dtype=np.int64)])
    largest = np.zeros(count, np.int32)
    if len(tokens):
        filled = lengths > 0
        largest[filled] = np.maximum.reduceat(tokens, starts[filled])
    facts = Facts(
        lengths=lengths,
        targets=(sums[stops] - sums[starts]).astype(np.int32),
        prompts=prompts,
        largest=largest,
        lost=np.fromiter((one.lost for one in examples), np.int32, count),
        windows=np.fromiter((one.window for one in examples), np.int32, count),
        cut=np.fromiter((one.cut for one in examples), np.bool_, count),
        trains_eos=np.fromiter((one.trains_eos for one in examples), np.bool_, count),
        row_keys=np.fromiter((one.keys.row for one in examples), np.uint64, count),
        prompt_keys=np.fromiter((one.keys.prompt for one in examples), np.uint64, count),
    )
    return Columns(tokens, ends, runs.reshape(-1), run_ends, facts)


def _ends(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return where each of several lists begins, one behind the other, and where the last ends."""
    ends = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=ends[1:])
    return ends
