"""The command `graft`: finds the subcommand, parses its flags, prints errors without a traceback.

torch and transformers are imported by the subcommands when they run, so that --help is quick.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from graft.cli.commands import COMMANDS
from graft.cli.show import discard, flush, print_whatever_comes, show
from graft.cli.signals import Ended, ending
from graft.entries import Entries
from graft.errors import GraftError
from graft.text import quoted, shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; return its exit status.

    0, or 1 after a GraftError, 2 for wrong usage, and 128 + n when signal n ended it: 130 on
    Ctrl-C, 141 where nobody reads on (`graft runs | head -1`). Without `arguments` those of the
    process are taken, which is this command's own then, and ends with it.
    """
    if arguments is None:
        _end(_main(sys.argv[1:], own=True))
    return _main(list(arguments), own=False)


def _main(words: list[str], own: bool) -> int:
    print_whatever_comes()
    try:
        try:
            return _run(words, own)
        finally:
            flush()
    except BrokenPipeError:
        discard(sys.stdout)
        return 128 + signal.SIGPIPE
    except GraftError as error:
        discard(sys.stdout)
        show(f"graft: error: {error}", error=True)
        return 1


def _end(status: int) -> NoReturn:
    """End the process as Python does, without taking apart what is imported: that takes 0.5 s."""
    try:
        # Wakes the idle threads of pools, too, and waits for all.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException:  # Python's own way tells of it
        sys.exit(status)
    os._exit(status)


def _run(words: list[str], own: bool) -> int:
    if words[:1] == ["help"]:  # what git and pip take, too
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help", "--help-all"):
        show(_usage(COMMANDS, "graft", _ABOUT))
        return 0
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        show(f"graft {version('graft-llm')}")
        return 0
    name, problem = words[0], COMMANDS.problem(words[0])
    if problem is not None:
        show(f"graft: {problem}", error=True)
        return 2
    from graft.cli.command import Command, Group
    from graft.cli.flags import UsageError, parse

    try:
        command, words = COMMANDS[name], words[1:]
        if isinstance(command, Group):
            if not words or words[0] in ("-h", "--help", "--help-all"):
                show(_usage(command.commands, f"graft {name}", command.about))
                return 0
            problem = command.commands.problem(words[0])
            if problem is not None:
                show(f"graft {name}: {problem}", error=True)
                return 2
            name, command, words = f"{name} {words[0]}", command.commands[words[0]], words[1:]
        assert isinstance(command, Command)
        with ending():
            parsed = parse(command, words, name)
            if own and command.loads_models:
                from graft.model.imports import import_models

                import_models()
            command.run(parsed)
    except GraftError as error:
        show(f"graft {name}: error: {shown(str(error))}", error=True)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:
        raise
    except OSError as error:  # of a file that was asked for by the way
        about = "" if error.filename is None else f": {quoted(str(error.filename))}"
        show(f"graft {name}: error: {error.strerror or error}{about}", error=True)
        return 1
    except Ended as ended:
        show(f"graft {name}: {ended}", error=True)
        return ended.status
    except KeyboardInterrupt:  # raised by no signal, or before they were handled
        show(f"graft {name}: interrupted", error=True)
        return 130
    return 0


_ABOUT = "graft fine-tunes a language model and ships exactly the weights that it trained."


def _usage(commands: Entries[Any], called: str, about: str) -> str:
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:<{width}}  {commands.summary(name)}" for name in commands)
    return (
        f"{about}\n\n"
        f"usage: {called} COMMAND ...\n\n{lines}\n\n"
        f"{called} COMMAND --help lists a command's flags, --help-all the rare ones too."
    )


if __name__ == "__main__":
    sys.exit(main())
