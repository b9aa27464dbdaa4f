"""Nothing that a command prints acts on the terminal, and whoever stops reading ends it quietly."""

from __future__ import annotations

import ast
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import graft.cli
from graft.cli import generate, show
from graft.cli.main import main
from graft.cli.progress import TerminalEvents
from graft.cli.tables import Column, print_table
from graft.errors import GraftError
from graft.text import printable

HOSTILE = "\x1b]0;title\x07\x1b[2J\r\x08\x9b31m\u202e[bold]x[/nothing] \ud83d end"
SPELT = r"\x1b]0;title\x07\x1b[2J\r\x08\x9b31m\u202e[bold]x[/nothing] \ud83d end"


def in_a_terminal(program: str) -> str:
    """Return what a Python program writes to a terminal."""
    leader, follower = pty.openpty()
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdin=follower, stdout=follower, stderr=follower):
        os.close(follower)
        written = b""
        try:
            while piece := os.read(leader, 4096):
                written += piece
        except OSError:  # Linux says so that the other end is closed
            pass
    os.close(leader)
    return written.decode().replace("\r\n", "\n")


def test_printable_leaves_lines_and_spells_the_rest() -> None:
    assert printable(HOSTILE) == SPELT
    assert printable("a\tb\nc – ü 🎉") == "a\tb\nc – ü 🎉"


def test_messages_errors_and_notes_are_spelt(capsys) -> None:
    show.show(HOSTILE)
    show.show(HOSTILE, error=True)
    found = capsys.readouterr()
    assert found.out == found.err == SPELT + "\n"
    written = io.StringIO()
    TerminalEvents(Console(file=written, width=20)).note(HOSTILE)
    assert written.getvalue() == SPELT + "\n"


def test_json_has_nothing_that_acts(capsys) -> None:
    show.show_json({"a": HOSTILE + "\x7f"})
    written = capsys.readouterr().out
    assert json.loads(written) == {"a": HOSTILE + "\x7f"}
    assert all(" " <= character < "\x7f" or character == "\n" for character in written)


def test_an_error_that_quotes_data_is_spelt(capsys, monkeypatch) -> None:
    def fails(*words: object) -> None:
        raise GraftError(HOSTILE)

    monkeypatch.setattr("graft.cli.flags.parse", fails)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == f"graft doctor: error: {SPELT}\n"
    assert main(["\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_tables_and_bars_show_markup_and_escapes_as_text() -> None:
    written = io.StringIO()
    console = Console(file=written, width=200, force_terminal=True, color_system=None)
    print_table(HOSTILE, Column(HOSTILE, [HOSTILE]), [Column("b[/x]", [HOSTILE])], console=console)
    assert written.getvalue().count(SPELT) == 4
    assert "b[/x]" in written.getvalue() and "\x1b" not in written.getvalue()
    events = TerminalEvents(console)
    with events:
        events.progress(HOSTILE, 1, 3)
    assert SPELT in written.getvalue() and "\x1b]0" not in written.getvalue()


def test_an_answer_is_spelt_in_a_terminal_and_exact_in_a_pipe(capsys) -> None:
    program = f"from graft.cli.show import *; print_whatever_comes(); show_answer({HOSTILE!a})"
    assert in_a_terminal(program) == SPELT
    words = [sys.executable, "-c", program]
    piped = subprocess.run(words, capture_output=True, check=True).stdout
    assert piped == HOSTILE.replace("\ud83d", r"\ud83d").encode()  # which has no UTF-8


def test_an_encoding_that_lacks_letters_ends_no_command() -> None:
    program = (
        "from graft.cli.show import *; print_whatever_comes(); show('ü'); show('ü', error=True)"
    )
    words = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(words, capture_output=True, check=True, env=environment)
    assert done.stdout == done.stderr == b"\\xfc\n"


COMMAND = [sys.executable, "-m", "graft.cli.main"]


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("words", [["train", "--help-all"], ["--help"]])
def test_a_reader_that_goes_ends_the_command_quietly(words, buffered) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run(
        [*COMMAND, *words], stdout=writer, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_under_the_output_is_told() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, check=False
        )
        silent = subprocess.run([*COMMAND, "nothing"], stdout=full, stderr=full, check=False)
    assert done.returncode == 1
    assert done.stderr == b"graft: error: the output cannot be written: No space left on device\n"
    assert silent.returncode == 2


def test_commands_print_through_show_alone() -> None:
    folder = Path(graft.cli.__file__).parent
    calls = [
        f"{path.name}:{node.lineno}"
        for path in sorted(folder.parent.rglob("*.py"))
        if path != folder / "show.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert calls == []
    assert generate.show_answer is show.show_answer
