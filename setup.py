"""Builds the native CPU kernels; everything else about the package stands in pyproject.toml.

The kernels are a plain shared library (no Python or PyTorch headers) that is compiled once for each
instruction set and chooses at run time. It depends on no version of Python, so one wheel serves
all of them. Without a compiler the package installs all the same and computes with its other
backends: `graft doctor` says so.
"""

import importlib.machinery
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

LIBRARY = "graft.kernels.backend._native"

ON_X86 = platform.machine().lower() in ("x86_64", "amd64")
ON_ARM = platform.machine().lower() in ("aarch64", "arm64")
if sys.platform == "darwin":
    # A universal Python would compile each file for Intel and Arm at once, and flags are for one.
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
INSTRUCTIONS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": AVX512,
    "isa_avx512_bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vnni"],
}
# NEON with fused multiply-adds and float16 conversion is part of every 64-bit Arm processor and
# needs no flag. GCC's first scheduler (on there, off on x86) brings so many operands forward that
# the sums of a product no longer fit the registers.
ARM = [
    "-fno-schedule-insns",
    # clang knows neither this nor all of GCC's warnings.
    "-Wno-unknown-warning-option",
    "-Wno-ignored-optimization-argument",
]
COMMON = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Results must not depend on what the compiler fuses: fused operations are written out.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    # False alarms inside GCC's own intrinsics.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]


class BuildKernels(build_ext):
    """Compiles each source with the flags of its instruction set and links a plain library."""

    def get_ext_filename(self, fullname: str) -> str:
        # The last suffix names no version of Python.
        return str(Path(*fullname.split("."))) + importlib.machinery.EXTENSION_SUFFIXES[-1]

    def build_extension(self, extension: Extension) -> None:
        library = self.get_ext_fullpath(extension.name)
        made_from = [*extension.sources, *extension.depends, __file__]
        if not self.force and not newer_group(made_from, library, "newer"):
            return

        def compiled(source: str) -> list[str]:
            extra = ARM if ON_ARM else INSTRUCTIONS.get(Path(source).name, []) if ON_X86 else []
            objects: list[str] = self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                extra_postargs=[*COMMON, *extra],
                depends=extension.depends,
            )
            return objects

        with ThreadPoolExecutor() as pool:  # each is a compiler process
            objects = [file for files in pool.map(compiled, extension.sources) for file in files]
        self.compiler.link_shared_object(
            objects,
            library,
            extra_postargs=[] if sys.platform == "darwin" else ["-lpthread"],
            build_temp=self.build_temp,
            target_lang="c++",
        )


class Wheel(bdist_wheel):
    """Names the wheel after what its library depends on: the platform, and no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        built = any(Path(self.bdist_dir).rglob(f"{LIBRARY.rpartition('.')[2]}.*"))
        own = super().get_tag()[2].replace("universal2", platform.machine())
        return "py3", "none", own if built else "any"


setup(
    ext_modules=[
        Extension(
            LIBRARY,
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=[
                str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc").glob(pattern)
            ],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
