"""The commands, in the order in which `graft --help` lists them, and what it says of each.

Each is the COMMAND of the file in this folder that has its name, imported when it is called: a
command, or a group of some that are called by two words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graft.entries import Entries, Listed

if TYPE_CHECKING:
    from graft.cli.command import Command, Group

_SUMMARIES = {
    "demo": "fine-tune the bundled model on the bundled data and export it: a tour in 2 minutes",
    "plan": "predict the memory of a run from config.json alone",
    "convert": "bring GPTQ, AWQ, bitsandbytes, MLX, GGUF or pickled weights into graft's folder",
    "quantize": "write a model folder with quantised weights",
    "compress": "write low-rank factors of a model's matrices, and a curve of what sizes cost",
    "data": "show what a model would be trained on, token by token, and what is odd about it",
    "train": "fine-tune a model on a file of examples",
    "runs": "list the runs below a folder, or compare some",
    "adopt": "make a run of an adapter that PEFT trained",
    "eval": "loss and perplexity of a model on a file of examples",
    "generate": "continue a prompt",
    "chat": "talk to a model",
    "adapter": "extract, merge, list, show, compare and resize adapters",
    "merge": "fold a run's adapter into a model folder",
    "export": "write a run or a model for llama.cpp, Ollama, MLX, ONNX, OpenVINO and others",
    "verify": "load an exported file in its own runtime and compare it with the trained model",
    "compare": "train contenders, deploy each, and score the deployed files side by side",
    "doctor": "say what graft finds on this machine, and which kernels it uses",
}

COMMANDS: Entries[Command[Any] | Group] = Entries(
    "command",
    {name: Listed(f"graft.cli.{name}:COMMAND", summary) for name, summary in _SUMMARIES.items()},
)


def every_command() -> dict[str, Command[Any]]:
    """Return every command, imported, by the words that call it: 'train', 'adapter show'."""
    from graft.cli.command import Group

    found: dict[str, Command[Any]] = {}
    for name in COMMANDS:
        entry = COMMANDS[name]
        if isinstance(entry, Group):
            found |= {f"{name} {one}": entry.commands[one] for one in entry.commands}
        else:
            found[name] = entry
    return found
