"""Mutations of JSON and YAML that know their structure."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

import yaml
from fuzz_mutation import BYTES, TEXT, Expect, Mutation, Mutator, choose, odd_text, windows_lines

_RAW = "@raw:"
"""Begins a string whose rest is written as it is, where json.dumps has no way to say it."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 10**9, 10**30, 0.5, -0.0, 1e308),
    *(f"{_RAW}1e400", f"{_RAW}-1e400", f"{_RAW}NaN", f"{_RAW}Infinity", f"{_RAW}{'9' * 5000}"),
    *("", "0", "1", "none", "auto", "../../etc/passwd", "/dev/zero", "a" * 300_000),
    *(
        "\x1b[31mred\x1b[0m",
        "\ud800",
        "\0",
        "<script>alert(1)</script>",
        "{{ x }}",
        "%s%n",
        "(a+)+$",
    ),
    *([], {}, [None], [[]], [1, 2], ["a", "b"], {"a": 1}, {"": None}, [0] * 10_000),
    *(f"{_RAW}{'[' * 3000}{']' * 3000}", f"{_RAW}{'[' * 100_000}", f'{_RAW}{{"a":' * 1),
)
COUNTS = (0, -1, 1, 3, 10**3, 10**6, 10**9, 2**31, 2**63, 10**30, 1.5, True, "2", None, [2])


