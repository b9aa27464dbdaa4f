"""What makes the keys of a shape of a row that has other ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from os.path import commonprefix
from typing import Any

from graft.data.shapes.turns import as_messages, is_table, untrained, with_system
from graft.errors import GraftError

Fields = Mapping[str, Any]
Conversion = Callable[[Fields], Fields]
"""Raises GraftError for a row whose values do not make one."""
Test = Callable[[Fields], bool]

Side = tuple[str, str]
CHOSEN: Side = ("chosen", "rejected")
REJECTED: Side = ("rejected", "chosen")
"""Which of two answers is taken, and which is the other."""

LEFT_OUT: Fields = {"": "left out"}
"""What a row becomes that is not to be trained on."""
SYSTEM = ("system", "system_prompt")
"""Keys of a text for the system, beside a conversation."""
FOR_TEMPLATES = ("tools", "functions", "chat_template_kwargs")
"""Keys beside a conversation that are handed on as they are."""


def renamed(**columns: str) -> Conversion:
    """Return what takes each key from a column."""
    return lambda row: {key: row[column] for key, column in columns.items()}


def instruction(task: str, given: tuple[str, ...], answer: str) -> Conversion:
    """Return what makes an instruction; its input is the first of some columns that is there."""
    return lambda row: {
        "instruction": row[task],
        "input": _first(row, given),
        "output": row[answer],
    }


def turns(key: str) -> Conversion:
    """Return what makes messages of a conversation of any kind."""
    return lambda row: _conversation(as_messages(row[key]), row)


def exchange(asked: str, answer: str, given: tuple[str, ...] = ()) -> Conversion:
    """Return what makes messages of one exchange, with a system or a history of others before."""

    def convert(row: Fields) -> Fields:
        before = _history(row.get("history"))
        said = [text for text in (row[asked], _first(row, given)) if text != ""]
        texts = all(isinstance(text, str) for text in said)
        messages = as_messages([*before, "\n".join(said) if texts else row[asked], row[answer]])
        return _conversation(messages, row)

    return convert


def joined(asked: str, answer: str) -> Conversion:
    """Return what joins a prompt and its answer, each a text or messages; the answer is trained."""

    def convert(row: Fields) -> Fields:
        before, after = _spoken(row[asked], "user"), _spoken(row[answer], "assistant")
        if not isinstance(before, list) or not isinstance(after, list):
            return {"messages": after if isinstance(before, list) else before}
        return _conversation(untrained([*before, *after], len(before)), row)

    return convert


def preferred(asked: str, side: Side = CHOSEN) -> Conversion:
    """Return what joins a prompt and one of two answers, or takes a whole one."""
    join, whole = joined(asked, side[0]), preferred_whole(side)

    def convert(row: Fields) -> Fields:
        answer = _spoken(row[side[0]], "assistant")
        first = answer[0] if isinstance(answer, list) and answer else None
        is_answer = isinstance(first, Mapping) and first.get("role") == "assistant"
        return join(row) if is_answer else whole(row)

    return convert


def preferred_whole(side: Side = CHOSEN) -> Conversion:
    """Return what takes one of two conversations, trained from where they part."""

    def convert(row: Fields) -> Fields:
        taken, left = as_messages(row[side[0]]), as_messages(row[side[1]])
        if not isinstance(taken, list):
            return {"messages": taken}
        shared = 0
        for one, other in zip(taken, left if isinstance(left, list) else (), strict=False):
            if one != other:
                break
            shared += 1
        if taken and shared == len(taken):
            raise GraftError(f"{side[0]!r} has nothing that {side[1]!r} has not; remove the row")
        return _conversation(untrained(taken, shared), row)

    return convert


def preferred_transcript(side: Side = CHOSEN) -> Conversion:
    """Return what takes one of two texts in which Human and Assistant speak in turn."""
    whole = preferred_whole(side)
    return lambda row: whole({key: _speakers(row[key]) for key in side})


def paired(chosen: Conversion, rejected: Conversion) -> Conversion:
    """Return what makes a pair of two rows: the chosen one, and the other under its key."""
    return lambda row: {**chosen(row), "rejected": rejected(row)}


def parted(row: Fields) -> Fields:
    """Return two texts as a pair of answers to what both begin with, up to white space."""
    chosen, rejected = row["chosen"], row["rejected"]
    shared = commonprefix([chosen, rejected])
    end = max((place.end() for place in re.finditer(r"\s", shared)), default=0)
    return {
        "prompt": shared[:end],
        "completion": chosen[end:],
        "rejected": {"prompt": shared[:end], "completion": rejected[end:]},
    }


def are_texts(row: Fields) -> bool:
    """Return whether two answers are texts."""
    return isinstance(row["chosen"], str) and isinstance(row["rejected"], str)


def labelled(key: str, conversion: Conversion | None) -> Conversion:
    """Return a conversion of rows that say whether their answer is a wanted one, which is kept."""

    def convert(row: Fields) -> Fields:
        found = row if conversion is None else conversion(row)
        return {**found, "label": str(row[key]).lower() == "true"}

    return convert


def wanted(key: str, conversion: Conversion | None) -> Conversion:
    """Return a conversion of rows that say whether their answer is a wanted one."""

    def convert(row: Fields) -> Fields:
        if str(row[key]).lower() == "false":
            return LEFT_OUT
        return row if conversion is None else conversion(row)

    return convert


def can_talk(kind: str) -> bool:
    """Return whether rows of another shape are questions and answers, which messages can hold."""
    return kind in _EXCHANGES


def as_conversation(kind: str, fields: Fields) -> Fields | None:
    """Return a row of another shape as messages, or None where it is no question and answer."""
    return _EXCHANGES[kind](fields) if kind in _EXCHANGES else None


def is_list(key: str) -> Test:
    """Return whether a value is a list or a table of turns, or a text that may be JSON of one."""

    def fits(row: Fields) -> bool:
        value = row[key]
        if isinstance(value, str):
            return value.lstrip()[:1] == "["
        return isinstance(value, list) or is_table(value)

    return fits


def is_spoken(*keys: str) -> Test:
    """Return whether one of some values is a list of messages, or a message; texts are none."""

    def speaks(value: object) -> bool:
        if isinstance(value, list):
            return not all(isinstance(one, str) for one in value)
        return isinstance(value, dict)

    return lambda row: any(speaks(row[key]) for key in keys)


def is_answer_to(key: str) -> Test:
    """Return whether a value is a list of messages, and the chosen one no such list itself."""
    return lambda row: isinstance(row[key], list) and not isinstance(row["chosen"], list)


def is_transcript(row: Fields) -> bool:
    """Return whether two answers are transcripts, which begin with what a human says."""
    texts = row["chosen"], row["rejected"]
    return all(isinstance(one, str) and one.startswith("\n\nHuman:") for one in texts)


def is_truth(key: str, test: Test | None) -> Test:
    """Return whether a value is true or false, beside another test."""
    return lambda row: str(row[key]).lower() in ("true", "false") and (test is None or test(row))


def _first(row: Fields, keys: Iterable[str]) -> Any:
    """Return the first of a row's values that says something, or ''."""
    return next((row[key] for key in keys if row.get(key) not in (None, "")), "")


