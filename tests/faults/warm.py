"""A warm process that forks a child for each command, so that a round costs no imports.

`Warm` is the client. The server is this file, run as a script with the shim preloaded: it imports
graft, torch and transformers once and forks; the child arms the shim and calls graft's own main.
The server starts no threads: they would not be in the child.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    """The exit status, or minus the signal that ended it."""
    output: str
    """stdout and stderr together."""
    seconds: float
    after_signal: float | None
    """Seconds from the signal that was sent to it (at a time, not at an operation) to its end."""
    operations: int
    """Watched operations; 0 where it was killed."""
    failed: int
    """Operations that were made to fail."""
    timed_out: bool

    @property
    def error(self) -> str:
        """What it said of an error, or its last line."""
        lines = self.output.strip().splitlines()
        errors = [line for line in lines if "rror" in line]
        return (errors or lines or [""])[-1]


class Warm:
    """The client, to be closed. `folder` takes the children's output."""

    def __init__(self, folder: Path) -> None:
        from faults import shim

        self.log = folder / "output.txt"
        paths = (ROOT / "src", ROOT / "tests")
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = (
            os.environ
            | one
            | {
                "LD_PRELOAD": str(shim.build()),
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "MPLBACKEND": "agg",
            }
        )
        self.server = subprocess.Popen(
            [sys.executable, "-m", "faults.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def close(self) -> None:
        """End the server."""
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait(timeout=60)
        self.server.stdout.close()

    def run(
        self,
        words: Sequence[object],
        fault: Any = None,
        *,
        signal_after: tuple[int, float] | None = None,
        timeout: float = 120.0,
    ) -> Outcome:
        """Run `graft WORDS` in a child, with a fault or a signal that comes after some seconds."""
        assert self.server.stdin is not None and self.server.stdout is not None
        request = {
            "words": [str(word) for word in words],
            "fault": None if fault is None else fault.as_plain(),
            "signal_after": signal_after,
            "timeout": timeout,
            "log": str(self.log),
        }
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the warm process ended with {self.server.wait()}")
        output = self.log.read_text(encoding="utf-8", errors="replace")
        return Outcome(output=output, **json.loads(answer))


# The server ---------------------------------------------------------------------------------------


def _serve() -> None:
    from faults import shim as faults_shim

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may get between the replies
    shim = faults_shim.loaded()
    _import_all()
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(json.dumps(_round(request, shim)) + "\n")
        replies.flush()


def _import_all() -> None:
    """Import what commands import when they run, without computing anything."""
    import pkgutil

    import torch

    import graft

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(graft.__path__, "graft."):
        if not module.name.endswith("__main__"):
            _import(module.name)
    for name in ("llama.modeling_llama", "auto.modeling_auto", "auto.tokenization_auto"):
        _import(f"transformers.models.{name}")


def _import(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(name)
        except Exception:  # an extra that is not installed, as for a command that needs it
            return


def _round(request: dict[str, Any], shim: ctypes.CDLL) -> dict[str, Any]:
    read, write = os.pipe()
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(request, shim, write)
    os.close(write)
    sent = None
    if request["signal_after"] is not None and not _ended(read, request["signal_after"][1]):
        os.kill(child, request["signal_after"][0])
        sent = time.monotonic()
    timed_out = not _ended(read, request["timeout"])
    if timed_out:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    end = time.monotonic()
    facts = json.loads(told) if told else {"operations": 0, "failed": 0, "modules": []}
    for name in facts.pop("modules"):  # of what is imported on the way, the next child is spared
        if name not in sys.modules:
            _import(name)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": end - begin,
        "after_signal": None if sent is None else end - sent,
        "timed_out": timed_out,
        **facts,
    }


def _ended(pipe: int, seconds: float) -> bool:
    """Wait until the child has written its last word or is gone; return whether it has."""
    return bool(select.select([pipe], [], [], seconds)[0])


def _child(request: dict[str, Any], shim: ctypes.CDLL, pipe: int) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    code = 1
    try:
        from graft.cli.main import main

        if request["fault"] is not None:
            from faults import shim as faults_shim

            faults_shim.arm(shim, request["fault"])
        code = main(request["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        operations, failed = shim.fault_count(), shim.fault_failed()
        if shim.fault_uncovered():
            code = 99
            print("a file was mapped to be written, which the shim does not see", file=sys.stderr)
        shim.fault_disarm()
        modules = [name for name in sys.modules if not name.startswith("__")]
        facts = {"operations": operations, "failed": failed, "modules": modules}
        with os.fdopen(pipe, "w") as file:
            json.dump(facts, file)
        os._exit(code & 255)


if __name__ == "__main__":
    _serve()
