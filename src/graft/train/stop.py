"""Asking a training to end early, at a moment from which it can go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class AbandonedError(Exception):
    """A piece of work is given up halfway; all of it can be done again. It never leaves `train`."""


class StoppedError(Exception):
    """A training ended early because it was asked to; the message says where, and how to go on."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step
        """Steps that are done, and that --resume goes on from."""


class Stop:
    """A wish to end a training, made by a signal handler or another thread.

    The training heeds it between two batches: it writes a checkpoint and raises `StoppedError`.
    """

    def __init__(self) -> None:
        self.asked = False
        self.heeded = False
        """Whether a training is where it would heed it; before and after that it is not looked at,
        and whoever asks had better end the work by an exception."""

    def ask(self) -> None:
        """Make the wish."""
        self.asked = True

    def check(self) -> None:
        """Raise AbandonedError when it was asked for."""
        if self.asked:
            raise AbandonedError

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """Say that it is heeded while the block runs."""
        self.heeded = True
        try:
            yield
        finally:
            self.heeded = False
