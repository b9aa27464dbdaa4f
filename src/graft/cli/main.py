"""The command `graft`: finds the subcommand, parses its flags, prints errors without a traceback.

torch and transformers are imported by the subcommands when they run, so that --help is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from graft.errors import GraftError, did_you_mean

_HELP = {
    "demo": "fine-tune the bundled model on the bundled data and export it: a tour in 2 minutes",
    "plan": "predict the memory of a run from config.json alone",
    "convert": "bring GPTQ, AWQ, bitsandbytes, MLX, GGUF or pickled weights into graft's folder",
    "quantize": "write a model folder with quantised weights",
    "train": "fine-tune a model on a file of examples",
    "adopt": "make a run of an adapter that PEFT trained",
    "eval": "loss and perplexity of a model on a file of examples",
    "generate": "continue a prompt",
    "chat": "talk to a model",
    "merge": "fold a run's adapter into a model folder",
    "export": "write a run or a model for llama.cpp, Ollama, MLX, ONNX, OpenVINO and others",
    "verify": "load an exported file in its own runtime and compare it with the trained model",
    "compare": "train contenders, deploy each, and score the deployed files side by side",
    "doctor": "say what graft finds on this machine, and which kernels it uses",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; return 0, or 1 after a GraftError, 2 for wrong usage, 130 on Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"graft {version('graft-llm')}")
        return 0
    if words[0] not in _HELP:
        print(
            f"graft: unknown command {words[0]!r}{did_you_mean(words[0], _HELP)}", file=sys.stderr
        )
        return 2
    try:
        _command(words[0])(words[1:])
    except GraftError as error:
        print(f"graft {words[0]}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"graft {words[0]}: interrupted", file=sys.stderr)
        return 130
    return 0


def _command(name: str) -> Callable[[Sequence[str]], None]:
    from graft.cli import commands

    return commands.COMMANDS[name]


def _usage() -> str:
    width = max(len(name) for name in _HELP)
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in _HELP.items())
    return (
        "graft fine-tunes a language model and ships exactly the weights that it trained.\n\n"
        f"usage: graft COMMAND ...\n\n{lines}\n\ngraft COMMAND --help lists a command's flags."
    )


if __name__ == "__main__":
    sys.exit(main())
