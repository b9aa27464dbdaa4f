"""A model as another program computes it, one text at a time, and what such programs share.

Each target's `runtime.py` is the only place that imports its runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from graft.errors import GraftError
from graft.model.folder import read_tokenizer


class ItsTokenizer(NamedTuple):
    """A tokenizer that a program cuts texts with, for a file."""

    name: str
    encode: Callable[[str], Sequence[int]]
    """Text -> ids."""
    special: bool = True
    """It puts special tokens around a text, where the model's own does."""
    bound: bool = True
    """`verify` fails where it cuts a text otherwise; False for a program beside the runtime."""


class Runtime(Protocol):
    """A model as its runtime computes it."""

    @property
    def program(self) -> str:
        """The program, its version and what it computes in, in words."""

    @property
    def tokenizers(self) -> tuple[ItsTokenizer, ...]:
        """What cuts texts for it."""

    @property
    def untried(self) -> tuple[str, ...]:
        """What of it `verify` cannot compare here, or does not, in words."""

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return float32 [tokens, vocabulary] of a text."""

    @property
    def chat_template(self) -> str | None:
        """The template that the file carries."""

    @property
    def stop_ids(self) -> set[int]:
        """The tokens that end an answer."""


@contextmanager
def loading(path: Path, module: str, *errors: type[Exception]) -> Iterator[None]:
    """Say of a file that its runtime refuses, with one of these errors, that it does not load."""
    try:
        yield
    except errors as error:
        raise GraftError(f"{path}: {module} does not load it: {error}") from error


class FolderRuntime:
    """What the folders have in common: a tokenizer that Transformers reads."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = read_tokenizer(path)

    @property
    def program(self) -> str:
        """See `Runtime`."""
        return type(self).__name__

    @property
    def tokenizers(self) -> tuple[ItsTokenizer, ...]:
        """See `Runtime`."""
        return (ItsTokenizer("Transformers, from the folder", self._ids),)

    @property
    def untried(self) -> tuple[str, ...]:
        """See `Runtime`."""
        return ()

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    @property
    def chat_template(self) -> str | None:
        """See `Runtime`."""
        return self._tokenizer.chat_template

    @property
    def stop_ids(self) -> set[int]:
        """See `Runtime`."""
        return {self._tokenizer.eos_token_id} - {None}


def inputs(ids: Sequence[int]) -> dict[str, Any]:
    """Return the inputs of a graph of `decoder_graph` for a text from its beginning."""
    return {
        "input_ids": np.array([list(ids)], np.int64),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
    }