def paths(value: Any, start: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value, that to the whole first, at most 200 of each list."""
    found = [start]
    if isinstance(value, dict):
        for key, one in value.items():
            found += paths(one, (*start, key))
    elif isinstance(value, list):
        for place, one in enumerate(value[:200]):
            found += paths(one, (*start, place))
    return found


def pick(value: Any, rng: Random) -> tuple[Any, ...]:
    """Return a way to a value, shallow ones more often: drawn level by level."""
    way: tuple[Any, ...] = ()
    while isinstance(value, (dict, list)) and value and (not way or rng.random() < 0.7):
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        way, value = (*way, key), value[key]
    return way


def _holder(value: Any, way: tuple[Any, ...]) -> Any:
    for key in way[:-1]:
        value = value[key]
    return value


def change(value: Any, rng: Random) -> tuple[Any, str, Expect]:
    """Return a changed copy, what was done, and what must come of it."""
    value = copy.deepcopy(value)
    way = pick(value, rng)
    if not way:
        return rng.choice(VALUES), "another whole", Expect.ANY
    holder, key = _holder(value, way), way[-1]
    name = ".".join(map(str, way))
    kind = rng.randrange(12)
    if kind < 5:
        holder[key] = rng.choice(VALUES)
        return value, f"{name} = {str(holder[key])[:40]!r}", Expect.ANY
    if kind < 7 and isinstance(holder[key], int):
        holder[key] = rng.choice(COUNTS)
        return value, f"{name} = {str(holder[key])[:40]!r}", Expect.ANY
    if kind == 7 or not isinstance(holder, dict):
        del holder[key]
        return value, f"without {name}", Expect.ANY
    if kind == 8:
        holder[rng.choice(("", "x", key.upper(), key + "_", "\x1b[2J"))] = holder.pop(key)
        return value, f"{name} renamed", Expect.ANY
    if kind == 9:
        other = rng.choice(list(holder))
        holder[key], holder[other] = holder[other], holder[key]
        expect = Expect.SAME if other == key else Expect.ANY
        return value, f"{name} and {other} exchanged", expect
    if kind == 10:
        one = holder[key]
        held = str(one) if not isinstance(one, str) else [one]
        holder[key] = rng.choice((held, [one], {"value": one}))
        return value, f"{name} of another type", Expect.ANY
    holder[f"fuzz_{rng.randrange(100)}"] = rng.choice((1, "text", None))
    return value, f"unknown key beside {name}", Expect.SAME_IF_READ


def dump(value: Any, indent: int | None = 2) -> bytes:
    """Return JSON, with the values written raw that JSON has no way to say."""
    text = json.dumps(value, indent=indent)
    while (start := text.find(f'"{_RAW}')) >= 0:
        end = start + len(_RAW) + 1
        while text[end] != '"' or text[end - 1] == "\\":
            end += 1
        raw = json.loads(text[start : end + 1])[len(_RAW) :]
        text = text[:start] + raw + text[end + 1 :]
    return text.encode()


def structured(data: bytes, rng: Random) -> Mutation:
    value, what = json.loads(data), []
    expect = Expect.SAME
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value, done, must = change(value, rng)
        what.append(done)
        expect = must if expect in (Expect.SAME, must) else Expect.ANY
        if not isinstance(value, (dict, list)):
            break
    return Mutation(dump(value), "; ".join(what), expect)


def other_spelling(data: bytes, rng: Random) -> Mutation:
    indent = rng.choice((None, 1, 7))
    return Mutation(b" \n" + dump(json.loads(data), indent) + b"\n\n", "other spaces", Expect.SAME)


def twice(data: bytes, rng: Random) -> Mutation:
    value = json.loads(data)
    if not isinstance(value, dict) or not value:
        return structured(data, rng)
    key = rng.choice(list(value))
    inside = dump(value, None).strip()[1:-1]
    other = dump({key: rng.choice(VALUES)}, None).strip()[1:-1]
    return Mutation(b"{" + inside + b"," + other + b"}", f"{key} twice")


JSON = choose([(12, structured), (1, other_spelling), (1, twice), (2, TEXT), (2, BYTES)])


def one_line(inside: Mutator) -> Mutator:
    """Return a mutator of a .jsonl file: one of its lines is changed."""

    def mutate(data: bytes, rng: Random) -> Mutation:
        lines = data.split(b"\n")
        place = rng.randrange(max(1, len(lines) - 1))
        mutation = inside(lines[place], rng)
        if mutation.data is None:
            return mutation
        lines[place] = mutation.data.replace(b"\n", b" ") if rng.random() < 0.9 else mutation.data
        expect = Expect.ANY if mutation.expect is Expect.SAME else mutation.expect
        return Mutation(b"\n".join(lines), f"line {place + 1}: {mutation.what}", expect)

    return mutate


JSONL = choose([(6, one_line(JSON)), (2, TEXT), (2, BYTES), (1, windows_lines)])


# YAML ---------------------------------------------------------------------------------------------

_YAML_VALUES = (
    *("~", "yes", "-1", "0", "1e400", ".nan", ".inf", "9" * 5000, "2001-01-01", "0x10", "1_000"),
    *("''", "a" * 300_000, "[]", "{}", "[[[1]]]", "{a: {b: c}}", "? x", "!!binary aGVsbG8="),
    *("!!python/object/apply:os.system ['true']", "!!set {a, b}", "!!omap [a: 1]", "!unknown x"),
    *("&a [*a]", "*nowhere", "|\n  text\n", '"\\e[31mred"', '"\\ud800"', "!!int x", "!!float []"),
    *("[" * 3000 + "]" * 3000, "[" * 100_000, "{1: 2, 1: 3}", "{[1]: 2}", "!!timestamp x", "%"),
    *("0o7777777777777777777777", "190:20:30", "-.inf", "[1, 2]", "text", "2", "0.5", "true"),
)


def _yaml_lines(data: bytes) -> list[str]:
    return data.decode().splitlines()


def yaml_value(data: bytes, rng: Random) -> Mutation:
    lines = _yaml_lines(data)
    place = rng.randrange(len(lines))
    key, value = lines[place].partition(":")[0], rng.choice(_YAML_VALUES)
    lines[place] = f"{key}: {value}"
    return Mutation("\n".join(lines).encode(), f"{key.strip()}: {value[:40]!r}")


def yaml_change(data: bytes, rng: Random) -> Mutation:
    value, what, expect = change(yaml.safe_load(data), rng)
    return Mutation(yaml.safe_dump(value, sort_keys=False).encode("utf-8", "replace"), what, expect)


def yaml_anchors(data: bytes, rng: Random) -> Mutation:
    depth = rng.choice((3, 9, 25))
    lines = ["bomb0: &b0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, depth):
        aliases = ", ".join([f"*b{level - 1}"] * 9)
        lines.append(f"bomb{level}: &b{level} [{aliases}]")
    own = _yaml_lines(data)
    key = rng.choice(own).partition(":")[0]
    lines += own if rng.random() < 0.5 else [*own, f"{key}: *b{depth - 1}"]
    return Mutation("\n".join(lines).encode(), f"anchors {depth} deep")


def yaml_merge(data: bytes, rng: Random) -> Mutation:
    own = _yaml_lines(data)
    added = rng.choice(
        ("<<: 3", "<<: {a: 1}", "<<: [1]", "? [a, b]\n: c", "? {a: b}\n: c", "---\na: 1", "1: 2")
    )
    return Mutation("\n".join([*own, added]).encode(), added)


def yaml_twice(data: bytes, rng: Random) -> Mutation:
    own = _yaml_lines(data)
    return Mutation("\n".join([*own, rng.choice(own)]).encode(), "a line twice")


def yaml_comment(data: bytes, rng: Random) -> Mutation:
    return Mutation(b"# a comment\n" + data + b"\n# another\n", "comments", Expect.SAME)


YAML = choose(
    [
        *((4, one) for one in (yaml_value, yaml_change)),
        *((1, one) for one in (yaml_anchors, yaml_merge, yaml_twice, yaml_comment)),
        *((1, one) for one in (odd_text, TEXT, BYTES)),
    ]
)
