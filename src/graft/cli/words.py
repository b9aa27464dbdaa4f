"""From the words of a command line to the texts of each flag; what is no flag is told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from graft.api.other_names import Answer, answer, canonical, refused_value, values_here
from graft.cli.fields import YES_OR_NO, Flag
from graft.errors import nearest
from graft.text import quoted

_FLAG = re.compile(r"(--?[A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
_OTHER_DASH = re.compile(r"[\u2010-\u2015\u2212]+([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
"""What a word processor makes of two hyphens."""
_DATA = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".gz")
_CONFIGURATION = (".yaml", ".yml")


@dataclass
class Given:
    """What the words gave: the texts of each flag by its field's name, and what was wrong."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    """Those of a flag of yes or no are 'true' or 'false'."""
    understood: dict[str, str] = field(default_factory=dict)
    """Names of other tools, as they were typed, and the flag that each is here."""
    problems: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    """Flags that a problem speaks of already, so that they are not told to be missing as well."""


def option(name: str) -> str:
    """Return a field's name as a flag is typed."""
    return "--" + name.replace("_", "-")


def split(words: Sequence[str], flags: Sequence[Flag]) -> Given:
    """Sort the words by flag: --flag VALUE, --flag=VALUE, --yes-or-no, --no-yes-or-no.

    A flag that takes several values takes all up to the next flag, and one that is given again
    adds to them; of any other the last value counts. Behind `--` every word stands by its place.
    """
    splitter = _Splitter(flags)
    splitter.read(list(words))
    return splitter.given