def _history(pairs: Any) -> list[Any]:
    """Return the texts of earlier exchanges; raises GraftError where they are not pairs."""
    if pairs in (None, "", "[]"):
        return []
    if not isinstance(pairs, list) or any(
        not isinstance(one, list) or len(one) != 2 for one in pairs
    ):
        raise GraftError("'history' is no list of pairs of a question and its answer")
    return [text for pair in pairs for text in pair]


def _conversation(messages: Any, row: Fields) -> Fields:
    found = {"messages": with_system(messages, _first(row, SYSTEM))}
    for key in FOR_TEMPLATES:
        if row.get(key) is not None:
            found[key] = row[key]
    return found


def _spoken(value: Any, role: str) -> Any:
    """Return messages, or a text as the message of a role."""
    return [{"role": role, "content": value}] if isinstance(value, str) else as_messages(value)


def _speakers(transcript: str) -> list[dict[str, str]]:
    roles = {"Human": "user", "Assistant": "assistant"}
    found: list[dict[str, str]] = []
    for part in transcript.removeprefix("\n\n").split("\n\n"):
        name, _, text = part.partition(":")
        if name in roles:
            found.append({"role": roles[name], "content": text.strip()})
        else:  # a paragraph of what is said
            found[-1]["content"] += "\n\n" + part
    return found


_EXCHANGES = {
    "prompt": exchange("prompt", "completion"),
    "instruction": exchange("instruction", "output", ("input",)),
}
"""How rows of other shapes are said as messages."""
