"""A function in a process of its own, which the system ends at its share of time and memory.

For what a stranger's file may make another library do: `re` and Parquet's readers know no bounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import IO

from graft.errors import GraftError

_BEGIN = """
import contextlib, importlib, json, resource, sys
module, name, arguments, seconds, memory, sys.path[:] = json.loads(sys.argv[1])
with contextlib.suppress(ValueError, OSError):  # where the system does not know the limit
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
getattr(importlib.import_module(module), name)(*arguments)
"""


def start_apart(
    function: Callable[..., None],
    *arguments: object,
    seconds: int,
    memory: int,
    stdin: IO[bytes] | int = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    """Start a module's function that reads stdin and writes stdout; it takes 0.05 s to start.

    arguments: as JSON has them. seconds: of processor time, at least 1. memory: bytes of address
    space. Raises GraftError when no process can be started.
    """
    module, name = function.__module__, function.__name__
    words = json.dumps([module, name, arguments, max(seconds, 1), memory, sys.path])
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BEGIN, words],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        raise GraftError(
            f"Python cannot be started in a process of its own: {error.strerror}; free some "
            "memory, or allow more processes"
        ) from error
