"""The instruction sets that the native kernels are compiled for, to be used one after another."""

from __future__ import annotations

import atexit
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from emulated_library import ROOT, EmulatedLibrary, build, why_impossible

from graft.kernels.backend import native_library

ON_ARM = platform.machine() in ("aarch64", "arm64")
OWN = {"NEON": 0} if ON_ARM else {"baseline": 0, "AVX2": 1, "AVX-512": 2, "AVX-512+BF16": 3}
LEVELS = (*OWN, *([] if ON_ARM else ["NEON"]))


@contextmanager
def using(level: str) -> Iterator[None]:
    """Let the native backend use an instruction set (Arm's: by emulation), or skip the test."""
    if level not in OWN:
        reason = why_impossible()
        if reason is not None:
            pytest.skip(f"NEON under emulation: {reason}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native_library, "_load", _emulated)
            assert native_library.instructions() == level
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # a thread that is emulated takes long to start
            try:
                yield
            finally:
                torch.set_num_threads(threads)
        return
    reason = native_library.why_unavailable()
    if reason is not None:
        pytest.skip(f"native backend: {reason}")
    library = native_library.library()
    try:
        if library.graft_limit(OWN[level]) != OWN[level]:
            pytest.skip(f"this processor has no {level}")
        assert native_library.instructions() == level
        yield
    finally:
        library.graft_limit(max(OWN.values()))


@cache
def _emulated() -> EmulatedLibrary:
    library = EmulatedLibrary(build(ROOT / "build"))
    atexit.register(library.close)
    return library
