"""The instruction set that a benchmark computes with: graft's, PyTorch's and llama.cpp's.

A machine with AVX-512 can run the AVX2 code: graft's library is told so, PyTorch and its libraries
by their environment, which the measuring processes inherit. llama.cpp is compiled for one set, and
a build that goes beyond the chosen one is no peer. One for AVX2 is made by

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" \\
        pip install --no-deps --no-binary llama-cpp-python --target FOLDER llama-cpp-python

and found where PYTHONPATH names that folder.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import _peers

LEVELS = {"baseline": 0, "avx2": 1, "avx512": 2, "native": 3}
"""By graft's number for them; native is whatever the machine has."""

_VARIABLE = "GRAFT_BENCHMARK_ISA"
_TORCH = {
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "native": {},
}


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add --isa."""
    parser.add_argument(
        "--isa", choices=list(LEVELS), default="native", help="instruction set to compute with"
    )


def choose(name: str) -> None:
    """Compute with that set in the processes that are started from now on, and name it here."""
    os.environ.update(_TORCH[name], **{_VARIABLE: name})
    limit()


def limit() -> None:
    """Have graft's library compute with the set that was chosen: first thing in a child process."""
    from graft.kernels.backend.native_library import library, why_unavailable

    name = os.environ.get(_VARIABLE, "native")
    if why_unavailable() is None:
        library().graft_limit(LEVELS[name])


def chosen() -> str:
    """Return the name that was chosen."""
    return os.environ.get(_VARIABLE, "native")


def suffix() -> str:
    """Return what the name of a result's file ends with."""
    return "" if chosen() == "native" else f"-{chosen()}"


def comparable(who: Sequence[str]) -> list[str]:
    """Return the contenders without llama.cpp where it cannot be compared, which is printed."""
    reason = _peers.missing("llama_cpp") or why_no_llama_cpp()
    if reason is None:
        return list(who)
    print(f"skipped llama.cpp: {reason}")
    return [name for name in who if name != "llama.cpp"]


def why_no_llama_cpp() -> str | None:
    """Return why the llama.cpp that is installed cannot be compared, or None."""
    if chosen() in ("native", "avx512"):
        return None
    import llama_cpp

    told = llama_cpp.llama_print_system_info().decode()
    beyond = [name for name in ("AVX512", "AVX_VNNI", "AMX_INT8") if f"{name} = 1" in told]
    return f"it was built with {', '.join(beyond)} ({__name__}.py says how)" if beyond else None
