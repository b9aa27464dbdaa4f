"""Flags and YAML take the names of a table, those that were added late too, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from graft.api.settings import checked_settings
from graft.cli.command import Command
from graft.cli.fields import Positional
from graft.cli.flags import UsageError, parse
from graft.entries import Entries, Listed
from graft.errors import GraftError

METHODS: Entries[object] = Entries("method", {"lora": Listed("a:b"), "qalora": Listed("a:c")})
TARGETS: Entries[object] = Entries("export target", {"gguf": Listed("a:b"), "mlx": Listed("a:c")})


@dataclass(frozen=True, kw_only=True)
class Toy:
    place: Positional
    """Where."""
    method: Annotated[str, METHODS] = "lora"
    """What is trained."""
    start: Annotated[str, METHODS] | None = None
    """What it starts from."""
    export: tuple[Annotated[str, TARGETS], ...] = ()
    """Exports to write."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to compute."""
    bits: int | Literal["auto"] | None = None
    """Bits."""
    dora: bool = False
    """Rows."""


def given(*words: str) -> Toy:
    return parse(Command(arguments=Toy, run=print, takes_file=True), ["--bits=3", *words], "toy")


@pytest.fixture
def added() -> Iterator[str]:
    METHODS.add("toy", object())
    yield "toy"
    METHODS.remove("toy")


def test_names_of_a_table() -> None:
    assert given("here") == Toy(place="here", bits=3)
    words = ["here", "--method", "qalora", "--start=lora", "--export", "mlx", "gguf", "--dora"]
    expected = {"method": "qalora", "start": "lora", "export": ("mlx", "gguf"), "dora": True}
    assert given(*words) == Toy(place="here", bits=3, **expected)  # type: ignore[arg-type]
    assert given("here", "--bits", "auto").bits == "auto"


def test_a_name_that_was_added(added: str) -> None:
    assert given("here", "--method", added, "--start", added).start == added
    assert checked_settings({"method": added, "start": added}, Toy, "x.yaml")["method"] == added


def test_wrong_names_are_told_at_once() -> None:
    words = ["--method", "qqlora", "--start", "lor", "--export", "gguf", "mlxx", "--device", "xx"]
    with pytest.raises(UsageError) as error:
        given("here", *words)
    assert str(error.value).splitlines() == [
        "4 mistakes (graft toy --help-all lists the flags)",
        "  - --method: unknown method 'qqlora'; did you mean 'qalora'?",
        "  - --start: unknown method 'lor'; did you mean 'lora'?",
        "  - --export: unknown export target 'mlxx'; did you mean 'mlx'?",
        "  - --device: unknown value 'xx'; known: auto, cpu",
    ]


def test_settings_of_a_file_are_checked_likewise() -> None:
    settings = {"method": "qalora", "start": None, "export": "gguf", "bits": "auto"}
    assert checked_settings(settings, Toy, "x.yaml") == settings | {"export": ("gguf",)}
    wrong = {"method": "qqlora", "start": "lor", "export": ["gguf", "mlxx"], "bits": "x"}
    with pytest.raises(GraftError) as error:
        checked_settings(wrong, Toy, "x.yaml")
    lines = str(error.value).splitlines()
    assert lines[0] == "x.yaml: 4 problems"
    assert lines[1:4] == [
        "  - method is 'qqlora': unknown method 'qqlora'; did you mean 'qalora'?",
        "  - start is 'lor': unknown method 'lor'; did you mean 'lora'?",
        "  - export is ['gguf', 'mlxx']: unknown export target 'mlxx'; did you mean 'mlx'?",
    ]


def test_settings_are_quoted_in_a_few_harmless_words() -> None:
    long = "\x1b[2J" * 100_000
    wrong = {
        "method": long,
        "bits": [long] * 1000,
        "dora": {long: long},
        long: 1,
        "export": [3] * 9,
    }
    with pytest.raises(GraftError) as error:
        checked_settings(wrong, Toy, "x.yaml")
    assert "5 problems" in str(error.value) and "\x1b" not in str(error.value)
    assert len(str(error.value)) < 3000


@pytest.mark.parametrize("words", [["--no-method", "x"], ["--no-here"], ["--plac", "x"]])
def test_flags_that_there_are_not(words: list[str]) -> None:
    with pytest.raises(UsageError, match=f"^unknown flag {words[0]}.*--help-all lists the flags"):
        given("here", *words)


def test_what_is_missing_is_told() -> None:
    with pytest.raises(UsageError, match="^PLACE is missing: Where.$"):
        given()
