"""Regular expressions from anywhere, matched within bounds.

A pattern of a few characters can take `re` years (backtracking) or all memory (repeats of nothing).
Whatever is more than a name with dots is therefore matched in a process of its own, which the
system ends at its share of time and memory: 0.05 s for all patterns and names together.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

from graft.apart import start_apart
from graft.files.bounds import VARIABLE, bound

PATTERN_SECONDS = 4
"""Most processor time for the patterns of one call."""
PATTERN_BYTES = 512 * 2**20
"""Most memory for it."""
PATTERN_LENGTH = 10_000
"""Most characters of a pattern."""

_DIRECT = 100_000
"""Plain patterns times names that are matched at once, which takes a tenth of a second."""

_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)*\$?")
"""What cannot go back and try again: letters, digits, and dots, which match any character."""


class Matched(NamedTuple):
    """What a pattern matches: names in the order in which they were given, or why it cannot."""

    names: list[str]
    problem: str | None


def match_names(
    patterns: Sequence[str], names: Sequence[str], *, suffixes: bool = False
) -> list[Matched]:
    """Return, for each regular expression, the names that it matches as a whole.

    suffixes: whether it may also match the last parts of a name, parts being what dots separate,
    as in PEFT's `rank_pattern` and `alpha_pattern`.
    Raises GraftError when no process can be started to match them in.
    """
    found: list[Matched] = []
    hard: list[int] = []
    few = len(patterns) * len(names) <= _DIRECT
    for number, pattern in enumerate(patterns):
        full = rf"(.*\.)?({pattern})" if suffixes else pattern
        if len(pattern) > bound(PATTERN_LENGTH):
            problem = f"has {len(pattern):,} characters; at most {bound(PATTERN_LENGTH):,} are read"
            found.append(Matched([], problem))
        elif few and _PLAIN.fullmatch(pattern):
            matches = re.compile(full).fullmatch
            found.append(Matched([name for name in names if matches(name)], None))
        else:
            found.append(Matched([], full))
            hard.append(number)
    if hard:
        results = _matched_apart([str(found[number].problem) for number in hard], names)
        for number, result in zip(hard, results, strict=True):
            found[number] = result
    return found


def _matched_apart(patterns: list[str], names: Sequence[str]) -> list[Matched]:
    """Match patterns in a process of its own."""
    seconds = max(bound(PATTERN_SECONDS), 1)
    process = start_apart(_match, seconds=seconds, memory=bound(PATTERN_BYTES))
    lines, _ = process.communicate(json.dumps([patterns, list(names)]).encode())
    results: list[Matched] = []
    for line in lines.splitlines():
        found = json.loads(line)
        if isinstance(found, str):
            results.append(Matched([], f"is no valid regular expression: {found}"))
        else:
            results.append(Matched([names[number] for number in found], None))
    if len(results) < len(patterns):
        problem = (
            f"takes more than {seconds} s or {bound(PATTERN_BYTES) >> 20} MiB to match; write it "
            f"without repeats inside repeats, or set {VARIABLE}=10"
        )
        results.append(Matched([], problem))
        problem = "was not tried, as the one before it takes too long"
        results += [Matched([], problem)] * (len(patterns) - len(results))
    return results


def _match() -> None:
    """Match the patterns that stdin has with its names: a line of stdout for each."""
    patterns, names = json.load(sys.stdin)
    for pattern in patterns:
        found: list[int] | str
        try:
            matches = re.compile(pattern).fullmatch
            found = [number for number, name in enumerate(names) if matches(name)]
        except (re.error, OverflowError, RecursionError) as error:
            found = str(error)[:200] or type(error).__name__
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
