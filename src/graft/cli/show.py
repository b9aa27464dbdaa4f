"""Text on its way out: nothing in it acts on a terminal, whoever wrote it.

Everything that a command prints goes through here or `progress.py` and `tables.py`, which draw.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from graft.errors import GraftError
from graft.text import printable


def show(text: str = "", *, error: bool = False) -> None:
    """Print a text and a newline on stdout, or stderr; see `printable`."""
    if error:
        try:
            print(printable(text), file=sys.stderr, flush=True)
        except OSError:  # there is nowhere left to tell it
            discard(sys.stderr)
    else:
        _write(printable(text) + "\n")


def show_json(value: object, indent: int | None = 2) -> None:
    """Print a value as JSON, in ASCII."""
    _write(json.dumps(value, indent=indent).replace("\x7f", "\\u007f") + "\n")


def show_answer(text: str) -> None:
    """Print a piece of a model's text as it comes: as `show` on a terminal, else to the letter."""
    _write(printable(text) if sys.stdout.isatty() else text)
    flush()


def flush() -> None:
    """Hand on what was printed; raises GraftError where it cannot be written."""
    with _telling():
        sys.stdout.flush()


def discard(stream: TextIO) -> None:
    """Write no more to a stream, not even at Python's own end, which would tell of it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_whatever_comes() -> None:
    """Let stdout and stderr spell what their encoding has not, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _write(text: str) -> None:
    with _telling():
        sys.stdout.write(text)


@contextmanager
def _telling() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # whoever read has gone, as `head` does, and wants no message
        raise
    except OSError as error:
        raise GraftError(f"the output cannot be written: {error.strerror}") from error
