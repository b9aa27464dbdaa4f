"""Whatever another library raises on what it is given to read, as one error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from graft.errors import GraftError
from graft.text import reason

_PANICS = "pyo3_runtime"
"""The module of what a panic in Rust raises, which is no Exception."""


@contextmanager
def understood(where: object, what: str = "is not understood") -> Iterator[None]:
    """Raise GraftError for whatever another library raises on what a folder holds.

    where, what: the beginning of the message, as in 'FILE is not understood'.
    """
    try:
        yield
    except GraftError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != _PANICS:
            raise  # somebody ends the process
        raise GraftError(f"{where} {what}: {reason(error)}") from error


def tokenizing() -> AbstractContextManager[None]:
    """Raise GraftError for whatever a tokenizer raises on a text or on tokens.

    A pattern of tokenizer.json may fail, by a panic in Rust, on some texts alone.
    """
    return understood("tokenizer.json", "makes a tokenizer that fails on a text")
