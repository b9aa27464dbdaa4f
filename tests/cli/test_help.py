"""Help: each flag once, in its group, required ones first, rare ones where all are asked for."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import pytest

from graft.cli.command import Command
from graft.cli.commands import every_command
from graft.cli.fields import flags_of
from graft.cli.help import page
from graft.cli.main import main
from graft.entries import Entries, Listed

Show = Callable[..., str]
COMMANDS = every_command()


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """A function from words and a width to the page that they print."""

    def shown(*words: object, columns: int = 100) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert ended.value.code == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return shown


def listed(text: str) -> dict[str, list[str]]:
    """Return the names of the fields under each title of a page."""
    groups: dict[str, list[str]] = {}
    title = ""
    for line in text.splitlines():
        if re.fullmatch(r"[a-z][a-z ]*", line):
            title = line
            groups[title] = []
        elif found := re.match(r"  (?:--(?:\[no-\])?([a-z][a-z-]*)|([A-Z]+)\b)", line):
            groups[title].append((found[1] or found[2].lower()).replace("-", "_"))
    return groups


def declaring(kind: type, name: str) -> type:
    return next(base for base in kind.__mro__ if name in vars(base).get("__annotations__", {}))


@pytest.mark.parametrize("name", COMMANDS)
def test_all_flags_once_in_the_group_of_their_class(name: str, show: Show) -> None:
    kind = COMMANDS[name].arguments
    expected: dict[str, set[str]] = {}
    for field in dataclasses.fields(kind):
        required = field.default is field.default_factory is dataclasses.MISSING
        group = getattr(declaring(kind, field.name), "GROUP", "options")
        expected.setdefault("required" if required else group, set()).add(field.name)
    groups = listed(show(*name.split(), "--help-all"))
    assert {title: sorted(names) for title, names in groups.items()} == {
        title: sorted(names) for title, names in expected.items()
    }
    if "required" in groups:
        assert list(groups)[0] == "required"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_all_but_the_rare_ones(name: str, show: Show) -> None:
    kind = COMMANDS[name].arguments
    fields = {field.name for field in dataclasses.fields(kind)}
    rare = {
        field for field in fields if field in getattr(declaring(kind, field), "RARE", frozenset())
    }
    text = show(*name.split(), "--help")
    shown = [field for names in listed(text).values() for field in names]
    assert sorted(shown) == sorted(fields - rare)
    if rare:
        assert text.splitlines()[-1].endswith(f"and lists {len(rare)} more.")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_on_two_screens(name: str, show: Show) -> None:
    """Where this fails for a new flag: mark rare ones of its component in RARE."""
    lines = show(*name.split(), "--help").splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 100
    if len(lines) > 40:
        of_one_flag = re.findall(r"^  -.*(?:\n {10,}.*)*", "\n".join(lines), re.MULTILINE)
        assert of_one_flag and max(flag.count("\n") for flag in of_one_flag) <= 2
    assert max(map(len, show(*name.split(), "--help-all", columns=60).splitlines()[2:])) <= 60
    assert show(*name.split(), "--help", columns=10) == show(*name.split(), "--help", columns=60)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_says_what_it_does(name: str) -> None:
    kind = COMMANDS[name].arguments
    for flag in flags_of(kind):
        assert flag.text.endswith("."), flag.name
    for base in kind.__mro__:
        own = set(vars(base).get("__annotations__", {}))
        assert vars(base).get("RARE", frozenset()) <= own, f"{base.__name__}.RARE"


def test_the_groups_of_train_in_order(show: Show) -> None:
    groups = listed(show("train", "--help"))
    assert list(groups) == [
        *("required", "method", "data", "quantisation", "training", "output"),
        "model and machine",
    ]
    assert groups["required"] == ["model", "data", "out"]
    assert show("train", "-h") == show("train", "--help")


def test_settings_of_a_file_are_the_defaults(tmp_path: Path, show: Show) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: base\nout: run\nbatch_size: 3\ndora: true\n", encoding="utf-8")
    text = show("train", file, "--help")
    assert listed(text)["required"] == ["data"]
    assert "one time. (default: 3)" not in text and "at once. (default: 3)" in text
    assert "--[no-]dora" in text


METHODS: Entries[object] = Entries(
    "method", {"lora": Listed("a:b", "beside the weights"), "full": Listed("a:c", "all weights")}
)
NAMES: Entries[object] = Entries("name", {f"number-{i}": Listed("a:b") for i in range(40)})


@dataclass(frozen=True, kw_only=True)
class Component:
    GROUP: ClassVar[str] = "component"
    RARE: ClassVar[frozenset[str]] = frozenset({"seldom"})

    method: Annotated[str, METHODS] = "lora"
    """What is trained. And how."""
    also: tuple[Annotated[str, METHODS], ...] = ()
    """What is trained too."""
    many: Annotated[str, NAMES] | None = None
    """One of many, of which there are far more than a line holds, so that the text is cut off as
    this one is, which goes on and on; and on; and on; and on; and on; and on, until it ends."""
    seldom: int = 0
    """Rarely given."""


@dataclass(frozen=True, kw_only=True)
class Toy(Component):
    """A toy."""

    needed: float
    """Something that must be given, with 1, 2, ... of it."""
    zero: float = 0.0
    """Nothing. Then more."""


def run_toy(arguments: Toy) -> None:
    """Play."""


TOY = Command(arguments=Toy, run=run_toy)


def test_names_of_a_table_are_listed_with_what_it_says_of_them(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    METHODS.add("added", object(), "in a test")
    try:
        text = page(TOY, "toy", whole=True)
    finally:
        METHODS.remove("added")
    listing = [
        "What is trained. And how. (default: lora)",
        *("  lora: beside the weights", "  full: all weights", "  added: in a test"),
    ]
    assert re.search(r"--method NAME +" + r"\n +".join(map(re.escape, listing)) + "\n", text)
    assert "added" not in page(TOY, "toy", whole=True)
    assert "number-0, number-1" in text and "number-39}" in text


def test_a_long_page_is_cut_to_first_sentences(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("graft.cli.help.SCREEN", 5)
    text = page(TOY, "toy", whole=False)
    assert text.splitlines()[-1] == "graft toy --help-all says more of each flag, and lists 1 more."
    assert "usage: graft toy --needed FLOAT [flags]" in text
    assert "with 1, 2, ... of it." in text and "{lora, full} What is trained. (default" in text
    assert "And how" not in text and "Then more" not in text and "seldom" not in text
    assert "(default: 0.0)" in text
    (many,) = re.findall(r"--many.*\n.*", text)
    assert "... 40 in all}" in many and many.endswith(" …")


def test_colours_on_a_terminal_alone(monkeypatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    plain = page(TOY, "toy", whole=True)
    assert "\x1b" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    coloured = page(TOY, "toy", whole=True)
    assert "\x1b[36m--needed\x1b[0m FLOAT" in coloured
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert page(TOY, "toy", whole=True) == plain


def test_help_is_understood_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == main(["--help"]) == 0
    said = capsys.readouterr().out
    assert said[: len(said) // 2] == said[len(said) // 2 :]
    with pytest.raises(SystemExit) as ended:
        main(["help", "runs"])
    assert ended.value.code == 0 and "usage: graft runs" in capsys.readouterr().out
    assert main(["help", "nosuch"]) == 2
