"""The one exception that graft raises for problems that the user can mend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class GraftError(Exception):
    """A problem in the user's input or environment, told so that it can be mended.

    The message says where, what was found, what was expected and how to fix it.
    The command line prints it without a traceback and exits with status 1.
    """


def raise_problems(problems: Sequence[str], heading: str) -> None:
    """Raise one GraftError that lists every problem, or return when there is none.

    Collect first and raise once, before the expensive work starts.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise GraftError(f"{heading}: {problems[0]}")
    # One that is several itself stands one step further in.
    lines = "\n".join("  - " + problem.replace("\n", "\n  ") for problem in problems)
    raise GraftError(f"{heading}: {len(problems)} problems\n{lines}")


class Problems:
    """Collects the GraftErrors of several checks, to raise them as one."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Take a GraftError that the block raises, and go on after it."""
        try:
            yield
        except GraftError as error:
            # Two checks of one file may both meet its fault.
            if str(error) not in self.found:
                self.found.append(str(error))

    def raise_all(self, heading: str) -> None:
        """Raise what was collected as one GraftError, or return when there was nothing."""
        if len(self.found) == 1:
            raise GraftError(self.found[0])
        raise_problems(self.found, heading)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean X?' for the nearest known name, else the list of known names."""
    known = sorted(known)
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else f"; known: {', '.join(known)}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like a name, whatever its case; None where none is."""
    import difflib  # here, as every start of graft reads this file, and few ask for a near name

    names = {one.lower(): one for one in sorted(known)}
    return next((names[one] for one in difflib.get_close_matches(name.lower(), names, n=1)), None)
