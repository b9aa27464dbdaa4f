"""GGUF files as llama.cpp writes them, and its own logits of them."""

from __future__ import annotations

import ctypes
import os
from functools import partial
from pathlib import Path

import torch
from _foreign_models import IDS, Case, Tool, base_model
from torch import Tensor

FILE_TYPES = {
    "F32": 0,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q2_K": 10,
    "Q3_K_M": 12,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
}
"""llama_ftype in llama.h."""
HELD = ("F32", "Q4_0", "Q4_1", "Q8_0", "BF16")


def by_llama_cpp(folder: Path, name: str) -> Tensor:
    """Quantise a file in F32 by llama.cpp, and dequantise that by llama.cpp again, to F32."""
    from graft.export.gguf.write import export_gguf
    from graft.model.load import load_model

    base_model(folder / "base", hidden_size=256, intermediate_size=512)
    source = load_model(str(folder / "base"), dtype="float32")
    plain = folder / "plain.gguf"
    export_gguf(source.model, source.tokenizer, plain, unquantised="F32", name="tiny")
    theirs = folder / "theirs.gguf"
    requantise(plain, theirs, FILE_TYPES[name])
    return dequantised_logits(theirs)


def dequantised_logits(file: Path) -> Tensor:
    """Return llama.cpp's logits of a file that it has dequantised itself.

    With quantised weights it rounds activations to 8 bits.
    """
    again = file.with_name("again.gguf")
    requantise(file, again, FILE_TYPES["F32"])
    return llama_cpp_logits(again)


def requantise(source: Path, target: Path, kind: int) -> None:
    """Write a GGUF file in another of llama.cpp's types."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.allow_requantize = kind, 1, True
    names = (str(source).encode(), str(target).encode())
    with _quiet():
        done = llama_cpp.llama_model_quantize(*names, ctypes.byref(options))
    if done:
        raise RuntimeError(f"llama_model_quantize ended with {done}")


def llama_cpp_logits(file: Path) -> Tensor:
    import llama_cpp
    import numpy as np

    with _quiet():
        engine = llama_cpp.Llama(
            str(file),
            n_ctx=64,
            logits_all=True,
            flash_attn=False,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
        rows = []
        for row in IDS:
            engine.reset()
            engine.eval(row.tolist())
            rows.append(torch.from_numpy(np.array(engine.scores[: len(row)])))
    return torch.stack(rows)


class _quiet:  # noqa: N801  (a context)
    """What llama.cpp prints goes nowhere."""

    def __enter__(self) -> None:
        self.kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *_: object) -> None:
        os.dup2(self.kept, 2)
        os.close(self.kept)


def _gguf_command(name: str) -> tuple[tuple[str, ...], ...]:
    words = ("convert", "theirs.gguf", "--tokenizer", "base", "--out", "ours")
    return ((*words, *(() if name in HELD else ("--dequantise",))),)


LLAMA_CPP = Tool(
    ("llama-cpp-python",),
    [
        Case(
            name,
            partial(by_llama_cpp, name=name),
            _gguf_command(name),
            bound=1e-3,
            compared="its own dequantised file (F32) in llama.cpp",
        )
        for name in FILE_TYPES
    ],
)
