"""Builds the native CPU kernels; everything else about the package stands in pyproject.toml.

The kernels are a plain shared library (no Python or PyTorch headers) that is compiled once for each
instruction set and chooses at run time. Without a compiler the package installs all the same and
computes with its other backends: `graft doctor` says so.
"""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
INSTRUCTIONS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": AVX512,
    "isa_avx512_bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vbmi"],
}
COMMON = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Results must not hang on what the compiler fuses: fused operations are written out.
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

    def build_extension(self, extension: Extension) -> None:
        on_x86 = platform.machine().lower() in ("x86_64", "amd64")
        objects = []
        for source in extension.sources:
            extra = INSTRUCTIONS.get(Path(source).name, []) if on_x86 else []
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                extra_postargs=[*COMMON, *extra],
                depends=extension.depends,
            )
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(extension.name),
            extra_postargs=[] if sys.platform == "darwin" else ["-lpthread"],
            build_temp=self.build_temp,
            target_lang="c++",
        )


setup(
    ext_modules=[
        Extension(
            "graft.kernels.backend._native",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=[
                str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc").glob(pattern)
            ],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
