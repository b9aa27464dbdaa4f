"""Text that comes from data, made harmless where it is shown: messages, terminal, Markdown."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from itertools import islice

_QUOTE = reprlib.Repr()
_QUOTE.maxdict = _QUOTE.maxlist = _QUOTE.maxtuple = _QUOTE.maxset = 6
_QUOTE.maxlevel = 3

_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a terminal's cursor, changes its colours or the direction of its text, or has no
UTF-8; a newline and a tab are left."""

_MARKS = re.compile(
    r"([\\`*_{}\[\]<>#|~!&$@]|^[-+=](?=[-=\s]|$)|(?:(?<=^\d)|(?<=^\d\d))[.)](?=\s)"
    r"|:(?=//)|(?<=\bwww)\.)"
)
"""What Markdown and GitHub's extensions of it take for more than text."""


def quoted(value: object, limit: int = 100) -> str:
    """Return a value as a message quotes it: as Python writes it, at most about `limit` characters.

    Nothing in it acts on a terminal, and a large value costs no more than a small one.
    """
    _QUOTE.maxstring = _QUOTE.maxother = _QUOTE.maxlong = limit
    text = _QUOTE.repr(value)
    return text if len(text) <= limit + 20 else f"{text[:limit]}..."


def listed(names: Iterable[object], most: int = 10) -> str:
    """Return names with commas between them, the first few, each cut and made printable."""
    rest = iter(names)
    found = [printable(str(name)[:100]) for name in islice(rest, most)]
    more = sum(1 for _ in rest)
    return (", ".join(found) or "none") + (f" and {more:,} more" if more else "")


def printable(text: str) -> str:
    r"""Return a text in which every character that would act on a terminal is spelt, as in \x1b."""
    return _ACTS.sub(lambda found: ascii(found[0])[1:-1], text)


def reason(error: BaseException, limit: int = 300) -> str:
    """Return what an exception of another library says, as one harmless line, or else its kind."""
    text = " ".join(printable(str(error)[: 10 * limit]).split())
    return (text if len(text) <= limit else f"{text[:limit]}...") or type(error).__name__


def shown(message: str, limit: int = 2000) -> str:
    """Return a message as a terminal may show it: nothing in it acts, and it fits on a page.

    Of one that is too long each line keeps its beginning and its end, where the remedy is, and
    the last lines are counted instead.
    """
    lines = message.splitlines() if len(message) > limit else [message]
    if len(lines) > 1 or len(message) > limit:
        lines = [one if len(one) <= 400 else f"{one[:250]} ... {one[-140:]}" for one in lines]
    kept: list[str] = []
    room = limit - 40
    for line in lines:
        room -= len(line) + 1
        if room < 0 and len(lines) > 1:
            kept.append(f"  ... and {len(lines) - len(kept)} more lines")
            break
        kept.append(line)
    return printable("\n".join(kept))


def markdown(text: str) -> str:
    """Return a text that Markdown shows as it is, in one line: no link, image, HTML or table."""
    return _MARKS.sub(r"\\\1", " ".join(printable(text).split()))
