"""The command `graft`: finds the subcommand, parses its flags, prints errors without a traceback.

torch and transformers are imported by the subcommands when they run, so that --help is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from graft.cli.commands import COMMANDS
from graft.cli.signals import Ended, ending
from graft.errors import GraftError
from graft.text import shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; return its exit status.

    0, or 1 after a GraftError, 2 for wrong usage, and 128 + n when signal n ended it: 130 on
    Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "--help-all"):
        print(_usage())
        return 0
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"graft {version('graft-llm')}")
        return 0
    name = words[0]
    problem = COMMANDS.problem(name)
    if problem is not None:
        print(f"graft: {problem}", file=sys.stderr)
        return 2
    try:
        from graft.cli.flags import parse

        command = COMMANDS[name]
        with ending():
            command.run(parse(command, words[1:], name))
    except GraftError as error:
        print(f"graft {name}: error: {shown(str(error))}", file=sys.stderr)
        return 1
    except Ended as ended:
        print(f"graft {name}: {ended}", file=sys.stderr)
        return ended.status
    except KeyboardInterrupt:  # raised by no signal, or before they were handled
        print(f"graft {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {COMMANDS.summary(name)}" for name in COMMANDS)
    return (
        "graft fine-tunes a language model and ships exactly the weights that it trained.\n\n"
        f"usage: graft COMMAND ...\n\n{lines}\n\n"
        "graft COMMAND --help lists a command's flags, --help-all the rare ones too."
    )


if __name__ == "__main__":
    sys.exit(main())