class _Splitter:
    def __init__(self, flags: Sequence[Flag]) -> None:
        self.given = Given()
        self._flags = {flag.name: flag for flag in flags if not flag.positional}
        self._places = [flag for flag in flags if flag.positional]
        self._by_place: list[tuple[str, str]] = []
        """Words that stand by themselves, each with the flag and value before it."""
        self._names: dict[str, str] = {}
        """As what each flag was typed."""

    def read(self, words: list[str]) -> None:
        before, swallowed = "", False
        while words:
            word = words.pop(0)
            if word == "--":
                self._by_place += [(one, before) for one in words]
                break
            found = self._split_flag(word)
            if found is None:
                self._by_place.append((word, before))
                continue
            typed, value = found
            flag, yes, answered = self._find(typed)
            behind: list[str] = []
            while words and value is None and self._takes(flag, behind, words[0]):
                behind.append(words.pop(0))
            values = behind if value is None else [value]
            if flag is None:
                swallowed = swallowed or bool(behind)
                self._refuse(typed, answered)
            else:
                self._take(flag, typed, values, yes, foreign=answered is not None)
            before = " ".join([typed, *values[:1]])
        self._fill_places(swallowed)

    def _split_flag(self, word: str) -> tuple[str, str | None] | None:
        """Return a flag as it is typed, and its value behind an equals sign; None for no flag."""
        if found := _FLAG.fullmatch(word):
            return found[1], found[2]
        if (found := _OTHER_DASH.fullmatch(word)) and canonical(found[1]) in self._flags:
            return option(found[1]), found[2]
        return None

    def _find(self, typed: str) -> tuple[Flag | None, bool, Answer | None]:
        """Return the flag of that name, whether it says yes, and what it is in other tools."""
        name = canonical(typed.lstrip("-"))
        if typed.startswith("--"):
            if name in self._flags:
                return self._flags[name], True, None
            denied = self._flags.get(name.removeprefix("no_"))
            if denied is not None and denied.kind.is_switch:
                return denied, False, None
        answered = answer(name, self._flags)
        ours = None if answered is None or answered.ours is None else self._flags[answered.ours]
        return ours, True, answered

    def _takes(self, flag: Flag | None, behind: Sequence[str], word: str) -> bool:
        """Return whether a word that follows a flag, and some of its values, is a value of it."""
        if word == "--" or self._split_flag(word) is not None:
            return False
        if flag is None or flag.kind.many:
            return True
        return not behind and (not flag.kind.is_switch or word.lower() in YES_OR_NO)

    def _refuse(self, typed: str, answered: Answer | None) -> None:
        if answered is not None:
            self.given.problems.append(f"{typed}: {answered.advice}")
            return
        name = canonical(typed.lstrip("-"))
        if any(place.name == name for place in self._places):
            self.given.asked.add(name)
            said = f"{typed}: give {name.upper()} by itself, without a flag"
            self.given.problems.append(said)
            return
        near = nearest(name, self._flags)
        hint = f"; did you mean {option(near)}?" if near else ""
        self.given.problems.append(f"unknown flag {typed}{hint}")

    def _take(self, flag: Flag, typed: str, values: list[str], yes: bool, *, foreign: bool) -> None:
        ours = option(flag.name)
        if foreign:
            self.given.understood[typed] = ours
            values = values_here(typed, flag.name, values)
            if (instead := refused_value(flag.name, values)) is not None:
                self.given.problems.append(f"{typed} {values[0]}: {instead}")
                return
        if (name := self._names.setdefault(flag.name, typed)) != typed and (
            canonical(name) != canonical(typed)
        ):
            self.given.problems.append(f"{name} and {typed} are the same setting; give one of them")
            return
        if flag.kind.is_switch:
            said = YES_OR_NO.get(values[0].lower()) if values else True
            if said is None:
                self.given.problems.append(f"{typed}={quoted(values[0])}: expected true or false")
                return
            self.given.texts[flag.name] = ["true" if said is yes else "false"]
        elif not values and not flag.kind.many:
            self.given.asked.add(flag.name)
            self.given.problems.append(
                f"{typed}: its value is missing; expected {flag.kind.expected} "
                f"(one that begins with a hyphen is given as {ours}=VALUE)"
            )
        else:
            earlier = self.given.texts.get(flag.name, []) if flag.kind.many else []
            self.given.texts[flag.name] = earlier + values

    def _fill_places(self, swallowed: bool) -> None:
        """Give the words that stand by themselves their places, and tell of those without one."""
        words = list(self._by_place)
        for flag in self._places:
            taken = words if not flag.required else words[:1]
            words = words[len(taken) :]
            if taken:
                self.given.texts[flag.name] = [word for word, _ in taken]
            elif flag.required and swallowed:  # an unknown flag has taken what may be it
                self.given.asked.add(flag.name)
        self.given.problems += [self._stray(word, before) for word, before in words]

    def _stray(self, word: str, before: str) -> str:
        """Return what was probably meant by a word without a place."""
        shown = quoted(word)
        name, equals, value = word.partition("=")
        if equals and self._known(name):
            self.given.asked.add(canonical(name))
            return f"{shown} is no flag; did you mean {option(canonical(name))} {value}?"
        if self._known(word):
            return f"{shown} is no flag; did you mean {option(canonical(word))}?"
        flag = self._find(before.partition(" ")[0])[0] if before else None
        if word.endswith(_CONFIGURATION):
            guess = "; a configuration file stands before every flag"
        elif flag is not None and " " in before and not flag.kind.is_switch:
            guess = f"; {option(flag.name)} takes one value (quote one that has spaces)"
        else:
            guess = self._guess(word)
            if not guess and flag is not None and flag.kind.is_switch:
                guess = f"; {option(flag.name)} takes true or false, or stands alone"
        return f"{shown} is no flag{guess or '; flags begin with --'}"

    def _known(self, name: str) -> bool:
        return canonical(name) in self._flags or (
            (found := answer(name, self._flags)) is not None and found.ours is not None
        )

    def _guess(self, word: str) -> str:
        """Return which flag a word may have been meant for by what it is on the disk."""
        unsaid = [name for name in ("data", "model") if name in self._flags]
        if word.lower().endswith(_DATA) and "data" in unsaid:
            self.given.asked.add("data")
            return f"; did you mean --data {word}?"
        looks = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", word) is not None or Path(word[:200]).is_dir()
        if looks and "model" in unsaid and "model" not in self.given.texts:
            self.given.asked.add("model")
            return f"; did you mean --model {word}?"
        near = nearest(canonical(word), self._flags)
        return f"; did you mean {option(near)}?" if near else ""
