"""The kernels built for 64-bit Arm, run by an emulator, in the shape of the native library.

`emulated_server.cpp` and `csrc` become one static program, which runs under QEMU's user-mode
emulation. A call hands over addresses alone; the program asks for the pages of this process that a
kernel touches.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.kernels.backend import native_library

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shlex.split(os.environ.get("GRAFT_AARCH64_CXX", "aarch64-linux-gnu-g++"))
"""Another may be tried: GRAFT_AARCH64_CXX="clang++ --target=aarch64-linux-gnu"."""
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-schedule-insns", "-Wno-unknown-warning-option", "-Wno-ignored-optimization-argument"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-static", "-pthread"),
)
"""As in setup.py."""
MESSAGE = struct.Struct("<8sQQ")


def emulator() -> str | None:
    """Return the path of an emulator, or None."""
    return next((found for found in map(shutil.which, EMULATORS) if found), None)


def why_impossible() -> str | None:
    """Return what is missing here for building and running the program, or None."""
    if shutil.which(COMPILER[0]) is None:
        return f"there is no {COMPILER[0]} (Debian: g++-aarch64-linux-gnu)"
    if emulator() is None:
        return f"there is no {EMULATORS[0]} (Debian: qemu-user)"
    return None


_FAILED: dict[Path, str] = {}
"""What the compiler said of programs that it could not build: once is enough."""


def build(folder: Path) -> Path:
    """Return the program, built in the folder unless one of the same sources is there."""
    kernels = sorted((ROOT / "csrc").glob("*.cpp"))
    sources = [*kernels, Path(__file__).with_name("emulated_server.cpp")]
    read = [*sources, *(ROOT / "csrc").glob("*.inc"), *(ROOT / "csrc").glob("*.h")]
    digest = hashlib.sha256(repr((COMPILER, FLAGS)).encode())
    for file in sorted(read):
        digest.update(file.read_bytes())
    program = folder / f"graft-aarch64-{digest.hexdigest()[:16]}"
    assert program not in _FAILED, _FAILED[program]
    if not program.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        made = program.with_name(f"{program.name}.{os.getpid()}")
        command = [*COMPILER, *FLAGS, "-o", str(made), *map(str, sources)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or done.stderr:
            _FAILED[program] = done.stderr
            raise AssertionError(done.stderr)
        made.replace(program)
    return program


class EmulatedLibrary(ctypes.CDLL):
    """The program in the place of the library that native_library loads."""

    def __init__(self, program: Path, *options: str) -> None:
        """Start the program; `options` are the emulator's."""
        command = [str(emulator()), *options, str(program)]
        self._program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._memory = os.open("/proc/self/mem", os.O_RDONLY)
        self._sent: dict[int, bytes] = {}
        self._name = self._receive(32).rstrip(b"\0")

    def __getattr__(self, name: str) -> Callable[..., int]:
        """Return a kernel by the name that it has in the library."""
        kernel = name.removeprefix("graft_")
        if name.startswith("_") or kernel not in native_library._ARGUMENTS:
            raise AttributeError(name)
        return lambda *arguments: self._call(kernel, arguments)

    def graft_instructions(self) -> bytes:
        """Return the name of the instruction set."""
        return self._name

    def close(self) -> None:
        """End the program."""
        self._program.communicate(timeout=60)
        os.close(self._memory)

    def _receive(self, count: int) -> bytes:
        assert self._program.stdout is not None
        data = self._program.stdout.read(count)
        assert len(data) == count, f"the emulated kernels ended with {self._program.wait()}"
        return data

    def _send(self, data: bytes) -> None:
        assert self._program.stdin is not None
        self._program.stdin.write(data)
        self._program.stdin.flush()

    def _call(self, kernel: str, arguments: tuple[Any, ...]) -> int:
        types = native_library._ARGUMENTS[kernel]
        assert len(arguments) == len(types)
        words = b"".join(map(_word, arguments, types))
        self._send(kernel.encode().ljust(32, b"\0") + words.ljust(16 * 8, b"\0"))
        while True:
            kind, address, value = MESSAGE.unpack(self._receive(MESSAGE.size))
            if kind.rstrip(b"\0") == b"page":
                self._show(address, value)
            elif kind.rstrip(b"\0") == b"changed":
                self._change(address, self._receive(value))
            else:
                self._sent.clear()
                return ctypes.c_int64(value).value

    def _show(self, address: int, count: int) -> None:
        """Send a page, or nothing where this process has none."""
        try:
            page = os.pread(self._memory, count, address)
        except (OSError, OverflowError):
            page = b""
        self._sent[address] = page
        self._send(len(page).to_bytes(8, "little") + page)

    def _change(self, address: int, page: bytes) -> None:
        """Write the bytes of a page that a kernel changed; others may be Python's own by now."""
        before, after = (
            torch.frombuffer(bytearray(b), dtype=torch.uint8) for b in (self._sent[address], page)
        )
        changed = before != after
        room = (ctypes.c_uint8 * len(page)).from_address(address)
        torch.frombuffer(room, dtype=torch.uint8)[changed] = after[changed]


def _numbers(page: bytes) -> Tensor:
    return torch.frombuffer(bytearray(page), dtype=torch.uint8)


def _word(argument: Any, kind: Any) -> bytes:
    """Return an argument as the 8 bytes in which the program takes it."""
    if kind is ctypes.c_void_p:
        if argument is not None and not isinstance(argument, int):
            argument = ctypes.cast(argument, ctypes.c_void_p).value
        return struct.pack("<Q", argument or 0)
    return bytes(kind(argument)).ljust(8, b"\0")
