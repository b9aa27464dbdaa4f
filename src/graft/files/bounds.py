"""How much a file may ask for: bounds in proportion to what it is, settable as a whole."""

from __future__ import annotations

import os
from typing import NoReturn

from graft.errors import GraftError

VARIABLE = "GRAFT_BOUNDS"
"""The environment variable that multiplies every bound; 1 where it is not set."""


def bound(number: float) -> int:
    """Return a bound times what GRAFT_BOUNDS says; raises GraftError when that is no number."""
    text = os.environ.get(VARIABLE, "1")
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < 1e9:
        raise GraftError(f"{VARIABLE} is {text[:40]!r}; expected a number above 0, such as 4")
    return int(number * factor)


def raise_beyond(where: object, found: str, most: str) -> NoReturn:
    """Raise GraftError for what is beyond a bound: where, what was found, and what is taken."""
    raise GraftError(
        f"{where}: {found}; at most {most} are taken. If that is what it should be, set "
        f"{VARIABLE}=10 for bounds ten times as wide"
    )
