"""Loading: from a configuration to encoded training and held-out data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graft.data.config import DataConfig
from graft.data.encode import EncodedData, check_tokenizer
from graft.data.mixing import weighted
from graft.data.overlap import overlap, without_duplicates
from graft.data.shapes.base import Holds, Tokenizer
from graft.data.sources.places import weights_of
from graft.data.split import held_out_examples
from graft.data.storage.bulk import Listener, encoded_file
from graft.data.storage.store import Chosen
from graft.errors import GraftError

_DEFAULT_MAX_LENGTH = 1024


def resolve_max_length(config: DataConfig, model_limit: int | None) -> int:
    """Return the most tokens of a row: --max-length, or the model's limit up to 1024.

    Raises GraftError when --max-length is below 2 or above the model's limit.
    """
    if config.stride is not None and config.stride < 1:
        raise GraftError(f"--stride {config.stride}: expected at least 1 token")
    if config.max_length is None:
        return min(_DEFAULT_MAX_LENGTH, model_limit or _DEFAULT_MAX_LENGTH)
    if config.max_length < 2:
        raise GraftError(
            f"--max-length {config.max_length}: expected at least 2, a token and its successor"
        )
    if model_limit is not None and config.max_length > model_limit:
        raise GraftError(
            f"--max-length {config.max_length}: the model's limit is {model_limit} positions; "
            f"give at most {model_limit}"
        )
    return config.max_length


def load_examples(
    path: str,
    tokenizer: Tokenizer,
    config: DataConfig,
    max_length: int,
    listener: Listener | None = None,
    holds: tuple[Holds, ...] = ("answers",),
) -> EncodedData:
    """Read, check and encode one file; holds: what there is to learn from its rows.

    Raises GraftError that lists every bad row with file and line.
    """
    check_tokenizer(tokenizer, config.eos)
    return encoded_file(path, tokenizer, config, max_length, listener, holds)


def load_train_and_eval(
    config: DataConfig,
    tokenizer: Tokenizer,
    model_limit: int | None,
    seed: int,
    listener: Listener | None = None,
    holds: tuple[Holds, ...] = ("answers",),
) -> tuple[EncodedData, EncodedData]:
    """Return training and held-out data; the split depends on the seed and row count alone.

    Raises GraftError for bad rows of both files at once, for fewer than two rows to split, and
    when an end-of-sequence token is asked for but none is left to train.
    """
    max_length = resolve_max_length(config, model_limit)
    check_tokenizer(tokenizer, config.eos)
    if config.eval_data is None:
        if not 0 < config.eval_fraction < 1:
            raise GraftError(f"--eval-fraction {config.eval_fraction}: expected between 0 and 1")
        data = encoded_file(config.data, tokenizer, config, max_length, listener, holds)
        train, held_out = _split(data, config, seed)
    else:
        found, problems = [], []
        for path in (config.data, config.eval_data):
            try:
                found.append(encoded_file(path, tokenizer, config, max_length, listener, holds))
            except GraftError as error:
                problems.append(str(error))
        if problems:
            raise GraftError("\n".join(problems))
        train, held_out = found
    if config.deduplicate:
        train = _deduplicated(train, held_out, config)
    train = replace(train, overlap=overlap(train.facts, held_out.facts))
    if weights := weights_of(config.data):
        train = replace(train, examples=weighted(train.examples, weights, seed))
    if config.eos and train.eos_rows == 0:
        raise GraftError(
            f"{config.data}: the end-of-sequence token is never trained, because all rows are "
            f"cut at {max_length} tokens, so the model would not learn to stop; raise "
            "--max-length, or pass --no-eos"
        )
    return train, held_out


def _split(data: EncodedData, config: DataConfig, seed: int) -> tuple[EncodedData, EncodedData]:
    windows = data.facts.windows
    chosen = held_out_examples(windows, config.eval_fraction, seed)
    if not chosen:
        raise GraftError(
            f"{config.data}: {len(windows)} row, so none can be held out for evaluation; "
            "give at least 2 rows, or --eval-data"
        )
    held_out = np.array(sorted(chosen))
    train = np.delete(np.arange(len(windows)), held_out)
    # Remarks are of the whole file, and said once.
    return (
        replace(data, examples=Chosen([data.examples], train)),
        replace(data, examples=Chosen([data.examples], held_out), remarks={}),
    )


def _deduplicated(train: EncodedData, held_out: EncodedData, config: DataConfig) -> EncodedData:
    """Leave out of training what is there twice, or held out."""
    kept = without_duplicates(train.facts, held_out.facts)
    if not len(kept):
        raise GraftError(
            f"{config.data}: --deduplicate leaves no row to train on, as all of them are held out "
            "too; give other held-out rows with --eval-data"
        )
    left = replace(train, examples=Chosen([train.examples], kept))
    return replace(left, dropped_rows=train.row_count - left.row_count)
