"""The compiled shim: building it, and what can be asked of it. shim.c says how it works."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("shim.c")


class Action(IntEnum):
    """What is done at the operation; the numbers are those of shim.c."""

    COUNT = 1
    KILL = 2
    """Kill the process before it."""
    TEAR = 3
    """Kill the process in its middle: half of a write is made; of all others, the whole."""
    SIGNAL = 4
    """Send the process a signal before it, and go on."""
    FAIL = 5
    """Fail from it on, wherever the error can strike."""
    RECORD = 6


@dataclass(frozen=True)
class Fault:
    """One fault: at which operation below a folder it comes, counted from 1, and what it does."""

    folder: str
    action: Action
    at: int = 0
    value: int = 0
    """The signal, or the errno."""
    log: str = ""
    """The file that RECORD writes."""

    def as_plain(self) -> dict[str, Any]:
        return asdict(self)


def why_not() -> str | None:
    """Return why there can be no shim here, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "file operations are intercepted on Linux x86-64 only"
    if shutil.which("cc") is None:
        return "no C compiler (cc) to build the shim with"
    return None


def build(folder: Path | None = None) -> Path:
    """Compile the shim, if its source has changed, and return the library."""
    name = f"shim-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    folder = folder or Path(tempfile.gettempdir()) / f"graft-faults-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = folder / name
    if not library.is_file():
        part = folder / f"{name}.{os.getpid()}"
        command = ["cc", "-O2", "-Wall", "-shared", "-fPIC", "-o", str(part), str(SOURCE)]
        subprocess.run(command, check=True)
        part.rename(library)
    return library


def loaded() -> ctypes.CDLL:
    """Return the shim that was preloaded into this process."""
    shim = ctypes.CDLL(None)
    shim.fault_arm.argtypes = [
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_char_p,
    ]
    for name in ("fault_count", "fault_failed", "fault_uncovered"):
        getattr(shim, name).restype = ctypes.c_long
    return shim


def arm(shim: ctypes.CDLL, fault: dict[str, Any]) -> None:
    """Arm the shim in this process; raises OSError where the kernel does not allow it."""
    names = (os.fsencode(os.path.realpath(fault["folder"])), os.fsencode(fault["log"]))
    error = shim.fault_arm(names[0], fault["action"], fault["at"], fault["value"], names[1])
    if error:
        raise OSError(error, os.strerror(error), "the seccomp filter")
